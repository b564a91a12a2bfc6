"""Kernels on the emulated device: arguments, faults, elementwise kernels."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.device_support import Fault, Machine, cupy, cupy_on_cpu, raw, saxpy


@pytest.fixture
def machine() -> Iterator[Machine]:
    with cupy_on_cpu() as machine:
        yield machine


def test_saxpy(machine: Machine) -> None:
    x, y = cupy.arange(100, dtype="f4"), cupy.ones(100, "f4")
    machine.forget()
    saxpy(2, x, y)
    np.testing.assert_array_equal(y.get(), np.arange(100, dtype="f4") * 2 + 1)
    assert machine.launches == [("saxpy", (2, 1, 1), (64, 1, 1), 0)]
    assert machine.allocations == []


def test_reduction_with_shared_memory(machine: Machine) -> None:
    x, sums = cupy.arange(150, dtype="f8"), cupy.empty(3, "f8")
    raw("block_sum")((3,), (64,), (x, sums, np.int32(150)))
    np.testing.assert_array_equal(sums.get(), [sum(range(64)), sum(range(64, 128)), sum(range(128, 150))])


def test_struct_by_value_is_that_of_the_call() -> None:
    table = np.zeros(1, np.dtype([("source", "u8", 3), ("target", "u8"), ("scale", "f4")], align=True))
    with cupy_on_cpu(deferred=True):
        source, target = cupy.arange(5, dtype="f4"), cupy.empty(5, "f4")
        table["source"][0, 0], table["target"], table["scale"] = source.data.ptr, target.data.ptr, 3
        raw("gather")((1,), (8,), (table, np.int32(5)))
        table["scale"] = 100
        np.testing.assert_array_equal(target.get(), np.arange(5, dtype="f4") * 3)


@pytest.mark.parametrize(
    ("name", "value", "dtype", "expected"),
    [
        ("store_int64", 2**40, "i8", 2**40),
        ("store_int64", np.uint64(7), "i8", 7),
        ("store_double", 0.1, "f8", 0.1),
        ("store_double", np.array([0.1]), "f8", 0.1),
        ("store_bool", True, "i1", 1),
        ("store_bool", np.bool_(False), "i1", 0),
        ("store_null", None, "i8", 0),
    ],
)
def test_arguments_are_packed_as_cupy_packs_them(
    machine: Machine, name: str, value: object, dtype: str, expected: object
) -> None:
    out = cupy.empty(1, dtype)
    raw(name)((1,), (1,), (out, value))
    assert out.item() == expected


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (np.float32(1), Fault, "4 bytes"),
        (np.ones(2), TypeError, "trying to pass a numpy.ndarray of shape"),
        ("1", TypeError, "Unsupported type <class 'str'>"),
        ([1.0], TypeError, "Unsupported type <class 'list'>"),
    ],
)
def test_wrong_arguments(machine: Machine, value: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        raw("store_double")((1,), (1,), (cupy.empty(1), value))


def test_options_reach_the_compiler(machine: Machine) -> None:
    out = cupy.empty(1, "f4")
    source = 'extern "C" __global__ void store(float* out) { *out = VALUE; }'
    for value in (1, 2):
        cupy.RawKernel(source, "store", options=(f"-DVALUE={value}",))((1,), (1,), (out,))
        assert out.item() == value


def test_wrong_launches(machine: Machine) -> None:
    x = cupy.zeros(1, "f4")
    arguments = (np.float32(1), x, x.copy(), 1)
    with pytest.raises(TypeError, match="tuples"):
        raw("saxpy")(1, (1,), arguments)
    for grid, block in [((1,), (1025,)), ((1, 65536), (1,)), ((1,), (1, 1, 65)), ((1,), (64, 32))]:
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_INVALID_VALUE"):
            raw("saxpy")(grid, block, arguments)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="shared memory"):
        raw("saxpy")((1,), (1,), arguments, shared_mem=50000)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="named symbol not found"):
        raw("absent")((1,), (1,), arguments)
    with pytest.raises(cupy.cuda.compiler.CompileException, match="undefined"):
        cupy.RawKernel('extern "C" __global__ void bad() { undefined; }', "bad").compile()


@pytest.mark.parametrize("n", [101, 101 + 64])
def test_an_overrun_is_a_fault_even_beside_another_array(machine: Machine, n: int) -> None:
    arrays = [cupy.zeros(100, "f4") for _ in range(6)]
    with pytest.raises(Fault, match="out of bounds"):
        raw("saxpy")((-(-n // 64),), (64,), (np.float32(1), arrays[2], arrays[3], n))


def test_a_kernel_may_not_touch_freed_memory(machine: Machine) -> None:
    x, y = cupy.zeros(8, "f4"), cupy.zeros(8, "f4")
    address = np.uint64(x.data.ptr)
    del x
    with pytest.raises(Fault):
        raw("saxpy")((1,), (8,), (np.float32(1), address, y, 8))


def test_an_array_that_outlives_its_memory_is_a_fault(machine: Machine) -> None:
    a = cupy.zeros(8, "f4")
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(a.data.ptr, 32, None, 0), 0)
    view = cupy.ndarray((8,), "f4", pointer)
    del a
    with pytest.raises(Fault, match="no live device memory"):
        view.get()


# read and written: total
FUSED = ("T x, T y, float64 scale", "T out, T total", "out = x * y + (T)scale; total += out", "fused")


@pytest.mark.parametrize(
    "layout",
    [lambda a: a, lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1, 1:], lambda a: a[0, 0], lambda a: a[:0]],
    ids=["contiguous", "transposed", "strided", "reversed", "0-d", "empty"],
)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_elementwise_layouts(machine: Machine, dtype: str, layout: object) -> None:
    base = np.arange(24, dtype=dtype).reshape(4, 6)
    ours = [layout(cupy.array(base + k)) for k in range(4)]
    x, y, out, total = [layout(base + k) for k in range(4)]
    machine.forget()
    returned = cupy.ElementwiseKernel(*FUSED)(ours[0], ours[1], 0.5, ours[2], ours[3])
    assert [launch.name for launch in machine.launches] == ["fused"] * (out.size > 0)
    expected = x * y + np.dtype(dtype).type(0.5)
    assert returned[0] is ours[2]
    np.testing.assert_array_equal(ours[2].get(), expected)
    np.testing.assert_array_equal(ours[3].get(), total + expected)


def test_elementwise_broadcasts_and_allocates(machine: Machine) -> None:
    kernel = cupy.ElementwiseKernel("T x, S y", "T out", "out = x - (T)y", "difference")
    x, y = cupy.arange(12, dtype="f4").reshape(3, 4), cupy.arange(4)
    out = kernel(x, y)
    assert (out.shape, out.dtype) == ((3, 4), np.float32)
    np.testing.assert_array_equal(out.get(), x.get() - y.get())
    with pytest.raises(ValueError, match=r"could not be broadcast together with shapes \(3, 4\) \(3,\)"):
        kernel(x, y[:3])
    with pytest.raises(ValueError, match="Out shape is mismatched"):
        kernel(x, y, cupy.empty((1, 4), "f4"))
    with pytest.raises(TypeError, match="Wrong number of arguments"):
        kernel(x)
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel(x, np.arange(4))


def test_elementwise_raw_parameters(machine: Machine) -> None:
    kernel = cupy.ElementwiseKernel("raw T x, int32 n", "raw T out", "out[i] = x[n - 1 - i]", "reverse")
    x, out = cupy.arange(5), cupy.empty(5, "i8")
    kernel(x, 5, out, size=5)
    np.testing.assert_array_equal(out.get(), [4, 3, 2, 1, 0])
    with pytest.raises(ValueError, match="Loop size is undecided"):
        kernel(x, 5, out)
    with pytest.raises(Fault, match="out of bounds"):
        kernel(x, 6, out, size=5)


def test_a_kernel_object_made_before(machine: Machine) -> None:
    np.testing.assert_array_equal(PLUS_ONE(cupy.arange(3)).get(), [1, 2, 3])


PLUS_ONE = cupy.ElementwiseKernel("T x", "T y", "y = x + 1", "plus_one")
