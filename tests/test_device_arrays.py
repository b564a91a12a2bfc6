"""Arrays of the emulated device: layout, memory, operations and errors are those of CuPy."""

import copy
import itertools
import pickle
from collections.abc import Iterator

import numpy as np
import pytest

from tests.device_support import CUDARuntimeError, Machine, cupy, cupy_on_cpu, ml_dtypes


@pytest.fixture
def machine() -> Iterator[Machine]:
    with cupy_on_cpu() as machine:
        yield machine


VIEWS = {
    "whole": lambda a: a,
    "slice": lambda a: a[1:],
    "step": lambda a: a[::2],
    "backwards": lambda a: a[::-1],
    "row": lambda a: a[1, ...],
    "ellipsis": lambda a: a[..., :1],
    "new axis": lambda a: a[:, None],
    "transposed": lambda a: a.T,
    "flat": lambda a: a.reshape(-1),
    "ravel": lambda a: a.ravel(),
    "empty": lambda a: a[2:2],
    "chained": lambda a: a[1:][::2].T,
    "swapped": lambda a: a.swapaxes(0, -1),
    "bytes": lambda a: a.view("u1"),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(4,), (4, 6), (3, 4, 5), (4, 0)])
def test_views_have_the_layout_of_numpy(machine: Machine, shape: tuple[int, ...], view: str) -> None:
    ours, theirs = cupy.empty(shape, "f4"), np.empty(shape, "f4")
    got, expected = VIEWS[view](ours), VIEWS[view](theirs)
    assert type(got) is cupy.ndarray
    assert (got.shape, got.dtype, got.size, got.nbytes) == (
        expected.shape,
        expected.dtype,
        expected.size,
        expected.nbytes,
    )
    assert got.flags.c_contiguous == expected.flags.c_contiguous
    assert got.flags.f_contiguous == expected.flags.f_contiguous
    if got.size:
        assert got.strides == expected.strides
        assert got.data.ptr - ours.data.ptr == expected.ctypes.data - theirs.ctypes.data
    if got is not ours:
        assert got.base is ours
        assert not got.flags.owndata


def test_memory_is_aligned_and_new_memory_is_garbage(machine: Machine) -> None:
    arrays = [cupy.empty(n, "f4") for n in (1, 3, 1000)]
    assert all(a.data.ptr % 512 == 0 for a in arrays)
    assert all(np.isnan(a.get()).all() for a in arrays)
    assert machine.allocations == [4, 12, 4000]
    assert cupy.empty((0, 3)).data.ptr == 0
    ends = sorted((a.data.ptr, a.data.ptr + a.nbytes) for a in arrays)
    assert all(later[0] - earlier[1] >= 512 for earlier, later in itertools.pairwise(ends))


def test_an_array_of_somebody_elses_pointer(machine: Machine) -> None:
    a = cupy.arange(6, dtype="f4")
    memory = cupy.cuda.UnownedMemory(a.data.ptr + 8, 16, a)
    view = cupy.ndarray((2, 2), "f4", cupy.cuda.MemoryPointer(memory, 0))
    view += 1
    np.testing.assert_array_equal(a.get(), [0, 1, 3, 4, 5, 6])
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.UnownedMemory(np.empty(3).ctypes.data, 24, None)


def test_out_of_memory(machine: Machine) -> None:
    machine.heap.limit = 4096
    a = cupy.empty(1000, "f4")
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating 100 bytes"):
        cupy.empty(100, "u1")
    del a
    cupy.empty(100, "u1")
    assert cupy.get_default_memory_pool().used_bytes() == 0


OPERATIONS = {
    "add": lambda xp, a, i: a + 1,
    "radd": lambda xp, a, i: np.float32(2) * a,
    "float64": lambda xp, a, i: np.float64(2) * a,
    "divide": lambda xp, a, i: a / 3,
    "power": lambda xp, a, i: a**2,
    "compare": lambda xp, a, i: a > 5,
    "ufunc": lambda xp, a, i: xp.sqrt(a),
    "numpy's ufunc": lambda xp, a, i: np.maximum(a, 4),
    "two outputs": lambda xp, a, i: xp.divmod(a, 4)[1],
    "int8 to float16": lambda xp, a, i: xp.sqrt(i.astype("i1")),
    "strided": lambda xp, a, i: a[:, ::2] * a[:, 1::2],
    "broadcast": lambda xp, a, i: a + a[0],
    "sum": lambda xp, a, i: a.sum(axis=0),
    "numpy's sum": lambda xp, a, i: np.sum(a, axis=1, keepdims=True),
    "mean": lambda xp, a, i: xp.mean(a),
    "max": lambda xp, a, i: a.max(axis=-1),
    "argmax": lambda xp, a, i: xp.argmax(a, axis=1),
    "any": lambda xp, a, i: (a > 3).any(),
    "norm": lambda xp, a, i: xp.linalg.norm(a),
    "dot": lambda xp, a, i: xp.dot(a, a.T),
    "matmul": lambda xp, a, i: a @ a.T,
    "tensordot": lambda xp, a, i: np.tensordot(a, a, axes=2),
    "einsum": lambda xp, a, i: np.einsum("ij,kj->ik", a, a),
    "where": lambda xp, a, i: xp.where(a > 3, a, 0),
    "clip": lambda xp, a, i: a.clip(2, 7),
    "concatenate": lambda xp, a, i: xp.concatenate([a, a[:1]], axis=0),
    "flattened": lambda xp, a, i: xp.concatenate([a, a[:1]], axis=None),
    "stack": lambda xp, a, i: np.stack([a, a]),
    "rows": lambda xp, a, i: a[i],
    "pairs": lambda xp, a, i: a[i, i],
    "behind an ellipsis": lambda xp, a, i: a[..., i],
    "mask": lambda xp, a, i: a[a > 4],
    "take": lambda xp, a, i: a.take(i, axis=1),
    "nonzero": lambda xp, a, i: xp.nonzero(a > 5)[1],
    "unique": lambda xp, a, i: xp.unique(i),
    "astype": lambda xp, a, i: a.astype("f2"),
    "transposed copy": lambda xp, a, i: a.T.copy(),
    "reshaped copy": lambda xp, a, i: a.T.reshape(-1),
    "contiguous": lambda xp, a, i: xp.ascontiguousarray(a[:, ::2]),
    "zeros_like": lambda xp, a, i: np.zeros_like(a),
    "full": lambda xp, a, i: xp.full((2, 2), 7, "f4"),
    "eye": lambda xp, a, i: xp.eye(3),
    "arange": lambda xp, a, i: xp.arange(2, 9, 3),
    "array": lambda xp, a, i: xp.array([[1, 2], [3, 4.5]]),
    "cumsum": lambda xp, a, i: xp.cumsum(a, axis=1),
    "sort": lambda xp, a, i: xp.sort(i),
    "empty": lambda xp, a, i: a[:0].sum(axis=0),
}


@pytest.mark.parametrize("deferred", [False, True], ids=["eager", "deferred"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_agree_with_numpy(operation: str, deferred: bool) -> None:
    a, i = np.arange(12, dtype="f4").reshape(3, 4), np.array([2, 0, 2])
    expected = OPERATIONS[operation](np, a, i)
    with cupy_on_cpu(deferred=deferred):
        got = OPERATIONS[operation](cupy, cupy.array(a), cupy.array(i))
        assert type(got) is cupy.ndarray
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got.get(), expected)


CHANGES = {
    "in place": lambda xp, a, i: a.__iadd__(1),
    "out": lambda xp, a, i: np.multiply(a, 2, out=a),
    "fill": lambda xp, a, i: a[1:, ::2].fill(3),
    "number": lambda xp, a, i: a.__setitem__((0, slice(1, 3)), 8),
    "row": lambda xp, a, i: a.__setitem__(0, a[2]),
    "other type": lambda xp, a, i: a.__setitem__((slice(None), slice(3)), i),
    "rows": lambda xp, a, i: a.__setitem__(i[:2], a[1:]),
    "mask": lambda xp, a, i: a.__setitem__(a > 4, 0),
    "add.at": lambda xp, a, i: np.add.at(a, i, a[0]),
    "maximum.at": lambda xp, a, i: xp.maximum.at(a, (i, i), 50),
    "sort": lambda xp, a, i: i.sort(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_agree_with_numpy(machine: Machine, change: str) -> None:
    a, i = np.arange(12, dtype="f4").reshape(3, 4), np.array([2, 0, 2])
    ours, index = cupy.array(a), cupy.array(i)
    CHANGES[change](cupy, ours, index)
    CHANGES[change](np, a, i)
    np.testing.assert_array_equal(ours.get(), a)
    np.testing.assert_array_equal(index.get(), i)


def test_integer_indices_wrap_around(machine: Machine) -> None:
    a = cupy.arange(3)
    np.testing.assert_array_equal(a[[1, 3, -1]].get(), [1, 0, 2])
    a[cupy.array([4])] = 9
    np.testing.assert_array_equal(a.get(), [0, 9, 2])


def test_bfloat16(machine: Machine) -> None:
    a = cupy.array([1, 2, 3], dtype=ml_dtypes.bfloat16)
    assert (a * 2).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(a.astype("f4").get(), [1, 2, 3])


def test_conversions_to_the_host(machine: Machine) -> None:
    a = cupy.arange(3, dtype="f4")
    assert (float(a[2]), int(a[2]), bool(a[2]), a[2].item(), a.tolist()) == (2.0, 2, True, 2.0, [0.0, 1.0, 2.0])
    assert repr(a) == "array([0., 1., 2.], dtype=float32)"
    assert [type(item) for item in a] == [cupy.ndarray] * 3
    assert machine.synchronisations == ["get"] * 6
    np.testing.assert_array_equal(cupy.asnumpy(a), a.get(out=np.empty(3, "f4")))
    with pytest.raises(TypeError, match="float64 array cannot be obtained from float32 array"):
        a.get(out=np.empty(3))
    with pytest.raises(ValueError, match="truth value of an array with more than one element"):
        bool(a)


def test_copies_are_independent(machine: Machine) -> None:
    a = cupy.arange(3)
    copies = [a.copy(), copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a)), cupy.array(a)]
    a.fill(9)
    for one in copies:
        assert type(one) is cupy.ndarray
        np.testing.assert_array_equal(one.get(), [0, 1, 2])
    assert cupy.asarray(a) is a


ERRORS = {
    "numpy operand": (lambda a: a + np.ones(3), TypeError, "Unsupported type <class 'numpy.ndarray'>"),
    "numpy first": (lambda a: np.ones(3) + a, TypeError, "Unsupported type <class 'numpy.ndarray'>"),
    "numpy in a function": (lambda a: np.concatenate([a, np.ones(3)]), TypeError, "Unsupported type"),
    "implicit": (np.asarray, TypeError, "Implicit conversion to a NumPy array is not allowed"),
    "set type": (lambda a: a.set(np.ones(3, "f4")), TypeError, "float32 array cannot be set to int64 array"),
    "set shape": (lambda a: a.set(np.ones(4, "i8")), ValueError, "Shape mismatch"),
    "set strided": (lambda a: a[::2].set(np.ones(2, "i8")), RuntimeError, "Cannot set to non-contiguous"),
    "set item": (lambda a: a.__setitem__(slice(2), a), ValueError, "could not be broadcast"),
    "cast": (lambda a: a.__iadd__(1.5), TypeError, "Cannot cast"),
    "strings": (lambda a: cupy.array(["a"]), ValueError, "Unsupported dtype"),
    "numpy only": (lambda a: np.busday_count(a, a), TypeError, "no implementation found for 'numpy.busday_count'"),
    "reduce": (lambda a: np.maximum.reduce(a), NotImplementedError, "`cupy_maximum.reduce` is not supported"),
    "at": (lambda a: np.divide.at(a, a, 1), NotImplementedError, "`cupy_true_divide.at` is not supported"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_cupy(machine: Machine, case: str) -> None:
    action, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        action(cupy.arange(3))
