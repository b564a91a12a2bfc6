"""Arrays of several libraries and devices under one optimizer, and devices that are missing, full or asked wrongly."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gpurms
from gpurms import IndexedSlices, RMSprop, Variable
from tests import engines
from tests.cases import RULES
from tests.engines import Engine
from tests.support import assert_same_bits, full_rmsprop, host, unchanged

F32 = np.float32
pytestmark = pytest.mark.usefixtures("numpy_engine")


@pytest.fixture
def machine() -> Iterator[Any]:
    """An emulated machine of two devices."""
    with engines.emulated(2) as machine:
        yield machine


@pytest.fixture
def cupy(machine: Any) -> ModuleType:
    """CuPy on that machine."""
    import cupy

    return cupy


def slices(rows: Any, n_columns: int = 2, seed: int = 0) -> IndexedSlices:
    indices = np.array(rows, np.int64)
    return IndexedSlices(np.random.default_rng(seed).standard_normal((indices.size, n_columns)).astype(F32), indices)


# --- two libraries in a pair --------------------------------------------------------------------------------

MIXED: dict[str, Callable[[Engine, np.ndarray, IndexedSlices], tuple[Any, Any]]] = {
    "NumPy gradient": lambda device, x, rows: (x, device.variable(x)),
    "CuPy gradient": lambda device, x, rows: (device.put(x), Variable(x)),
    "NumPy Variable as gradient": lambda device, x, rows: (Variable(x), device.variable(x)),
    "NumPy values": lambda device, x, rows: (rows, device.variable(x)),
    "CuPy values": lambda device, x, rows: (device.put(rows), Variable(x)),
    "NumPy indices": lambda device, x, rows: (
        IndexedSlices(device.put(rows.values), rows.indices),
        device.variable(x),
    ),
    "CuPy indices": lambda device, x, rows: (IndexedSlices(rows.values, device.put(rows.indices)), Variable(x)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_mixing_libraries_in_a_pair_is_refused(kind: str, device: Engine):
    opt, other = full_rmsprop(), device.variable(np.ones((3, 2), F32))
    grad, var = MIXED[kind](device, np.ones((3, 2), F32), slices([0, 1]))
    if "indices" in kind:
        message = f"expected indices as a {'NumPy' if kind == 'CuPy indices' else 'CuPy'} array"
    else:
        message = "(?s)(NumPy.*CuPy|CuPy.*NumPy)"
    with unchanged(opt, var, other), pytest.raises(TypeError, match=message):
        opt.apply_gradients([(device.put(np.ones((3, 2), F32)), other), (grad, var)])


def test_a_numpy_scalar_is_no_gradient_of_a_cupy_variable(device: Engine):
    opt, var = RMSprop(), device.variable(np.array(1, F32), "scalar")
    with unchanged(opt, var), pytest.raises(TypeError, match=r"(?s)scalar.*CuPy array.*float32"):
        opt.apply_gradients([(F32(1), var)])


# --- several devices ----------------------------------------------------------------------------------------


def on(cupy: Any, place: int | None, x: Any) -> Any:
    """An array on a device, or for None on the host."""
    if place is None:
        return x
    with cupy.cuda.Device(place):
        return Engine("cuda-on-cpu", cupy).put(x)


def test_two_devices_in_a_pair(cupy: Any):
    opt, var = full_rmsprop(), Variable(on(cupy, 0, np.ones((3, 2), F32)), name="table")
    there = on(cupy, 1, slices([0, 1]))
    here = on(cupy, 0, slices([0, 1]))
    bad = [
        on(cupy, 1, np.ones((3, 2), F32)),
        there,
        IndexedSlices(here.values, there.indices),
        IndexedSlices(there.values, here.indices),
    ]
    for grad in bad:
        with unchanged(opt, var), pytest.raises(ValueError, match=r"table.*GPU 0.*GPU 1"):
            opt.apply_gradients([(here, var), (grad, var)])


PLACES = {"two devices": [0, 1, 1, 0], "the host too": [None, 1, 0, None, 1], "another device": [1, 1]}


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("rule", ["momentum", "clipnorm", "global-clipnorm", "everything"])
@pytest.mark.parametrize("places", PLACES)
def test_one_optimizer_over_several_places(places: str, rule: str, current: int, machine: Any, cupy: Any):
    rng = np.random.default_rng(0)
    opt, all_on_host = RMSprop(**RULES[rule]), RMSprop(**RULES[rule])
    starts = [rng.standard_normal((5, 2)).astype(F32) for _ in PLACES[places]]
    variables = [Variable(on(cupy, place, x)) for place, x in zip(PLACES[places], starts)]
    expected = [Variable(x.copy()) for x in starts]
    with cupy.cuda.Device(current):
        for step in range(3):
            grads = [
                slices(rng.integers(0, 5, 4), seed=step) if i == step else rng.standard_normal((5, 2)).astype(F32)
                for i in range(len(starts))
            ]
            placed = [on(cupy, place, grad) for place, grad in zip(PLACES[places], grads)]
            opt.apply_gradients(zip(placed, variables))
            all_on_host.apply_gradients(zip(grads, expected))
            assert cupy.cuda.runtime.getDevice() == current
        for found, wanted, place in zip(variables, expected, PLACES[places]):
            assert_same_bits(found, wanted)
            for name in opt.get_slot_names():
                slot = opt.get_slot(found, name)
                assert_same_bits(slot, all_on_host.get_slot(wanted, name))
                assert place is None or slot.value.device.id == place
        opt.set_weights(opt.get_weights())
        assert cupy.cuda.runtime.getDevice() == current
    assert {launch.device for launch in machine.launches} == set(PLACES[places]) - {None}


def test_work_goes_to_the_current_stream_of_each_device(cupy: Any):
    variables = [on(cupy, place, np.ones(3, F32)) for place in (0, 1)]
    grads = [on(cupy, place, np.ones(3, F32)) for place in (0, 1)]
    streams = []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            streams.append(cupy.cuda.Stream(non_blocking=True))
    opt = RMSprop(clipnorm=1.0)
    opt.apply_gradients(zip(grads, variables))
    before = [stream.queue.last for stream in streams]
    with cupy.cuda.Device(1), streams[1]:
        opt.apply_gradients(zip(grads, variables))
    assert [stream.queue.last is last for stream, last in zip(streams, before)] == [True, False]


# --- a device that is full, or not there --------------------------------------------------------------------


@pytest.mark.parametrize("slot_number", [1, 2, 3])
@pytest.mark.parametrize("stepped", [False, True], ids=["first", "third"])
def test_out_of_memory_when_slots_are_made(slot_number: int, stepped: bool, machine: Any, cupy: Any):
    opt, expected_opt = full_rmsprop(), full_rmsprop()
    known, new = on(cupy, 0, np.ones(1000, F32)), on(cupy, 0, np.ones(1000, F32))
    grad, expected = on(cupy, 0, np.full(1000, 2, F32)), [np.ones(1000, F32), np.ones(1000, F32)]
    for _ in range(2 if stepped else 0):
        opt.apply_gradients([(grad, known)])
        expected_opt.apply_gradients([(np.full(1000, 2, F32), expected[0])])
    used = machine.heap.used[0]
    machine.heap.limit = used + 4000 * slot_number - 1
    with unchanged(opt, known, new), pytest.raises(MemoryError, match=r"Out of memory allocating 4,000 bytes"):
        opt.apply_gradients([(grad, known), (grad, new)])
    assert machine.heap.used[0] == used
    machine.heap.limit = None
    opt.apply_gradients([(grad, known), (grad, new)])
    expected_opt.apply_gradients([(np.full(1000, 2, F32), x) for x in expected])
    for found, wanted in zip((known, new), expected):
        assert_same_bits(found, wanted)


def test_out_of_memory_for_the_work_of_a_sparse_step(machine: Any, cupy: Any):
    opt, expected_opt = full_rmsprop(), full_rmsprop()
    table, expected = on(cupy, 0, np.ones((9, 2), F32)), np.ones((9, 2), F32)
    rows = np.random.default_rng(0).integers(0, 9, 5000)
    opt.apply_gradients([(on(cupy, 0, slices([1])), table)])
    expected_opt.apply_gradients([(slices([1]), expected)])
    grad = on(cupy, 0, slices(rows))
    machine.heap.limit = machine.heap.used[0] + 10_000
    with unchanged(opt, table), pytest.raises(MemoryError, match="Out of memory"):
        opt.apply_gradients([(grad, table)])
    machine.heap.limit = None
    opt.apply_gradients([(grad, table)])
    expected_opt.apply_gradients([(slices(rows), expected)])
    assert_same_bits(table, expected)


def test_cupy_arrays_without_a_driver(cupy: Any):
    on_device, on_host, opt = cupy.ones(3, F32), np.ones(3, F32), RMSprop()
    with mock.patch.object(cupy.cuda, "is_available", return_value=False):
        for pair in ((on_device, on_device), (on_device, on_host)):
            with pytest.raises(RuntimeError, match=r"CuPy array.*no CUDA device or driver answers"):
                opt.apply_gradients([(np.ones(3, F32), on_host), pair])
        with pytest.raises(RuntimeError, match="no CUDA device or driver answers"):
            Variable(on_device)
    assert on_host.tolist() == [1.0] * 3
    assert opt.get_slot_names() == []
    opt.apply_gradients([(on_device, on_device)])
    assert gpurms.array_module() is cupy


# --- rows that are not there --------------------------------------------------------------------------------


def outside(n_rows: int) -> list[int]:
    """Row numbers out of range, of which many look like good ones in their lower bits."""
    wrapped = [sign * 2**k + row for sign in (1, -1) for k in (8, 16, 31, 32, 40, 62) for row in (0, n_rows - 1)]
    return [n_rows, -1, -n_rows, 2 * n_rows, 2**63 - 1, -(2**63), *(i for i in wrapped if not 0 <= i < n_rows)]


@pytest.mark.parametrize("n_columns", [1, 36, 37])
@pytest.mark.parametrize("n_ids", [40, 5000])
@pytest.mark.parametrize("n_rows", [1, 255, 256, 65_536])
def test_rows_out_of_range_are_ignored_if_nobody_checks(n_rows: int, n_ids: int, n_columns: int, device: Engine):
    rng = np.random.default_rng(n_rows)
    bad = rng.choice(outside(n_rows), n_ids)
    good = np.minimum(rng.integers(0, n_rows, n_ids), rng.integers(0, 4, n_ids) * n_rows)  # a row of many
    rows = slices(np.where(rng.random(n_ids) < 0.4, bad, good), n_columns)
    start = rng.standard_normal((n_rows, n_columns)).astype(F32)
    table, expected = device.variable(start), Variable(start.copy())
    opt, expected_opt = full_rmsprop(check_indices=False), full_rmsprop()
    for dtype in (np.int64, np.int32):
        inside = (rows.indices >= 0) & (rows.indices < n_rows)
        if dtype == np.int32:
            indices = np.where(inside, rows.indices, np.maximum(rows.indices, -(2**31)) % 2**31 - 2**31)
        else:
            indices = rows.indices
        opt.apply_gradients([(device.put(IndexedSlices(rows.values, indices.astype(dtype))), table)])
        expected_opt.apply_gradients([(IndexedSlices(rows.values[inside], rows.indices[inside]), expected)])
    for found, wanted in zip([table, *opt.weights], [expected, *expected_opt.weights], strict=True):
        assert_same_bits(found, wanted)


# --- findings of reviews --------------------------------------------------------------------------------------------


def test_a_constraint_runs_on_the_device_of_its_variable():
    with engines.emulated(n_devices=2) as machine:
        import cupy

        with cupy.cuda.Device(1):
            w = gpurms.Variable(cupy.ones(3, np.float32), constraint=lambda x: x * 0)
            grad = cupy.ones(3, np.float32)
        gpurms.RMSprop().apply_gradients([(grad, w)])
        assert not w.numpy().any()
        assert {launch.device for launch in machine.launches[-2:]} == {1}


def test_a_strided_kernel_that_does_not_compile_changes_nothing(monkeypatch):
    from gpurms.kernels import cuda

    with engines.emulated():
        import cupy

        plain, strided = cupy.ones(3, np.float32), cupy.ones((4, 4), np.float32)[::2, ::2]

        def broken(*arguments):
            raise RuntimeError("planted: no headers")

        monkeypatch.setattr(cuda, "elementwise", lambda *arguments: broken)
        opt = gpurms.RMSprop()
        with pytest.raises(RuntimeError, match="planted"):
            opt.apply_gradients([(plain * 1, plain), (strided * 1, strided)])
        assert (plain.get() == 1).all()
        assert (strided.get() == 1).all()
        assert opt.weights == []


def test_a_gradient_that_another_library_exports_from_a_variable():
    with engines.emulated():
        import cupy

        a, b = cupy.arange(1000, dtype=np.float32), cupy.ones(1000, np.float32)
        memory = cupy.cuda.UnownedMemory(a.data.ptr, a.nbytes, a, 0)
        exported = cupy.ndarray(a.shape, a.dtype, cupy.cuda.MemoryPointer(memory, 0))
        values = a.get()
        expected = [values.copy(), np.ones(1000, np.float32)]
        opt, expected_opt = gpurms.RMSprop(), gpurms.RMSprop()
        for _ in range(2):
            opt.apply_gradients([(b * 2, a), (exported, b)])
            expected_opt.apply_gradients([(expected[1] * 2, expected[0]), (expected[0].copy(), expected[1])])
        assert a.get().tobytes() == expected[0].tobytes()
        assert b.get().tobytes() == expected[1].tobytes()


def test_slots_of_different_types(library):
    rng = np.random.default_rng(0)
    opt, expected = gpurms.RMSprop(slot_dtype="float32"), gpurms.RMSprop(slot_dtype="float32")
    starts = [rng.standard_normal(600).astype(np.float32), rng.standard_normal((40, 12)).astype(np.float32)]
    arrays = [library.put(x.copy()) for x in starts]
    for changes in ({}, {"slot_dtype": "float64", "momentum": 0.9}, {"slot_dtype": "float16", "centered": True}, {}):
        grad, values = rng.standard_normal(600).astype(np.float32), rng.standard_normal((90, 12)).astype(np.float32)
        rows = gpurms.IndexedSlices(values, rng.integers(0, 40, 90))
        for each, pairs in (
            (opt, [*zip(map(library.put, (grad, rows)), arrays)]),
            (expected, [*zip((grad, rows), starts)]),
        ):
            for name, value in changes.items():
                setattr(each, name, value)
            each.apply_gradients(pairs)
    for found, wanted in zip([*arrays, *opt.weights], [*starts, *expected.weights], strict=True):
        assert_same_bits(host(found), host(wanted))
