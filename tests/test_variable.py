"""Variables: handles, plain arrays, their identity, layouts, and what is refused."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpurms
from gpurms import GradientTape, RMSprop, Variable
from tests.engines import Engine
from tests.support import BFLOAT16, DTYPES, assert_same_bits, host, sign_sgd, unchanged

SHAPES = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (0, 0), (1, 1, 2, 1, 3, 1, 1, 2)]


pytestmark = pytest.mark.usefixtures("numpy_engine")


# --- the handle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_array_is_wrapped_not_copied(dtype: np.dtype, library: Engine):
    array = library.put(np.array([1.0, 2.0], dtype))
    var = Variable(array)
    assert var.value is array
    sign_sgd().apply_gradients([(library.put(np.array([1, -1], dtype)), var)])
    assert array.tolist() == [0.5, 2.5]
    assert var.value is array


@pytest.mark.parametrize(
    "value",
    [
        3,
        2.5,
        True,
        [1, 2],
        (1.0, 2.0),
        [[1], [2]],
        range(3),
        np.float64(0.1),
        np.int64(3),
        [np.ones(2), np.zeros(2)],
    ],
    ids=repr,
)
def test_anything_else_becomes_a_float32_array(value: Any, library: Engine):
    var = Variable(value)
    assert type(var.value) is gpurms.array_module().ndarray is library.xp.ndarray
    assert_same_bits(var, np.array(value, np.float32))


@pytest.mark.parametrize("value", [["a"], [[1], [1, 2]], {}, "text"], ids=repr)
def test_what_numpy_cannot_turn_into_an_array(value: Any):
    with pytest.raises((TypeError, ValueError)):
        Variable(value)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "bfloat16"], ids=str)
def test_dtype_argument(dtype: Any, library: Engine):
    var = Variable([1.0, 2.0], dtype=dtype)
    expected = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    assert_same_bits(var, np.array([1, 2], expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attributes(dtype: np.dtype, shape: tuple[int, ...], library: Engine):
    array = library.put(np.ones(shape, dtype))
    var = Variable(array, name="v")
    assert (var.shape, var.dtype, var.ndim, var.size, var.name) == (shape, dtype, len(shape), array.size, "v")


def test_numpy_is_a_copy(library: Engine):
    var = library.variable(np.array([1.0, 2.0]))
    copied = var.numpy()
    assert type(copied) is np.ndarray
    copied[...] = 9
    assert var.numpy().tolist() == [1.0, 2.0]


def test_array_protocol():
    var = Variable(np.array([1.0, 2.0]))
    assert np.asarray(var).tolist() == [1.0, 2.0]
    assert np.asarray(var, np.float32).dtype == np.float32
    copied = np.array(var)
    copied[...] = 9
    assert np.array(var, copy=True) is not var.value
    assert var.numpy().tolist() == [1.0, 2.0]
    assert np.add(var, 1).tolist() == [2.0, 3.0]


def test_repr(library: Engine):
    text = repr(library.variable(np.ones((2, 3), np.float16), "embedding"))
    for part in ("Variable", "embedding", "(2, 3)", "float16"):
        assert part in text


@pytest.mark.parametrize(
    "value",
    [[3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.float16), Variable(np.array([3.0, 4.0]))],
    ids=["list", "tuple", "ints", "float16", "Variable"],
)
def test_assign_in_place(value: Any, library: Engine):
    array = library.put(np.array([1.0, 2.0]))
    var = Variable(array)
    var.assign(value)
    assert var.value is array
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float64])
def test_assign_from_where_the_variable_is(dtype: Any, library: Engine):
    var = library.variable(np.array([1.0, 2.0, 5.0, 6.0], np.float32)[::2])
    for value in (library.put(np.array([3, 4], dtype)), library.put(np.array([3, 0, 4, 0], dtype)[::2])):
        var.assign([0, 0])
        var.assign(value)
        assert_same_bits(var, np.array([3, 4], np.float32))
    var.assign(library.variable(np.array([7.0, 8.0])))
    assert_same_bits(var, np.array([7, 8], np.float32))


def test_assign_to_a_scalar(library: Engine):
    var = Variable(1.0)
    var.assign(2.5)
    assert_same_bits(var, np.array(2.5, np.float32))


@pytest.mark.parametrize("value", [1.0, [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], np.ones((2, 1)), []], ids=repr)
def test_assign_needs_an_equal_shape(value: Any, library: Engine):
    var = library.variable(np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        var.assign(value)
    assert var.numpy().tolist() == [1.0, 2.0]


def test_value_is_traced_inside_a_tape(library: Engine):
    array = library.put(np.array([1.0, 2.0]))
    var = Variable(array)
    with GradientTape():
        assert not isinstance(var.value, library.xp.ndarray)
        assert var.value.shape == (2,)
    assert var.value is array


# --- plain arrays and identity ------------------------------------------------------------------------------

SAME: dict[str, Callable[[np.ndarray], Any]] = {
    "itself": lambda a: a,
    "slice": lambda a: a[:],
    "view": lambda a: a.view(),
    "reshape": lambda a: a.reshape(a.shape),
    "transposed twice": lambda a: a.T.T,
    "Variable": Variable,
    "Variable on a view": lambda a: Variable(a[:]),
    "through its memory": lambda a: through_its_memory(a),
}


def through_its_memory(a: Any) -> Any:
    """An array that is no view of the other, on the same memory."""
    if isinstance(a, np.ndarray):
        return np.frombuffer(a.data.cast("B"), a.dtype).reshape(a.shape)
    import cupy

    memory = cupy.cuda.UnownedMemory(a.data.ptr, a.nbytes, a)
    return cupy.ndarray(a.shape, a.dtype, cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("again", SAME)
@pytest.mark.parametrize("first", ["itself", "slice", "Variable"])
def test_same_memory_is_the_same_variable(first: str, again: str, library: Engine):
    opt, array = RMSprop(0.1, momentum=0.5), library.put(np.ones((2, 3)))
    expected_opt, expected = RMSprop(0.1, momentum=0.5), library.variable(np.ones((2, 3)))
    grad = library.put(np.full((2, 3), 2.0))
    for make in (SAME[first], SAME[again]):
        opt.apply_gradients([(grad, make(array))])
        expected_opt.apply_gradients([(grad, expected)])
    assert_same_bits(array, expected)
    assert len(opt.weights) == 3
    assert opt.get_slot(SAME[first](array), "rms") is opt.get_slot(SAME[again](array), "rms")


OTHER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "another pointer": lambda a: a[1:, 1:],
    "another shape": lambda a: a.reshape(-1),
    "fewer rows": lambda a: a[:2],
    "other strides": lambda a: a.T,
}


@pytest.mark.parametrize("other", OTHER)
def test_other_memory_is_another_variable(other: str, library: Engine):
    opt, array = RMSprop(0.1), library.put(np.ones((4, 4), np.float32))
    view = OTHER[other](array)
    view[...] = 1
    for var in (array, view):
        opt.apply_gradients([(library.put(np.ones(var.shape, var.dtype)), var)])
    assert len(opt.weights) == 3
    assert opt.get_slot(array, "rms") is not opt.get_slot(view, "rms")


def test_other_dtype_is_another_variable(library: Engine):
    opt, array = RMSprop(0.1), library.put(np.ones(4, np.float16))
    view = array.view(BFLOAT16)
    for var in (array, view):
        opt.apply_gradients([(library.put(np.ones(4, var.dtype)), var)])
    assert len(opt.weights) == 3


def test_optimizer_keeps_the_memory_alive(library: Engine):
    opt, owner = RMSprop(0.1), library.put(np.ones(10))
    alive = weakref.ref(owner)
    opt.apply_gradients([(library.put(np.ones(3)), owner[2:5])])
    del owner
    gc.collect()
    assert alive() is not None


def test_arrays_made_in_turn_are_different_variables(library: Engine):
    opt, addresses = RMSprop(0.1), set()
    for _ in range(30):
        array = library.put(np.ones(5))
        opt.apply_gradients([(library.put(np.ones(5)), array)])
        addresses.add(array.ctypes.data if library.xp is np else array.data.ptr)
        del array
    assert len(addresses) == 30
    assert len(opt.weights) == 31


@pytest.mark.parametrize("make", [lambda a: a, Variable], ids=["array", "Variable"])
def test_empty_arrays_are_told_apart_by_object(make: Callable[[np.ndarray], Any], library: Engine):
    opt, grad = RMSprop(0.1), library.put(np.empty((0, 3)))
    first, second = (make(library.put(np.empty((0, 3)))) for _ in range(2))
    opt.apply_gradients([(grad, first), (grad, second)])
    assert len(opt.weights) == 3
    opt.apply_gradients([(grad, second), (grad, first)])
    assert len(opt.weights) == 3
    assert opt.get_slot(first, "rms") is not opt.get_slot(second, "rms")


# --- dtypes, shapes and layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype: np.dtype, engine: Engine):
    opt = sign_sgd()
    for shape in SHAPES:
        signs = np.where(np.arange(np.prod(shape, dtype=int)) % 2, -1, 1).reshape(shape)
        var = engine.variable(np.full(shape, 2, dtype))
        opt.apply_gradients([(engine.put((3 * signs).astype(dtype)), var)])
        assert_same_bits(var, (2 - 0.5 * signs).astype(dtype))


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "every other row": lambda a: a[::2],
    "column": lambda a: a[:, 1],
    "block": lambda a: a[1:3, 1:3],
    "reversed": lambda a: a[::-1, ::-1],
    "transposed": lambda a: a.T,
    "new axes": lambda a: a[:, None, ::3],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_arrays_work_in_place(layout: str, dtype: np.dtype, engine: Engine):
    before = np.arange(1, 25, dtype=np.float64).reshape(4, 6).astype(dtype)
    base = engine.put(before.copy())
    view = LAYOUTS[layout](base)
    outside = np.ones(base.shape, bool)
    LAYOUTS[layout](outside)[...] = False
    contiguous = view.copy(order="C")
    opt, expected_opt = RMSprop(0.1, momentum=0.5), RMSprop(0.1, momentum=0.5)
    for scale in (1, -2):
        grad = engine.put((scale * np.arange(view.size).reshape(view.shape)).astype(dtype))
        opt.apply_gradients([(grad, view)])
        expected_opt.apply_gradients([(grad, contiguous)])
    assert_same_bits(view, contiguous)
    assert_same_bits(host(base)[outside], before[outside])


def test_unaligned_array_works_in_place(cpu_engine: str):
    var = np.zeros(4 * 9 + 1, np.uint8)[1:].view(np.float32)
    assert not var.flags.aligned
    sign_sgd().apply_gradients([(np.full(9, 3, np.float32), var)])
    assert var.tolist() == [-0.5] * 9


def test_memory_map_works_in_place(tmp_path: Path):
    var = np.memmap(tmp_path / "table", np.float32, "w+", shape=(5,))
    sign_sgd().apply_gradients([(np.ones(5, np.float32), var)])
    var.flush()
    assert np.fromfile(tmp_path / "table", np.float32).tolist() == [-0.5] * 5


# --- what is refused ----------------------------------------------------------------------------------------


def read_only() -> np.ndarray:
    array = np.ones(2)
    array.flags.writeable = False
    return array


REFUSED_ARRAYS: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "int32": (lambda: np.ones(2, np.int32), "int32"),
    "int64": (lambda: np.ones(2, np.int64), "int64"),
    "uint8": (lambda: np.ones(2, np.uint8), "uint8"),
    "bool": (lambda: np.ones(2, bool), "bool"),
    "complex64": (lambda: np.ones(2, np.complex64), "complex64"),
}
REFUSED_NUMPY_ARRAYS: dict[str, tuple[Callable[[], np.ndarray], str]] = {  # CuPy has none of these
    "read-only": (read_only, "read-only|writ"),
    "broadcast": (lambda: np.broadcast_to(1.0, 2), "read-only|writ"),
    "object": (lambda: np.ones(2, object), "object"),
    "longdouble": (lambda: np.ones(2, np.longdouble), str(np.dtype(np.longdouble))),
    "float8": (lambda: np.ones(2, ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["array", "Variable"])
@pytest.mark.parametrize("array", REFUSED_ARRAYS)
def test_refused_array(array: str, wrap: bool, library: Engine):
    make, message = REFUSED_ARRAYS[array]
    check_refused(library, library.put(make()), message, wrap)


@pytest.mark.parametrize("wrap", [False, True], ids=["array", "Variable"])
@pytest.mark.parametrize("array", REFUSED_NUMPY_ARRAYS)
def test_refused_numpy_array(array: str, wrap: bool):
    make, message = REFUSED_NUMPY_ARRAYS[array]
    check_refused(Engine("numpy", np), make(), message, wrap)


def check_refused(engine: Engine, bad: Any, message: str, wrap: bool) -> None:
    opt, good = RMSprop(0.1), engine.variable(np.ones(2))
    grad = engine.put(np.ones(2, bad.dtype))
    with unchanged(opt, good), pytest.raises(TypeError, match=message):
        opt.apply_gradients([(engine.put(np.ones(2)), good), (grad, Variable(bad, name="bad") if wrap else bad)])


def test_array_that_became_read_only():
    opt, array, other = RMSprop(0.1), np.ones(2), Variable(np.ones(2))
    opt.apply_gradients([(np.ones(2), array)])
    array.flags.writeable = False
    with unchanged(opt, array, other), pytest.raises(TypeError, match="read-only"):
        opt.apply_gradients([(np.ones(2), other), (np.ones(2), array)])


@pytest.mark.parametrize("array", [*REFUSED_ARRAYS, *REFUSED_NUMPY_ARRAYS])
def test_refused_array_error_names_variable_and_expectation(array: str):
    bad = {**REFUSED_ARRAYS, **REFUSED_NUMPY_ARRAYS}[array][0]()
    expected = "writ" if array in ("read-only", "broadcast") else "float32"
    with pytest.raises(TypeError, match=rf"(?s)embedding.*{expected}|{expected}.*embedding"):
        RMSprop(0.1).apply_gradients([(np.ones(2, bad.dtype), Variable(bad, name="embedding"))])


@pytest.mark.parametrize(
    "var", [[1.0, 2.0], (1.0, 2.0), None, 1.0, np.float64(1.0), "v", {"v": 1}, np.ndarray], ids=repr
)
def test_refused_as_a_variable(var: Any, library: Engine):
    opt, good, grad = RMSprop(0.1), library.variable(np.ones(2)), library.put(np.ones(2))
    with unchanged(opt, good), pytest.raises(TypeError, match=type(var).__name__):
        opt.apply_gradients([(grad, good), (grad, var)])
