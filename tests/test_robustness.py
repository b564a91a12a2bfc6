"""What goes wrong around a step, and what a step leaves behind: failures, memory, changes between steps."""

import copy
import gc
import threading
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest

from gpurms import GradientTape, IndexedSlices, RMSprop, Variable
from gpurms.kernels import cpu, pool
from gpurms.kernels.numpy import BLOCK
from tests.support import assert_same_bits, unchanged

F32 = np.float32


class Broken(Exception):
    """Planted."""


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["plan", "square_sums", "full"])
def test_a_failure_before_the_update_changes_nothing(stage, monkeypatch, numpy_engine):
    opt, seen, new = RMSprop(clipnorm=1.0), Variable(np.ones(3, F32)), Variable(np.ones(2, F32))
    opt.apply_gradients([(np.ones(3, F32), seen)])
    opt.momentum = 0.5

    def fail(*args):
        raise Broken

    backend = type(opt._slots.find(seen).backend)
    monkeypatch.setattr(backend, stage, fail)
    pairs = [(np.ones(3, F32), seen), (np.ones(2, F32), new)]
    with unchanged(opt, seen, new), pytest.raises(Broken):
        opt.apply_gradients(pairs)
    monkeypatch.undo()
    expected = copy.deepcopy((opt, seen, new))
    opt.apply_gradients(pairs)
    expected[0].apply_gradients([(np.ones(3, F32), expected[1]), (np.ones(2, F32), expected[2])])
    for found, wanted in zip((seen, new, *opt.weights), (*expected[1:], *expected[0].weights), strict=True):
        assert_same_bits(found, wanted)


def test_a_failed_step_leaves_no_slot_behind(cpu_engine):
    opt, v = RMSprop(0.1), Variable(np.ones(3, F32))
    opt.apply_gradients([(np.ones(3, F32), v)])
    opt.momentum = 0.5
    opt.iterations.value.flags.writeable = False
    with unchanged(opt, v), pytest.raises(TypeError, match="iterations"):
        opt.apply_gradients([(np.ones(3, F32), v)])
    opt.iterations.value.flags.writeable = True
    opt.momentum, opt.epsilon = 0.0, 0.0
    opt.apply_gradients([(np.full(3, np.inf, F32), v)])
    assert opt.get_slot_names() == ["rms"]


def test_set_weights_checks_all_before_it_writes(numpy_engine):
    opt, v = RMSprop(momentum=0.5), Variable(np.ones(3, F32), name="w")
    opt.apply_gradients([(np.ones(3, F32), v)])
    opt.get_slot(v, "momentum").value.flags.writeable = False
    with unchanged(opt, v), pytest.raises(TypeError, match="w/momentum"):
        opt.set_weights([weight + 1 for weight in opt.get_weights()])


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.dtype(ml_dtypes.bfloat16).newbyteorder(">"), np.longdouble])
def test_foreign_number_formats_are_refused(dtype, numpy_engine):
    x = np.ones(3, dtype)
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        RMSprop().apply_gradients([(x, x)])


@pytest.mark.parametrize("dtype", [">i4", ">i8", "u4", "i2"])
def test_foreign_indices_are_refused(dtype, numpy_engine):
    opt, table = RMSprop(), Variable(np.ones((3, 2), F32))
    rows = IndexedSlices(np.ones((4, 2), F32), np.array([2, 0, 2, 1], dtype))
    with unchanged(opt, table), pytest.raises(TypeError, match="int32 or int64"):
        opt.apply_gradients([(rows, table)])


def test_overflow_in_a_conversion_is_silent(cpu_engine):
    table = Variable(np.ones((3, 2), np.float16))
    values = np.full((2, 4), 1e300)[:, ::2]
    RMSprop().apply_gradients([(IndexedSlices(values, np.array([0, 2])), table)])
    RMSprop().apply_gradients([(np.full((3, 2), 1e300), table)])


def test_warning_names_the_callers_line(numpy_engine):
    v, other = Variable(1.0), Variable(1.0)
    for call in (
        lambda: RMSprop().minimize(lambda: v.value**2, [v, other]),
        lambda: RMSprop().apply_gradients([(np.ones((), F32), v), (None, other)]),
    ):
        with pytest.warns(UserWarning, match="Gradients do not exist") as caught:
            call()
        assert caught[0].filename == __file__


# --- the thread pool ----------------------------------------------------------------------------------------------


def test_a_failing_unit_is_raised_after_the_units_begun_have_ended(monkeypatch):
    monkeypatch.setattr(pool, "n_threads", lambda: 2)
    monkeypatch.setattr(pool, "_pool", None)
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    caller = threading.get_ident()

    def work(unit: int) -> None:
        if threading.get_ident() == caller:
            assert begun.wait(10)
            threading.Timer(0.05, may_end.set).start()
            raise Broken
        begun.set()
        assert may_end.wait(10)
        ended.set()

    with pytest.raises(Broken):
        pool.run(work, range(2))
    assert ended.is_set()


def test_a_thread_that_cannot_start_leaves_the_work_to_the_others(monkeypatch):
    monkeypatch.setattr(pool, "n_threads", lambda: 4)
    monkeypatch.setattr(pool, "_pool", None)
    start, started = threading.Thread.start, []

    def second_fails(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    done: list[int] = []
    pool.run(done.append, range(50))
    assert sorted(done) == list(range(50))


# --- changes between steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, F32])
def test_the_engine_may_change_between_steps(dtype):
    def steps(*engines: str) -> Variable:
        opt, v = RMSprop(0.1, momentum=0.5), Variable(np.arange(1, 6, dtype=dtype))
        for i, name in enumerate(engines):
            with cpu.use_engine(name):
                opt.apply_gradients([(np.full(5, i + 1, dtype), v)])
                opt.apply_gradients([(IndexedSlices(np.ones(2, dtype), np.array([1, 3])), v)])
        return v

    assert_same_bits(steps("numba", "numpy", "numba"), steps("numpy", "numpy", "numpy"))


def test_slots_of_different_types(cpu_engine):
    def steps(second: str) -> Variable:
        opt, v = RMSprop(0.1, slot_dtype="float32"), Variable(np.arange(1, 6, dtype=F32))
        opt.apply_gradients([(np.ones(5, F32), v)])
        opt.momentum, opt.slot_dtype = 0.5, second
        for _ in range(3):
            opt.apply_gradients([(np.ones(5, F32), v)])
        assert opt.get_slot(v, "momentum").dtype == second
        return v

    np.testing.assert_allclose(steps("float64"), steps("float32"), rtol=1e-6)
    np.testing.assert_allclose(steps("float16"), steps("float32"), rtol=1e-3)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_views_find_their_slots_in_a_copied_buffer(copier, numpy_engine):
    import pickle

    flat = np.arange(12, dtype=F32)
    opt = RMSprop(0.1, momentum=0.5)
    opt.apply_gradients([(np.ones(5, F32), flat[2:7]), (np.ones(3, F32), flat[1::4])])
    pair = (opt, flat)
    twin, twin_flat = copy.deepcopy(pair) if copier == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for optimizer, buffer in ((opt, flat), (twin, twin_flat)):
        optimizer.apply_gradients([(np.ones(5, F32), buffer[2:7]), (np.ones(3, F32), buffer[1::4])])
        assert len(optimizer.weights) == 5
    assert_same_bits(twin_flat, flat)


# --- what a step leaves behind -------------------------------------------------------------------------------


def test_gradients_are_let_go(cpu_engine):
    class Gradient(np.ndarray):
        """Can be referenced weakly."""

    opt, v, table = RMSprop(clipnorm=1.0), Variable(np.ones(3, F32)), Variable(np.ones((3, 2), F32))
    grad, values = np.ones(3, F32).view(Gradient), np.ones((1, 2), F32).view(Gradient)
    opt.apply_gradients([(grad, v), (IndexedSlices(values, np.array([1])), table)])
    alive = [weakref.ref(grad), weakref.ref(values)]
    del grad, values
    gc.collect()
    assert [each() for each in alive] == [None, None]


def traced(step) -> int:
    """Peak bytes that a step allocates on top of what is there."""
    step()
    gc.collect()
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [{}, {"clipnorm": 1.0, "clipvalue": 0.5, "centered": True, "momentum": 0.5}])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "float16"])
def test_a_dense_step_allocates_blocks(layout, options, cpu_engine):
    n = 1 << 22
    dtype = np.float16 if layout == "float16" else F32
    x = np.ones(2 * n, dtype)[::2] if layout == "strided" else np.ones(n, dtype)
    opt, grad = RMSprop(**options), np.ones(n, dtype)
    block = 8 * BLOCK  # float64 at most
    assert traced(lambda: opt.apply_gradients([(grad, x)])) < 8 * block * pool.n_threads() < 4 * n


def test_a_sparse_step_allocates_for_its_ids(cpu_engine):
    ids = np.arange(0, 50_000, 50)
    rows = IndexedSlices(np.ones((ids.size, 16), F32), ids)
    table = np.zeros((1_000_000, 16), F32)
    opt = RMSprop(momentum=0.5)
    given = rows.values.nbytes + ids.nbytes
    assert traced(lambda: opt.apply_gradients([(rows, table)])) < 8 * given < table.nbytes / 100


def test_get_updates_takes_a_callable_list(numpy_engine):
    v = Variable(10.0)
    assert RMSprop(0.1).get_updates(lambda: v.value**2 / 2, lambda: [v]) == [1]
    with GradientTape():  # the outer tape does not see the step
        assert RMSprop(0.1).get_updates(lambda: v.value**2 / 2, [v]) == [1]
