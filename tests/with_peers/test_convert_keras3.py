"""Files of Keras 3, there and back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gpurms import RMSprop, schedules
from gpurms.convert import from_keras3, to_keras3
from gpurms.dialects import KERAS3
from tests.with_peers import peers
from tests.with_peers.peers import keras

pytestmark = [
    pytest.mark.usefixtures("numpy_engine"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras with NumPy 2
]

SHAPES = ((3, 2), (2,), (2, 1), (1,))
OPTIONS: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.1, "momentum": 0.9, "rho": 0.7, "epsilon": 1e-2},
    {"learning_rate": 0.1, "centered": True, "clipvalue": 1.0},
    {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.3},
]


class Model(peers.Keras3):
    """A compiled model of two layers, whose optimizer is stepped by hand."""

    def __init__(self, start: list[np.ndarray], optimizer: Any) -> None:
        dtype = start[0].dtype.name
        layers = [keras.layers.Dense(2, dtype=dtype), keras.layers.Dense(1, dtype=dtype)]
        self.model = keras.Sequential([keras.layers.Input((3,), dtype=dtype), *layers])
        self.model.compile(optimizer, loss="mse")
        self.model.set_weights(start)
        self.variables = self.model.trainable_variables
        self.optimizer = optimizer
        optimizer.build(self.variables)


def trained(problem: peers.Problem, n_steps: int, **options: Any) -> Model:
    model = Model(problem.start, keras.optimizers.RMSprop(**options))
    for grads in problem.grads[:n_steps]:
        model.step(grads)
    return model


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_import(tmp_path: Path, options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30, SHAPES)
    with peers.floatx(dtype):
        theirs = trained(problem, 10, **options)
        theirs.model.save_weights(tmp_path / "model.weights.h5")
        theirs.model.save(tmp_path / "model.keras")
        variables, others = theirs.values(), theirs.values()
        opt = from_keras3(tmp_path / "model.weights.h5", variables, theirs.optimizer.get_config())
        same = from_keras3(tmp_path / "model.keras", others)
        assert same.get_config() == opt.get_config()
        assert [w.tolist() for w in same.get_weights()] == [w.tolist() for w in opt.get_weights()]
        assert opt.iterations.numpy() == 10
        peers.Comparison(opt, variables).run(theirs, problem.grads[10:])


@pytest.mark.parametrize("has_optimizer", [True, False])
@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(tmp_path: Path, options: dict[str, Any], dtype: Any, has_optimizer: bool):
    path = tmp_path / "model.weights.h5"
    problem = peers.Problem(dtype, 30, SHAPES)
    ours = peers.Comparison(KERAS3(**options), [value.copy() for value in problem.start])
    for grads in problem.grads[:10]:
        ours.step(grads)
    with peers.floatx(dtype):
        written = trained(problem, 1, **options)
        written.model.set_weights(ours.variables)
        if not has_optimizer:
            written.model.optimizer = None
        written.model.save_weights(path)
        config = to_keras3(ours.optimizer, ours.variables, path)
        theirs = Model(problem.start, keras.optimizers.RMSprop.from_config(config))
        theirs.model.load_weights(path)
        assert int(theirs.optimizer.iterations) == 10
        ours.restart().run(theirs, problem.grads[10:])


def test_schedule(tmp_path: Path):
    path = tmp_path / "model.weights.h5"
    problem = peers.Problem(np.float32, 30, SHAPES)
    theirs = trained(problem, 10, learning_rate=keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5), momentum=0.5)
    theirs.model.save_weights(path)
    theirs.model.save(tmp_path / "model.keras")
    variables = theirs.values()
    opt = from_keras3(path, variables, theirs.optimizer.get_config())
    assert opt.learning_rate == schedules.ExponentialDecay(0.1, 4, 0.5, name="ExponentialDecay")
    assert from_keras3(tmp_path / "model.keras", theirs.values()).get_config() == opt.get_config()
    ours = peers.Comparison(opt, variables)
    ours.run(theirs, problem.grads[10:20])

    theirs.model.set_weights(variables)
    theirs.model.save_weights(path)
    config = to_keras3(opt, variables, path)
    again = Model(variables, keras.optimizers.RMSprop.from_config(config))
    again.model.load_weights(path)
    ours.restart().run(again, problem.grads[20:])


@pytest.fixture
def mixed_float16() -> Iterator[None]:
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


class Mixed(peers.Keras3):
    """A model that Keras compiles with a loss scale of 64, and whose gradients come scaled."""

    def __init__(self, start: list[np.ndarray], optimizer: Any) -> None:
        layers = [keras.layers.Dense(2), keras.layers.Dense(1)]
        self.model = keras.Sequential([keras.layers.Input((3,)), *layers])
        self.model.compile(optimizer, loss="mse")
        self.model.set_weights(start)
        self.optimizer = self.model.optimizer
        self.variables = self.model.trainable_variables
        self.optimizer.initial_scale = 64.0
        self.optimizer.build(self.variables)

    def step(self, grads: list[np.ndarray]) -> None:
        scale = float(self.optimizer.dynamic_scale)
        super().step([np.asarray(grad * scale, np.float32) for grad in grads])


@pytest.mark.usefixtures("mixed_float16")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_scale(tmp_path: Path, options: dict[str, Any]):
    """Keras wraps the optimizer with this policy; steps that it skips do not count."""
    path = tmp_path / "model.weights.h5"
    problem = peers.Problem(np.float32, 30, SHAPES)
    theirs = Mixed(problem.start, keras.optimizers.RMSprop(**options))
    assert type(theirs.optimizer) is keras.optimizers.LossScaleOptimizer
    for grads in problem.grads[:10]:
        theirs.step(grads)
    theirs.step([np.full_like(grad, np.inf) for grad in problem.grads[0]])
    assert float(theirs.optimizer.dynamic_scale) == 32
    theirs.model.save_weights(path)
    theirs.model.save(tmp_path / "model.keras")
    config = theirs.optimizer.get_config()
    variables = theirs.values()
    opt = from_keras3(path, variables, config)
    assert opt.iterations.numpy() == 10
    for source, given in (
        (path, keras.optimizers.serialize(theirs.optimizer)),
        (path, theirs.optimizer.inner_optimizer.get_config()),
        (tmp_path / "model.keras", None),
        (tmp_path / "model.keras", config),
    ):
        same = from_keras3(source, theirs.values(), given)
        assert same.get_config() == opt.get_config()
        assert [w.tolist() for w in same.get_weights()] == [w.tolist() for w in opt.get_weights()]
    ours = peers.Comparison(opt, variables)
    ours.run(theirs, problem.grads[10:20])

    theirs.step([np.full_like(grad, np.nan) for grad in problem.grads[0]])
    theirs.model.set_weights(variables)
    theirs.model.save_weights(path)
    opt.iterations.assign(200)
    config = to_keras3(opt, variables, path)
    again = Mixed(problem.start, keras.optimizers.RMSprop.from_config(config))
    again.model.load_weights(path)
    assert float(again.optimizer.dynamic_scale) == 16
    assert int(again.optimizer.iterations) == 200
    ours.restart().run(again, problem.grads[20:])


@pytest.mark.usefixtures("mixed_float16")
def test_archive_with_a_loss_scale_of_the_callers(tmp_path: Path):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.5), initial_scale=64.0)
    theirs = Mixed(peers.Problem(np.float32, 1, SHAPES).start, optimizer)
    theirs.model.save(tmp_path / "model.keras")
    assert from_keras3(tmp_path / "model.keras", theirs.values()).learning_rate == 0.5


@pytest.mark.usefixtures("mixed_float16")
def test_loss_scale_of_another_optimizer(tmp_path: Path):
    theirs = Mixed(peers.Problem(np.float32, 1, SHAPES).start, keras.optimizers.Adam(0.5))
    theirs.model.save_weights(tmp_path / "model.weights.h5")
    for config in (theirs.optimizer.get_config(), keras.optimizers.serialize(theirs.optimizer)):
        with pytest.raises(ValueError, match="config of an RMSprop; got one of Adam"):
            from_keras3(tmp_path / "model.weights.h5", theirs.values(), config)


def test_learning_rate_is_that_in_the_file(tmp_path: Path):
    theirs = trained(peers.Problem(np.float32, 1, SHAPES), 1, learning_rate=0.5)
    config = theirs.optimizer.get_config()
    theirs.optimizer.learning_rate = 0.25
    theirs.model.save_weights(tmp_path / "model.weights.h5")
    assert from_keras3(tmp_path / "model.weights.h5", theirs.values(), config).learning_rate == 0.25


def test_bfloat16(tmp_path: Path):
    problem = peers.Problem(peers.BFLOAT16, 2, SHAPES)
    theirs = Model([value.astype(np.float32) for value in problem.start], keras.optimizers.RMSprop(momentum=0.5))
    low = [keras.Variable(value, dtype="bfloat16") for value in theirs.values()]
    optimizer = keras.optimizers.RMSprop(0.5, momentum=0.5)
    for grads in problem.grads:
        optimizer.apply([peers.torch.tensor(g.astype(np.float32)).bfloat16() for g in grads], low)
    theirs.model.optimizer = optimizer
    theirs.model.save_weights(tmp_path / "model.weights.h5")
    variables = [value.astype(peers.BFLOAT16) for value in problem.start]
    opt = from_keras3(tmp_path / "model.weights.h5", variables, optimizer.get_config())
    velocity = optimizer.variables[2].value.float().numpy()
    assert opt.get_slot(variables[0], "rms").numpy().tolist() == velocity.tolist()

    to_keras3(opt, variables, tmp_path / "model.weights.h5")
    again = from_keras3(tmp_path / "model.weights.h5", variables, optimizer.get_config())
    assert [w.tolist() for w in again.get_weights()] == [w.tolist() for w in opt.get_weights()]


def test_export_changes_nothing_but_the_optimizer(tmp_path: Path):
    path = tmp_path / "model.weights.h5"
    problem = peers.Problem(np.float32, 3, SHAPES)
    theirs = trained(problem, 2, learning_rate=0.5)
    theirs.model.save_weights(path)
    size = path.stat().st_size
    before = contents(path)
    variables = theirs.values()
    opt = from_keras3(path, variables, theirs.optimizer.get_config())
    opt.apply_gradients(list(zip(problem.grads[2], variables)))
    to_keras3(opt, variables, path)
    after = contents(path)
    assert path.stat().st_size == size
    assert after.keys() == before.keys()
    assert {name for name, value in before.items() if after[name] != value} == {
        f"optimizer/vars/{i}" for i in (0, 2, 3, 4, 5)
    }


def contents(path: Path) -> dict[str, Any]:
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: getattr(item, "dtype", None) and item[()].tolist()}))
    return found


def test_file_without_optimizer(tmp_path: Path):
    theirs = trained(peers.Problem(np.float32, 1, SHAPES), 1)
    config = theirs.optimizer.get_config()
    theirs.model.optimizer = None
    theirs.model.save_weights(tmp_path / "model.weights.h5")
    theirs.model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="holds no state of an optimizer"):
        from_keras3(tmp_path / "model.weights.h5", theirs.values(), config)
    with pytest.raises(ValueError, match=r"holds no state of an optimizer|not compiled with an optimizer"):
        from_keras3(tmp_path / "model.keras", theirs.values())


def test_optimizer_that_was_not_built(tmp_path: Path):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.RMSprop(0.5), loss="mse")
    model.save_weights(tmp_path / "model.weights.h5")
    variables = [np.ones((3, 2), np.float32), np.ones(2, np.float32)]
    with pytest.raises(ValueError, match="expected rms of 2 variables, 2 arrays; got 0"):
        from_keras3(tmp_path / "model.weights.h5", variables, model.optimizer.get_config())


def test_another_optimizer_in_an_archive(tmp_path: Path):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.5), loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="config of an RMSprop; got one of Adam"):
        from_keras3(tmp_path / "model.keras", [np.ones((3, 2)), np.ones(2)])


def test_settings_that_keras_does_not_have(tmp_path: Path):
    for options, message in (
        ({"eps_in_sqrt": False}, "eps_in_sqrt is False here, True there"),
        ({"momentum": 0.5, "nesterov": True}, "nesterov is True here, False there"),
        ({"decay": 0.5}, "no decay"),
    ):
        with pytest.raises(ValueError, match=message):
            to_keras3(RMSprop(**options), [], tmp_path / "model.weights.h5")
    assert not list(tmp_path.iterdir())
