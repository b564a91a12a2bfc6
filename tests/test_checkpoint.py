"""`save` and `load`: a loaded run goes on as the saved one, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, safetensors_file
from gpurms.schedules import CosineDecay, ExponentialDecay, LearningRateSchedule
from tests.cases import LAYOUTS, RULES
from tests.checkpoint_support import Run, assert_same_runs, assert_same_state, like, small
from tests.engines import Engine
from tests.support import DTYPES, OPTIONS, assert_same_bits, step

pytestmark = pytest.mark.usefixtures("numpy_engine")
HOST = Engine("numpy", np)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def goes_on(run: Run, other: Run, path: Path) -> None:
    """Take `run` to a checkpoint and `other` from there, then both two steps further."""
    run.steps(0, 3).opt.save(path, run.variables)
    loaded = other.opt.load(path, other.variables)
    assert all(x is y for x, y in zip(loaded, other.variables, strict=True))
    assert_same_runs(run, other)
    assert_same_runs(run.steps(3, 5), other.steps(3, 5))


# --- the run goes on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, path: Path):
    goes_on(Run(HOST, RMSprop(0.1, **RULES[rule])), Run(HOST, RMSprop(), seed=1), path)


@pytest.mark.parametrize("slot_dtype", [None, "float16", "bfloat16", "float32", "float64"])
def test_types_of_slots(slot_dtype: str | None, path: Path):
    options = {"slot_dtype": slot_dtype, "momentum": 0.5, "centered": True}
    goes_on(Run(HOST, RMSprop(0.1, **options)), Run(HOST, RMSprop(), seed=1), path)


def test_libraries(library: Engine, path: Path):
    goes_on(Run(library, RMSprop(0.1, **RULES["everything"])), Run(library, RMSprop(), seed=1), path)


def test_from_the_host_to_a_device(device: Engine, path: Path):
    goes_on(Run(HOST, RMSprop(0.1, **RULES["everything"])), Run(device, RMSprop(), seed=1), path)


def test_from_a_device_to_the_host(device: Engine, path: Path):
    goes_on(Run(device, RMSprop(0.1, **RULES["everything"])), Run(HOST, RMSprop(), seed=1), path)


def test_back_to_the_checkpoint(library: Engine, path: Path):
    """The optimizer that saved loads again: in place, although it has met more since."""
    run = Run(library, RMSprop(0.1, momentum=0.5)).steps(0, 2)
    run.opt.save(path, run.variables)
    weights, before = run.opt.weights, list(run.opt.weights)
    twin = Run(library, RMSprop(), seed=1)
    run.opt.centered, run.opt.rho, run.opt.clipnorm = True, 0.3, 1.0
    run.steps(2, 4).opt.load(path, run.variables)
    twin.opt.load(path, twin.variables)
    assert_same_runs(twin, run)
    assert run.opt.weights is weights
    assert all(x is y for x, y in zip(weights, before, strict=True))
    assert_same_runs(twin.steps(2, 4), run.steps(2, 4))


def test_a_load_ends_the_short_cut_of_repeated_calls(device: Engine, path: Path):
    """Slots are replaced, so that where the call before has found them is no use."""
    saved, var, grad = RMSprop(0.1, slot_dtype="float32"), device.put(np.ones(4)), device.put(np.arange(4.0))
    saved.apply_gradients([(grad, var)])
    saved.save(path)
    saved.apply_gradients([(grad, var)])
    other, twin = RMSprop(0.3), device.put(np.zeros(4))
    for _ in range(2):
        other.apply_gradients([(grad, twin)])
    other.load(path)
    other.apply_gradients([(grad, twin)])
    assert_same_state(saved, [var], other, [twin])


# --- arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [8, 24, 100, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, block: int, library: Engine, path: Path, monkeypatch: pytest.MonkeyPatch):
    """Any layout is read into any other, in blocks of an item, a row, and more."""
    monkeypatch.setattr(safetensors_file, "BLOCK", block)
    values = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
    RMSprop().save(path, [library.put(LAYOUTS[layout](values))])
    for other in LAYOUTS:
        var = library.put(LAYOUTS[other](np.zeros_like(values)))
        RMSprop().load(path, [var])
        assert_same_bits(var, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern(dtype: np.dtype, library: Engine, path: Path):
    """Payloads of NaN, subnormals and the sign of zero, contiguous or not."""
    bits = np.random.default_rng(0).integers(0, 256, (512, dtype.itemsize), np.uint8).view(dtype).ravel()
    bits[:3] = [np.nan, -0.0, np.inf]
    var, rows = library.put(bits), library.put(LAYOUTS["strided"](bits))
    opt = RMSprop()
    slot = opt.add_slot(var, "rms", bits) if dtype.itemsize > 2 else None
    opt.save(path, [var, rows])
    twin, others = RMSprop(), [library.put(np.zeros_like(bits)), library.put(LAYOUTS["strided"](np.zeros_like(bits)))]
    twin.load(path, others)
    assert_same_bits(others[0], bits)
    assert_same_bits(others[1], bits)
    if slot is not None:
        assert_same_bits(twin.get_slot(others[0], "rms"), slot)


def test_memory_maps(tmp_path: Path, path: Path):
    table = np.memmap(tmp_path / "table", np.float32, "w+", shape=(100, 3))
    table[:] = np.arange(300).reshape(100, 3)
    opt = RMSprop()
    step(opt, table)
    opt.save(path)
    wanted = np.array(table)
    table[:] = 0
    assert opt.load(path)[0] is table
    assert_same_bits(np.asarray(table), wanted)


# --- settings -----------------------------------------------------------------------------------------------


class Halving(LearningRateSchedule):
    """A user's schedule."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: Any) -> float:
        return self.start / 2 ** int(step)

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}


def test_all_settings(path: Path):
    opt = RMSprop(0.5, rho=0.25, momentum=0.125, epsilon=0.0, decay=0.1, clipvalue=2.0, name="mine", **OPTIONS)
    opt.save(path)
    other = RMSprop()
    other.load(path)
    assert other.get_config() == opt.get_config()


def test_settings_of_the_file_are_all_settings(path: Path):
    RMSprop().save(path)
    other = RMSprop(0.5, global_clipnorm=1.0, name="other", **OPTIONS)
    other.load(path)
    assert other.get_config() == RMSprop().get_config()


def test_one_limit_of_norms_replaces_the_other(path: Path):
    RMSprop(clipnorm=2.0).save(path)
    other = RMSprop(global_clipnorm=1.0)
    other.load(path)
    assert (other.clipnorm, other.global_clipnorm) == (2.0, None)


def test_the_aggregator_stays(path: Path):
    RMSprop(gradient_aggregator=list).save(path)
    plain, other = RMSprop(), RMSprop(gradient_aggregator=reversed)
    plain.load(path)
    other.load(path)
    assert plain.gradient_aggregator is None
    assert other.gradient_aggregator is reversed


@pytest.mark.parametrize("schedule", [ExponentialDecay(0.1, 2, 0.5), CosineDecay(0.1, 4)], ids=repr)
def test_schedules(schedule: LearningRateSchedule, path: Path):
    goes_on(Run(HOST, RMSprop(schedule, decay=0.1)), Run(HOST, RMSprop(), seed=1), path)


def test_own_schedule(path: Path):
    run, other = Run(HOST, RMSprop(Halving(0.5))).steps(0, 2), Run(HOST, RMSprop(), seed=1)
    run.opt.save(path, run.variables)
    other.opt.load(path, other.variables, custom_objects={"Halving": Halving})
    assert_same_runs(run.steps(2, 4), other.steps(2, 4))


def test_callables_stay_those_of_the_receiver(path: Path):
    def optimizer() -> tuple[RMSprop, dict[str, Any]]:
        now = {"learning_rate": 0.1, "rho": 0.9, "momentum": 0.5, "epsilon": 1e-3, "decay": 0.1}
        return RMSprop(**{name: lambda name=name: now[name] for name in now}), now

    (opt, now), (other_opt, other_now) = optimizer(), optimizer()
    run, other = Run(HOST, opt).steps(0, 2), Run(HOST, other_opt, seed=1)
    opt.save(path, run.variables)
    other_opt.load(path, other.variables)
    now |= {"learning_rate": 0.3, "rho": 0.7, "momentum": 0.1, "epsilon": 1e-2, "decay": 0.2}
    other_now |= now
    assert_same_runs(run.steps(2, 4), other.steps(2, 4))


def test_callables_without_a_callable_to_go_on_with(path: Path):
    """Their last values do, and a callable momentum's slot exists even at 0."""
    run = Run(HOST, RMSprop(lambda: 0.1, momentum=lambda: 0.0))
    goes_on(run, Run(HOST, RMSprop(0.5), seed=1), path)


def test_numbers_replace_callables_and_schedules(path: Path):
    RMSprop(0.25, rho=0.5).save(path)
    other = RMSprop(ExponentialDecay(0.1, 2, 0.5), rho=lambda: 0.1)
    other.load(path)
    assert (other.learning_rate, other.rho) == (0.25, 0.5)


def test_a_schedule_replaces_a_callable(path: Path):
    RMSprop(CosineDecay(0.1, 4)).save(path)
    other = RMSprop(lambda: 0.1)
    other.load(path)
    assert other.learning_rate == CosineDecay(0.1, 4)


def test_subclass(path: Path):
    class Mine(RMSprop):
        pass

    opt, variables = small()
    opt.save(path)
    other, others = Mine(), like(variables)
    other.load(path, others)
    assert_same_state(opt, variables, other, others)
