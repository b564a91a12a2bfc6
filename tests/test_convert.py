"""Conversions without the other libraries: states written by hand, files, errors, a device."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable, schedules
from gpurms.convert import from_keras3, from_tf_keras, from_torch, to_keras3, to_tf_keras
from gpurms.dialects import KERAS3, TENSORFLOW, TORCH
from tests.engines import Engine
from tests.support import BFLOAT16, host, python

SHAPES = ((3, 2), (4,), ())


def arrays(n: int, seed: int = 0, dtype: Any = np.float64) -> list[np.ndarray]:
    """One array of each shape, n times over, all positive."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.uniform(0.5, 1.0, shape), dtype) for _ in range(n) for shape in SHAPES]


def variables(dtype: Any = np.float64) -> list[np.ndarray]:
    return arrays(1, 1, dtype)


CONFIG = {"name": "mine", "learning_rate": 0.25, "decay": 0.5, "rho": 0.75, "momentum": 0.5, "epsilon": 0.125}


# --- tf_keras -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["rms"]),
        ({"momentum": 0.5}, ["rms", "momentum"]),
        ({"centered": True}, ["rms", "mg"]),
        ({"momentum": 0.5, "centered": True}, ["rms", "momentum", "mg"]),
    ],
    ids=str,
)
def test_weights_are_the_librarys_own(options: dict[str, Any], names: list[str]):
    weights, chosen = [np.asarray(7), *arrays(len(names))], variables()
    opt = from_tf_keras(weights, chosen, {**CONFIG, "momentum": 0.0, **options})
    assert [w.tolist() for w in opt.get_weights()] == [w.tolist() for w in weights]
    assert opt.get_slot_names() == names
    again, config = to_tf_keras(opt, chosen)
    assert [w.tolist() for w in again] == [w.tolist() for w in weights]
    assert config == {**CONFIG, "momentum": 0.0, "centered": False, **options}


@pytest.mark.usefixtures("numpy_engine")
def test_weights_without_counter():
    opt = from_tf_keras(arrays(2), variables(), CONFIG)
    assert opt.iterations.numpy() == 0


@pytest.mark.usefixtures("numpy_engine")
def test_options_are_those_of_the_dialect():
    opt = from_tf_keras([7, *arrays(2)], variables(), CONFIG)
    assert opt.get_config() == TENSORFLOW(**CONFIG).get_config()
    new = {"name": "RMSprop", "learning_rate": 0.1, "momentum": 0.5, "use_ema": False, "ema_overwrite_frequency": 100}
    opt = from_tf_keras([7, *arrays(2)], variables(), {**new, "jit_compile": True, "is_legacy_optimizer": False})
    assert opt.get_config() == KERAS3(**new).get_config()


@pytest.mark.usefixtures("numpy_engine")
def test_schedule_becomes_a_dict_and_back():
    schedule = schedules.PolynomialDecay(0.5, 10)
    for legacy in (True, False):
        opt = RMSprop(schedule, momentum=0.5)
        _, config = to_tf_keras(opt, [], legacy)
        json.dumps(config)
        again = from_tf_keras([3], [], {**config, "is_legacy_optimizer": legacy})
        assert again.learning_rate == schedule


@pytest.mark.usefixtures("numpy_engine")
def test_slots_are_copies():
    weights, chosen = [np.asarray(7), *arrays(2)], variables()
    opt = from_tf_keras(weights, chosen, CONFIG)
    before = [w.tolist() for w in weights]
    opt.apply_gradients(list(zip(variables(), chosen)))
    assert [w.tolist() for w in weights] == before


@pytest.mark.usefixtures("numpy_engine")
def test_weights_are_exported_in_the_types_of_variables():
    chosen = [Variable(np.ones(2, dtype), "v") for dtype in (np.float16, np.float32, np.float64)]
    weights: list[Any] = [np.asarray(3), *(np.full(2, 0.1) for _ in range(6))]
    opt = from_tf_keras(weights, chosen, CONFIG)
    assert [w.dtype.name for w in opt.get_weights()[1:4]] == ["float32", "float32", "float64"]
    again, _ = to_tf_keras(opt, chosen)
    assert [w.dtype.name for w in again] == ["int64", *["float16", "float32", "float64"] * 2]


def test_arrays_on_a_device(library: Engine):
    weights = [np.asarray(7), *arrays(2, dtype=np.float32)]
    chosen = [library.variable(each, f"v{i}") for i, each in enumerate(variables(np.float32))]
    opt = from_tf_keras(weights, chosen, CONFIG)
    for name, some in (("rms", weights[1:4]), ("momentum", weights[4:])):
        for variable, values in zip(chosen, some):
            slot = opt.get_slot(variable, name)
            assert type(slot.value) is type(variable.value)
            assert host(slot).tolist() == values.tolist()
    opt.apply_gradients([(library.put(np.ones(v.shape, np.float32)), v) for v in chosen])
    again, _ = to_tf_keras(opt, chosen)
    assert again[0] == 8
    assert all(type(each) is np.ndarray for each in again)


# --- torch, whose tensors NumPy can read --------------------------------------------------------------------


def state_dict(momentum: float = 0.5) -> dict[str, Any]:
    state = {
        i: {"step": np.float32(7), "square_avg": rms, "momentum_buffer": mom}
        for i, (rms, mom) in enumerate(zip(arrays(1, 2), arrays(1, 3)))
    }
    return {"state": state, "param_groups": [{"lr": 0.25, "momentum": momentum, "params": [0, 1, 2]}]}


@pytest.mark.usefixtures("numpy_engine")
def test_torch():
    chosen = variables()
    opt = from_torch(state_dict(), chosen)
    assert opt.get_config() == TORCH(lr=0.25, momentum=0.5).get_config()
    assert [w.tolist() for w in opt.get_weights()] == [7, *(each.tolist() for each in arrays(1, 2) + arrays(1, 3))]


@pytest.mark.usefixtures("numpy_engine")
def test_buffer_that_torch_does_not_use():
    opt = from_torch(state_dict(momentum=0.0), variables())
    assert opt.get_slot_names() == ["rms"]


@pytest.mark.usefixtures("numpy_engine")
def test_iterations_are_the_most_steps_of_a_parameter():
    source = state_dict()
    source["state"][1]["step"] = np.float32(9)
    assert from_torch(source, variables()).iterations.numpy() == 9


# --- bad input ----------------------------------------------------------------------------------------------


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "few": (lambda w, v: (w[:-1], v, CONFIG), ValueError, "rms, momentum of 3 variables, 6 arrays; got 5"),
    "many": (lambda w, v: ([*w, w[-1]], v, CONFIG), ValueError, "6 arrays; got 7"),
    "no momentum": (
        lambda w, v: (w, v, {**CONFIG, "momentum": 0.0}),
        ValueError,
        "expected rms of 3 .* 3 arrays; got 6",
    ),
    "few variables": (lambda w, v: (w, v[:2], CONFIG), ValueError, "of 2 variables, 4 arrays; got 6"),
    "order": (lambda w, v: (w, v[::-1], CONFIG), ValueError, r"expected its rms in shape \(\); got shape \(3, 2\)"),
    "shape of momentum": (
        lambda w, v: ([*w[:5], w[4], w[6]], v, CONFIG),
        ValueError,
        r"^variable 1 .* expected its momentum in shape \(4,\); got shape \(3, 2\)",
    ),
    "integers": (lambda w, v: ([*w[:-1], np.asarray(1)], v, CONFIG), TypeError, r"\[5\]: .*real numbers; got int64"),
    "text": (lambda w, v: ([*w[:-1], "a"], v, CONFIG), TypeError, r"\[5\]: .*real numbers"),
    "negative counter": (lambda w, v: ([-1, *w[1:]], v, CONFIG), ValueError, "expected a number of steps; got -1"),
    "counter of a shape": (lambda w, v: ([w[2], *w[1:]], v, CONFIG), ValueError, "expected a number of steps"),
    "no config": (lambda w, v: (w, v, None), TypeError, "config must be a dict"),
    "function as momentum": (
        lambda w, v: (w, v, {**CONFIG, "momentum": lambda: 0.5}),
        TypeError,
        "momentum must be a real number; got",
    ),
    "text as momentum": (
        lambda w, v: (w, v, {**CONFIG, "momentum": "0.5"}),
        TypeError,
        "momentum must be a real number; got '0.5'",
    ),
    "negative momentum": (lambda w, v: (w, v, {**CONFIG, "momentum": -1}), ValueError, r"momentum must be in \[0, 1\]"),
    "text as centered": (
        lambda w, v: (w, v, {**CONFIG, "centered": "no"}),
        TypeError,
        "centered must be True or False; got 'no'",
    ),
    "loss scale": (
        lambda w, v: (w, v, {"name": "scaled", "inner_optimizer": CONFIG, "initial_scale": 4.0}),
        ValueError,
        "got one of LossScaleOptimizer: give its inner_optimizer's",
    ),
    "unknown key": (lambda w, v: (w, v, {**CONFIG, "beta_1": 0.5}), TypeError, "beta_1"),
    "averages": (
        lambda w, v: (w, v, {"momentum": 0.5, "use_ema": True, "is_legacy_optimizer": False}),
        ValueError,
        "use_ema=True",
    ),
    "one variable": (lambda w, v: (w, v[0], CONFIG), TypeError, "must be a list of variables"),
    "no variable": (lambda w, v: (w, [*v[:2], 1.0], CONFIG), TypeError, "variable 2 .* got 1.0"),
    "integer variable": (lambda w, v: (w, [*v[:2], np.asarray(1)], CONFIG), TypeError, "variable 2 .* got int64"),
    "twice": (lambda w, v: (w, [v[0], v[1], v[1][:]], CONFIG), ValueError, "variable 2 is variable 1 again"),
}


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize("name", BAD)
def test_bad_weights(name: str):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        from_tf_keras(*arguments([np.asarray(7), *arrays(2)], variables()))


@pytest.mark.usefixtures("numpy_engine")
def test_variable_that_was_not_updated():
    with pytest.raises(ValueError, match=r"^variable 0 .*expected slots rms; .*has not updated it yet"):
        to_tf_keras(TENSORFLOW(), variables())


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize("name", ["learning_rate", "rho", "momentum", "epsilon", "decay"])
def test_functions_are_not_exported(name: str, tmp_path: Path):
    chosen = variables()
    opt = RMSprop(**{"momentum": 0.5, name: lambda: 0.25})
    opt.apply_gradients(list(zip(arrays(1), chosen)))
    message = f"would go on with the present value of what is a function here: {name}; set it to a number first"
    for legacy in (True, False):
        with pytest.raises(ValueError, match=message if legacy or name != "decay" else "no decay"):
            to_tf_keras(opt, chosen, legacy)
    path = written(tmp_path / "m.weights.h5")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message if name != "decay" else "no decay"):
        to_keras3(opt, chosen, path)
    assert path.read_bytes() == before
    setattr(opt, name, 0.25)
    assert to_tf_keras(opt, chosen)[1][name] == 0.25


# --- files of Keras 3 ---------------------------------------------------------------------------------------


KERAS = {"learning_rate": 0.125, "momentum": 0.5}


def written(path: Path, values: list[Any] | None = None, others: bool = True) -> Path:
    """A weights file as Keras writes it, with these variables of the optimizer."""
    import h5py

    with h5py.File(path, "w") as file:
        if others:
            file["layers/dense/vars/0"] = np.ones((3, 2), np.float32)
        for i, value in enumerate([np.int32(7), np.float32(0.25), *arrays(2)] if values is None else values):
            file[f"optimizer/vars/{i}"] = value
    return path


@pytest.mark.usefixtures("numpy_engine")
def test_weights_file(tmp_path: Path):
    path = written(tmp_path / "m.weights.h5")
    opt = from_keras3(path, variables(), KERAS)
    assert opt.learning_rate == 0.25
    assert [w.tolist() for w in opt.get_weights()] == [7, *(each.tolist() for each in arrays(2))]
    assert opt.get_config() == KERAS3(0.25, momentum=0.5).get_config()


@pytest.mark.usefixtures("numpy_engine")
def test_archive(tmp_path: Path):
    weights = written(tmp_path / "m.weights.h5")
    config = {"class_name": "RMSprop", "config": KERAS}
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"compile_config": {"optimizer": config}}))
        archive.write(weights, "model.weights.h5")
    chosen = variables()
    opt = from_keras3(tmp_path / "m.keras", chosen)
    assert opt.get_weights()[6].tolist() == arrays(2)[5].tolist()
    assert from_keras3(tmp_path / "m.keras", variables(), {**KERAS, "rho": 0.5}).rho == 0.5


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize("values", [None, [], [np.int64(1)]], ids=["same", "none", "another"])
def test_export_to_a_file(tmp_path: Path, values: Any):
    import h5py

    path = written(tmp_path / "m.weights.h5", values)
    chosen = variables()
    opt = from_tf_keras([9, *arrays(2, 5)], chosen, {**KERAS, "is_legacy_optimizer": False})
    config = to_keras3(opt, chosen, path)
    again = from_keras3(path, chosen, config)
    assert again.get_config() == opt.get_config()
    assert [w.tolist() for w in again.get_weights()] == [w.tolist() for w in opt.get_weights()]
    with h5py.File(path) as file:
        assert (file["layers/dense/vars/0"][()] == 1).all()
    assert [each.name for each in tmp_path.iterdir()] == ["m.weights.h5"]


BAD_FILES: dict[str, tuple[Any, dict[str, Any] | None, str]] = {
    "no state": ([], KERAS, "holds no state of an optimizer"),
    "not built": ([np.int32(0), np.float32(0.25)], KERAS, "rms, momentum of 3 variables, 6 arrays; got 0"),
    "only a counter": ([np.int32(0)], KERAS, "6 arrays; got 0"),
    "without learning rate": ([np.int32(7), *arrays(2)], KERAS, "6 arrays; got 5"),
    "learning rate of a shape": ([np.int32(7), np.ones(2), *arrays(2)], KERAS, r"learning rate .*got shape \(2,\)"),
    "no config": (None, None, "give config"),
    "shapes": ([np.int32(7), np.float32(0.25), *arrays(2)[::-1]], KERAS, r"its rms in shape \(3, 2\); got shape \(\)"),
    "counter": ([np.float32(0.5), np.float32(0.25), *arrays(2)], KERAS, "expected a number of steps; got"),
}


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, name: str):
    values, config, message = BAD_FILES[name]
    path = written(tmp_path / "m.weights.h5", values)
    with pytest.raises(ValueError, match=message):
        from_keras3(path, variables(), config)


@pytest.mark.usefixtures("numpy_engine")
def test_variables_that_do_not_count_from_0(tmp_path: Path):
    import h5py

    path = written(tmp_path / "m.weights.h5")
    with h5py.File(path, "r+") as file:
        del file["optimizer/vars/1"]
    with pytest.raises(ValueError, match="to count from 0"):
        from_keras3(path, variables(), KERAS)


@pytest.mark.usefixtures("numpy_engine")
def test_archive_without_weights(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"expected model\.weights\.h5 in the archive"):
        from_keras3(tmp_path / "m.keras", variables())


@pytest.mark.usefixtures("numpy_engine")
def test_archive_that_was_not_compiled(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"compile_config": None}))
        archive.write(written(tmp_path / "m.weights.h5"), "model.weights.h5")
    with pytest.raises(ValueError, match="not compiled with an optimizer"):
        from_keras3(tmp_path / "m.keras", variables())


@pytest.mark.usefixtures("numpy_engine")
def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "text.weights.h5").write_text("no weights")
    (tmp_path / "text.keras").write_text("no archive")
    for name in ("text.weights.h5", "missing.weights.h5", "missing.keras"):
        with pytest.raises(OSError, match=r"signature|No such file"):
            from_keras3(tmp_path / name, variables(), KERAS)
    with pytest.raises(zipfile.BadZipFile):
        from_keras3(tmp_path / "text.keras", variables(), KERAS)
    with pytest.raises(ValueError, match=r"a \.weights\.h5 file or a \.keras archive; got .*m\.weights\.json"):
        from_keras3(tmp_path / "m.weights.json", variables(), KERAS)


@pytest.mark.usefixtures("numpy_engine")
def test_failed_export_leaves_the_file(tmp_path: Path):
    path = written(tmp_path / "m.weights.h5")
    before = path.read_bytes()
    chosen = variables()
    opt = from_keras3(path, chosen, KERAS)
    opt.momentum, opt.centered = 0.5, True
    with pytest.raises(ValueError, match="has no slot 'mg'"):
        to_keras3(opt, chosen, path)
    opt.centered, opt.nesterov = False, True
    with pytest.raises(ValueError, match="nesterov is True here, False there"):
        to_keras3(opt, chosen, path)
    assert path.read_bytes() == before
    opt.nesterov = False
    only = written(tmp_path / "optimizer.weights.h5", others=False)
    with pytest.raises(ValueError, match="expected the weights of a model"):
        to_keras3(opt, chosen, only)
    with pytest.raises(ValueError, match=r"expected a \.weights\.h5 file"):
        to_keras3(opt, chosen, tmp_path / "m.keras")


@pytest.mark.usefixtures("numpy_engine")
def test_bfloat16_in_a_file(tmp_path: Path):
    import h5py

    path = tmp_path / "m.weights.h5"
    low = [value.astype(BFLOAT16) for value in arrays(2)]
    written(path, [np.int32(7), np.float32(0.25)])
    with h5py.File(path, "r+") as file:
        for i, value in enumerate(low, 2):
            file.create_dataset(f"optimizer/vars/{i}", data=value.view("V2")).attrs["dtype"] = "bfloat16"
    opt = from_keras3(path, variables(BFLOAT16), KERAS)
    assert [w.tolist() for w in opt.get_weights()[1:]] == [value.astype(np.float32).tolist() for value in low]


# --- imports ------------------------------------------------------------------------------------------------


def test_import_is_light():
    code = (
        "import sys, gpurms.convert, gpurms.dialects\n"
        "print([name for name in ('torch', 'tensorflow', 'keras', 'jax', 'optax', 'h5py') if name in sys.modules])"
    )
    run = python("-c", code)
    assert run.stdout.strip() == "[]", run.stderr
