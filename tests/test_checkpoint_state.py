"""What becomes of slots, weights, counter, variables and captured steps when a checkpoint is loaded."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.checkpoint_support import Run, assert_same_runs, assert_same_state, like, owners, small
from tests.engines import Engine
from tests.support import assert_same_bits, step

pytestmark = pytest.mark.usefixtures("numpy_engine")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


# --- slots and weights --------------------------------------------------------------------------------------


def test_order_of_weights(path: Path):
    opt, (a, b, c) = RMSprop(centered=True), (Variable(np.ones(n), "abc"[n]) for n in range(3))
    opt.add_slot(c, "mine/of \u00fc", [1.0, 2.0])
    step(opt, b)
    opt.momentum = 0.5
    step(opt, c, b)
    opt.add_slot(b, "mg 2")
    opt.save(path, [a, b, c])
    other, others = RMSprop(), [Variable(np.zeros(n)) for n in range(3)]
    other.load(path, others)
    assert other.get_slot_names() == ["mine/of \u00fc", "rms", "mg", "momentum", "mg 2"]
    assert owners(other, others)[0] == (2, "mine/of \u00fc")
    assert_same_state(opt, [a, b, c], other, others)
    for each, vs in ((opt, (a, b, c)), (other, others)):
        step(each, *vs)
    assert_same_state(opt, [a, b, c], other, others)


def test_slots_of_the_receiver_that_fit_are_kept(path: Path):
    opt, variables = small()
    opt.save(path)
    other, others = RMSprop(centered=True), like(variables)
    step(other, *others)
    live, (counter, *slots) = other.weights, other.weights
    other.load(path, others)
    assert other.weights is live is other.variables()
    assert other.iterations is counter is live[0]
    for slot, var, name in zip(slots, [*others, *others], ["rms", "rms", "mg", "mg"]):
        assert other.get_slot(var, name) is slot
    assert_same_state(opt, variables, other, others)


@pytest.mark.parametrize("options", [{"slot_dtype": "float16"}, {"momentum": 0.5, "centered": True}], ids=str)
def test_slots_of_the_receiver_that_do_not_fit_are_gone(options: dict[str, Any], path: Path):
    opt, variables = small(momentum=0.0, centered=False)
    opt.save(path)
    other, others = RMSprop(**options), like(variables)
    step(other, *others)
    other.load(path, others)
    assert_same_state(opt, variables, other, others)
    step(opt, *variables)
    step(other, *others)
    assert_same_state(opt, variables, other, others)


def test_zeros_of_the_file_overwrite_a_slot(path: Path):
    """Whole pages of them, which a new slot would not need."""
    opt, var = RMSprop(), np.zeros(5000)
    slot = opt.add_slot(var, "rms")
    slot.assign(np.r_[np.zeros(4000), np.ones(1000)])
    opt.save(path)
    wanted = slot.numpy()
    slot.assign(np.full(5000, 3.0))
    opt.load(path)
    assert_same_bits(slot, wanted)


def test_replaced_slots_are_not_kept(library: Engine, path: Path):
    opt, var = RMSprop(slot_dtype="float32"), library.put(np.ones(3))
    opt.apply_gradients([(library.put(np.ones(3)), var)])
    RMSprop().save(path, [var])
    old = weakref.ref(opt.get_slot(var, "rms"))
    opt.load(path, [var])
    gc.collect()
    assert old() is None


def test_a_read_only_slot_is_replaced(path: Path):
    opt, variables = small()
    opt.save(path)
    frozen = opt.get_slot(variables[0], "rms")
    frozen.value.flags.writeable = False
    opt.load(path)
    assert opt.get_slot(variables[0], "rms") is not frozen
    step(opt, *variables)


def test_a_variable_without_slots(path: Path):
    (opt, variables), bias = small(), Variable([1.0, 2.0], "bias")
    opt.save(path, [bias, *variables])
    other, others = RMSprop(), [Variable([0.0, 0.0]), *like(variables)]
    other.load(path, others)
    assert_same_state(opt, [bias, *variables], other, others)
    with pytest.raises(KeyError, match="has no slots"):
        other.get_slot(others[0], "rms")


def test_nothing_but_settings(path: Path):
    RMSprop(0.5).save(path)
    other = RMSprop()
    assert other.load(path) == []
    assert (other.learning_rate, other.weights) == (0.5, [])


def test_variables_overlap_as_before(path: Path):
    flat, other_flat = np.arange(6.0), np.zeros(6)
    opt, other = RMSprop(), RMSprop()
    variables, others = ([x, x[:4].reshape(2, 2), x[::2]] for x in (flat, other_flat))
    for var in variables:
        step(opt, var)
    opt.save(path)
    other.load(path, others)
    assert_same_state(opt, variables, other, others)


# --- the counter --------------------------------------------------------------------------------------------


def test_without_a_counter(path: Path):
    opt, var = RMSprop(), Variable([1.0, 2.0])
    slots = [opt.add_slot(var, name, [3.0, 4.0]) for name in ("momentum", "rms")]
    opt.save(path)
    other, twin = RMSprop(), Variable([0.0, 0.0])
    other.load(path, [twin])
    assert other.weights == []
    assert_same_state(opt, [var], other, [twin])
    assert [w.tolist() for w in (other.iterations.numpy(), *other.get_weights()[1:])] == [0, [3, 4], [3, 4]]
    assert other.weights[1:] == [other.get_slot(twin, "momentum"), other.get_slot(twin, "rms")]
    assert opt.weights == []
    assert [opt.get_slot(var, name) for name in ("momentum", "rms")] == slots


def test_without_a_counter_into_one_that_counts(path: Path):
    opt, var = RMSprop(), Variable([1.0, 2.0])
    opt.save(path, [var])
    step(opt, var)
    counter = opt.iterations
    opt.load(path, [var])
    assert opt.weights == [counter]
    assert counter.numpy() == 0


def test_a_counter_of_the_callers(library: Engine, path: Path):
    opt, _ = small()
    opt.iterations.assign(41)
    opt.save(path)
    other, counter = RMSprop(), library.variable(np.array(7))
    other.iterations = counter
    other.load(path)
    assert other.iterations is counter
    assert counter.numpy() == 41


def test_a_counter_beside_the_variables(device: Engine, path: Path):
    opt, var = RMSprop(capturable=True), device.put(np.ones(2))
    opt.apply_gradients([(var.copy(), var)])
    opt.save(path)
    other, twin = RMSprop(), device.put(np.zeros(2))
    other.load(path, [twin])
    assert type(other.iterations.value) is device.xp.ndarray
    assert other.apply_gradients([(var.copy(), twin)]) == 2
    other.load(path)
    assert other.apply_gradients([(var.copy(), twin)]) == 2


# --- which variables ----------------------------------------------------------------------------------------


def test_all_that_the_optimizer_has_met(library: Engine, path: Path):
    run, twin = (Run(library, RMSprop(0.1), seed) for seed in (0, 1))
    run.steps(0, 2).opt.save(path)  # v3 is the last: it was left out of the first step
    met = [*run.variables[:3], *run.variables[4:], run.variables[3]]
    twin.steps(0, 2)
    loaded = twin.opt.load(path)
    assert all(x is y for x, y in zip(loaded, [*twin.variables[:3], *twin.variables[4:], twin.variables[3]]))
    assert_same_state(run.opt, met, twin.opt, loaded)


def test_new_variables(library: Engine, path: Path):
    run = Run(library, RMSprop(0.1, momentum=0.5))
    run.variables[2].trainable = False
    run.steps(0, 2).opt.save(path, run.variables)
    other = Run(library, RMSprop())
    other.variables = other.opt.load(path)
    assert type(other.variables[0]) is library.xp.ndarray
    for var, new in zip(run.variables[1:], other.variables[1:], strict=True):
        assert type(new.value) is library.xp.ndarray
        assert (new.name, new.trainable) == (var.name, var.trainable)
    assert_same_runs(run, other)
    assert_same_runs(run.steps(2, 4), other.steps(2, 4))


def test_any_iterable(path: Path):
    opt, variables = small()
    opt.save(path, {v.name: v for v in variables}.values())
    other, others = RMSprop(), like(variables)
    assert other.load(path, iter(others)) == others
    assert_same_state(opt, variables, other, others)


def test_a_new_view_is_the_variable_it_views(path: Path):
    opt, array = RMSprop(), np.ones((2, 3))
    step(opt, array)
    opt.save(path, [Variable(array[:])])
    array[...] = 0
    assert len(opt.load(path, [array[:]])) == 1
    assert array.all()
    step(opt, array)
    assert len(opt.weights) == 2


def test_a_copy_with_views(path: Path):
    base = np.arange(8.0)
    opt, view = RMSprop(0.1), base[::2]
    step(opt, view)
    twin, twin_view, twin_base = copy.deepcopy((opt, view, base))
    for going_on in (twin_view, twin_base[::2]):
        twin.save(path, [going_on])
        other, var = RMSprop(), np.zeros(4)
        other.load(path, [var])
        assert_same_state(twin, [going_on], other, [var])
    for each in (twin.save, twin.load):
        with pytest.raises(ValueError, match="give the variables"):
            each(path)
        with pytest.raises(ValueError, match="variable 1 was given before"):
            each(path, [twin_view, twin_base[::2]])


# --- captured steps -----------------------------------------------------------------------------------------


def captured(device: Engine) -> tuple[RMSprop, Any, Any, Any]:
    opt = RMSprop(0.1, momentum=0.5, capturable=True)
    var, grad = device.put(np.array([1.0, 2.0])), device.put(np.array([1.0, -3.0]))
    with device.xp.cuda.Stream(non_blocking=True) as stream:
        opt.apply_gradients([(grad, var)])
        stream.begin_capture()
        opt.apply_gradients([(grad, var)])
        return opt, var, grad, (stream.end_capture(), stream)


def test_graphs_go_on_from_the_checkpoint(device: Engine, path: Path):
    opt, var, grad, (graph, stream) = captured(device)
    with stream:
        opt.save(path)
        for _ in range(2):
            opt.load(path)
            for _ in range(3):
                opt.prepare_replay()
                graph.launch(stream)
    other, twin = RMSprop(), np.zeros(2)
    other.load(path, [twin])
    for _ in range(3):
        other.apply_gradients([(grad.get(), twin)])
    assert_same_state(other, [twin], opt, [var])


def test_graphs_refuse_other_slots(device: Engine, path: Path):
    opt, var, _, (_, stream) = captured(device)
    stream.synchronize()
    other, others = RMSprop(0.1, capturable=True), [np.ones(2)]
    step(other, *others)
    other.save(path)
    before = [w.tobytes() for w in (var.get(), *opt.get_weights())], opt.get_config()
    with pytest.raises(RuntimeError, match="load before capturing"):
        opt.load(path)
    assert ([w.tobytes() for w in (var.get(), *opt.get_weights())], opt.get_config()) == before
