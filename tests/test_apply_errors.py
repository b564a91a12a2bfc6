"""`apply_gradients` refuses: every error of the contract, with the whole state compared before and after."""

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop
from tests.engines import Engine
from tests.support import BFLOAT16, unchanged

F16, F32, F64 = np.float16, np.float32, np.float64


pytestmark = pytest.mark.usefixtures("numpy_engine")


def slices(values: Any, indices: Any, dtype: Any = F32, index_dtype: Any = np.int64) -> IndexedSlices:
    return IndexedSlices(np.array(values, dtype), np.array(indices, index_dtype))


HOST = Engine("numpy", np)


def scene(stepped: bool, engine: Engine = HOST, **kwargs: Any) -> tuple[RMSprop, SimpleNamespace]:
    """An optimizer with every kind of slot, and variables of which `new*` were never in a call."""
    opt = RMSprop(0.1, **{"momentum": 0.5, "centered": True, **kwargs})
    v = SimpleNamespace(
        vec=engine.variable(np.array([1, 2, 3], F32), "vec"),
        table=engine.variable(np.arange(8, dtype=F32).reshape(4, 2), "table"),
        scalar=engine.variable(np.array(5, F32), "scalar"),
        half=engine.variable(np.array([1, 2, 3], F16), "half"),
        brain=engine.variable(np.array([1, 2, 3], BFLOAT16), "brain"),
        double=engine.variable(np.array([1, 2, 3], F64), "double"),
        bounded=engine.variable(np.ones((4, 2), F32), "bounded", constraint=np.abs),
        new=engine.variable(np.array([1, 2, 3], F32), "new"),
        new_table=engine.variable(np.ones((4, 2), F32), "new_table"),
    )
    if stepped:
        seen = [v.vec, v.table, v.scalar, v.half, v.brain, v.double, v.bounded]
        for scale in (1, -3):
            opt.apply_gradients([(engine.put(np.full(x.shape, scale, x.dtype)), x) for x in seen])
    return opt, v


def placed(engine: Engine, pair: Any) -> Any:
    """A pair whose gradient, if it is of arrays, is where the engine's are."""

    def put(x: Any) -> Any:
        return engine.put(x) if isinstance(x, np.ndarray | np.generic) else x

    if type(pair) is not tuple or len(pair) != 2:
        return pair
    grad, variable = pair
    if isinstance(grad, IndexedSlices):
        return IndexedSlices(put(grad.values), put(grad.indices)), variable
    return put(grad), variable


Row = tuple[str, Callable[[SimpleNamespace], Any], type[Exception] | tuple[type[Exception], ...], str]
EITHER = (TypeError, ValueError)
DIMS = "1-D|1-d|dimension|shape"

GRADIENTS: list[Row] = [  # what the pair's gradient is; the pair comes after good ones
    ("list", lambda v: ([0.1, 0.2, 0.3], v.vec), TypeError, "vec"),
    ("tuple", lambda v: ((0.1, 0.2, 0.3), v.vec), TypeError, "vec"),
    ("Python float", lambda v: (1.0, v.scalar), TypeError, "scalar"),
    ("Python int", lambda v: (1, v.scalar), TypeError, "scalar"),
    ("string", lambda v: ("abc", v.vec), TypeError, "vec"),
    ("NumPy scalar for a vector", lambda v: (F32(1), v.vec), EITHER, "vec"),
    ("float64 for float32", lambda v: (np.ones(3), v.vec), TypeError, "(?s)vec.*float64|float64.*vec"),
    ("float16 for float32", lambda v: (np.ones(3, F16), v.vec), TypeError, "(?s)vec.*float16|float16.*vec"),
    ("bfloat16 for float32", lambda v: (np.ones(3, BFLOAT16), v.vec), TypeError, "bfloat16"),
    (
        "float32 for float64",
        lambda v: (np.ones(3, F32), v.double),
        TypeError,
        "(?s)double.*float|float.*double",
    ),
    ("float16 for float64", lambda v: (np.ones(3, F16), v.double), TypeError, "float16"),
    ("bfloat16 for float16", lambda v: (np.ones(3, BFLOAT16), v.half), TypeError, "bfloat16"),
    ("float16 for bfloat16", lambda v: (np.ones(3, F16), v.brain), TypeError, "float16"),
    ("int64", lambda v: (np.ones(3, np.int64), v.vec), TypeError, "int64"),
    ("int32 for float16", lambda v: (np.ones(3, np.int32), v.half), TypeError, "int32"),
    ("bool", lambda v: (np.ones(3, bool), v.vec), TypeError, "bool"),
    ("complex", lambda v: (np.ones(3, np.complex64), v.vec), TypeError, "complex64"),
    ("float64 scalar for 0-d float32", lambda v: (F64(1), v.scalar), TypeError, "float64"),
    ("Variable of another dtype", lambda v: (v.double, v.vec), TypeError, "float64"),
    ("too short", lambda v: (np.ones(2, F32), v.vec), ValueError, r"(?s)vec.*\(2,\)|\(2,\).*vec"),
    ("broadcasts", lambda v: (np.ones(1, F32), v.vec), ValueError, r"\(1,\).*\(3,\)|\(3,\).*\(1,\)"),
    ("0-d for a vector", lambda v: (np.array(1, F32), v.vec), ValueError, r"\(\).*\(3,\)|\(3,\).*\(\)"),
    ("column for a vector", lambda v: (np.ones((3, 1), F32), v.vec), ValueError, r"\(3, 1\)"),
    (
        "transposed",
        lambda v: (np.ones((2, 4), F32), v.table),
        ValueError,
        r"\(2, 4\).*\(4, 2\)|\(4, 2\).*\(2, 4\)",
    ),
    ("vector for a scalar", lambda v: (np.ones(1, F32), v.scalar), ValueError, "scalar"),
    ("empty", lambda v: (np.ones(0, F32), v.vec), ValueError, r"\(0,\)"),
    ("shape of a 16-bit variable", lambda v: (np.ones(2, F32), v.half), ValueError, "half"),
    ("float indices", lambda v: (slices(np.ones((1, 2)), [0], F32, F32), v.table), EITHER, "int32"),
    ("int16 indices", lambda v: (slices(np.ones((1, 2)), [0], F32, np.int16), v.table), EITHER, "int32"),
    ("uint64 indices", lambda v: (slices(np.ones((1, 2)), [0], F32, np.uint64), v.table), EITHER, "int32"),
    ("bool indices", lambda v: (slices(np.ones((1, 2)), [1], F32, bool), v.table), EITHER, "int32"),
    (
        "2-D indices",
        lambda v: (slices(np.ones((1, 1, 2)), [[0]]), v.table),
        EITHER,
        DIMS,
    ),
    ("0-d indices", lambda v: (slices(np.ones(2), 0), v.table), EITHER, DIMS),
    ("fewer values than indices", lambda v: (slices(np.ones((1, 2)), [0, 1]), v.table), EITHER, r"\(1, 2\)"),
    ("values of another row size", lambda v: (slices(np.ones((1, 3)), [0]), v.table), EITHER, r"\(1, 3\)"),
    ("values without row axis", lambda v: (slices(np.ones(1), [0]), v.table), EITHER, r"\(1,\)"),
    ("values of another dtype", lambda v: (slices(np.ones((1, 2)), [0], F64), v.table), TypeError, "float64"),
    ("list as values", lambda v: (IndexedSlices([[1.0, 2.0]], np.array([0])), v.table), EITHER, "list"),
    ("slices for a 0-d variable", lambda v: (slices(np.ones(1), [0]), v.scalar), ValueError, "scalar"),
    ("slices and a constraint", lambda v: (slices(np.ones((1, 2)), [0]), v.bounded), RuntimeError, "bounded"),
    ("index too large", lambda v: (slices(np.ones((2, 2)), [1, 4]), v.table), IndexError, "table"),
    ("int32 index", lambda v: (slices(np.ones((1, 2)), [4], F32, np.int32), v.table), IndexError, "table"),
    ("negative index", lambda v: (slices(np.ones((2, 2)), [0, -1]), v.table), IndexError, "-1"),
    ("huge index", lambda v: (slices(np.ones((1, 2)), [2**62]), v.table), IndexError, str(2**62)),
    ("smallest index", lambda v: (slices(np.ones((1, 2)), [-(2**63)]), v.table), IndexError, "9223372036854775808"),
    (
        "index into a new table",
        lambda v: (slices(np.ones((1, 2)), [7]), v.new_table),
        IndexError,
        "new_table",
    ),
    ("index into a vector", lambda v: (slices(np.ones(1), [3]), v.vec), IndexError, "vec"),
    ("list as a variable", lambda v: (np.ones(3, F32), [1.0, 2.0, 3.0]), TypeError, "list"),
    ("gradient as a variable", lambda v: (v.vec, slices(np.ones(3), [0, 1, 2])), TypeError, "IndexedSlices"),
]

OF_NUMPY: list[Row] = [  # types that CuPy does not have
    ("longdouble", lambda v: (np.ones(3, np.longdouble), v.half), TypeError, "half"),
    ("float8", lambda v: (np.ones(3, ml_dtypes.float8_e5m2), v.half), TypeError, "float8"),
    ("object", lambda v: (np.ones(3, object), v.vec), TypeError, "object"),
]

ELEMENTS: list[Row] = [  # an element of the iterable that is no pair
    ("not a pair", lambda v: v.vec, TypeError, "pair"),
    ("None", lambda v: None, TypeError, "pair"),
    ("number", lambda v: 3, TypeError, "pair"),
    ("string", lambda v: "gv", TypeError, "pair"),
    ("array", lambda v: np.ones(2, F32), TypeError, "pair"),
    ("empty tuple", lambda v: (), TypeError, "pair"),
    ("1-tuple", lambda v: (np.ones(3, F32),), TypeError, "pair"),
    ("3-tuple", lambda v: (np.ones(3, F32), v.vec, 1), TypeError, "pair"),
]

KINDS: dict[str, dict[str, Any]] = {
    "clipvalue": {"clipvalue": 0.1},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.1},
}
REPEATED = [row for row in GRADIENTS if row[2] is IndexError or row[0].endswith("for float32")]


def good_pairs(v: SimpleNamespace, engine: Engine = HOST) -> list[tuple[Any, Any]]:
    pairs = [
        (np.ones(3, F32), v.new),
        (np.ones(3, F32), v.vec),
        (slices(np.ones((2, 2)), [3, 3]), v.table),
        (None, v.double),
        (np.ones(3, F32), v.half),
    ]
    return [placed(engine, pair) for pair in pairs]


def ids(rows: list[Row]) -> list[str]:
    return [row[0] for row in rows]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of the None among the good pairs
@pytest.mark.parametrize("stepped", [False, True], ids=["first", "third"])
@pytest.mark.parametrize("row", GRADIENTS + ELEMENTS, ids=ids(GRADIENTS + ELEMENTS))
def test_refused_element_changes_nothing(row: Row, stepped: bool, library: Engine):
    _, make, error, message = row
    opt, v = scene(stepped, library)
    last = placed(library, (np.ones((4, 2), F32), v.new_table))
    with unchanged(opt, *vars(v).values()), pytest.raises(error, match=message):
        opt.apply_gradients([*good_pairs(v, library), placed(library, make(v)), last])


@pytest.mark.parametrize("stepped", [False, True], ids=["first", "third"])
@pytest.mark.parametrize("row", OF_NUMPY, ids=ids(OF_NUMPY))
def test_refused_type_changes_nothing(row: Row, stepped: bool):
    _, make, error, message = row
    opt, v = scene(stepped)
    with unchanged(opt, *vars(v).values()), pytest.raises(error, match=message):
        opt.apply_gradients([good_pairs(v)[0], make(v)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", REPEATED, ids=ids(REPEATED))
def test_refused_element_changes_nothing_with_options(row: Row, kind: str, library: Engine):
    _, make, error, message = row
    opt, v = scene(True, library, **KINDS[kind])
    with unchanged(opt, *vars(v).values()), pytest.raises(error, match=message):
        opt.apply_gradients([good_pairs(v, library)[0], placed(library, make(v))])


NOT_ITERABLE = {"None": None, "int": 3, "float": 1.0, "type": RMSprop, "function": list}


@pytest.mark.parametrize("name", NOT_ITERABLE)
def test_not_an_iterable(name: str):
    opt, v = scene(stepped=True)
    with unchanged(opt, *vars(v).values()), pytest.raises(TypeError):
        opt.apply_gradients(NOT_ITERABLE[name])


@pytest.mark.parametrize("stepped", [False, True])
def test_iterable_that_raises_midway(stepped: bool, library: Engine):
    opt, v = scene(stepped, library)

    def pairs() -> Iterator[Any]:
        yield good_pairs(v, library)[0]
        yield good_pairs(v, library)[1]
        raise OSError("data loader failed")

    with unchanged(opt, *vars(v).values()), pytest.raises(OSError, match="data loader failed"):
        opt.apply_gradients(pairs())


@pytest.mark.parametrize("stepped", [False, True])
def test_all_gradients_none(stepped: bool, library: Engine):
    opt, v = scene(stepped, library)
    message = r"No gradients provided for any variable: \[.*vec.*new.*\]"
    with unchanged(opt, *vars(v).values()), pytest.raises(ValueError, match=message):
        opt.apply_gradients([(None, v.vec), (None, v.new)])


def test_none_gradient_does_not_excuse_a_bad_variable():
    opt, v = scene(stepped=True)
    with unchanged(opt, *vars(v).values()), pytest.raises(TypeError, match="list"):
        opt.apply_gradients([(np.ones(3, F32), v.vec), (None, [1.0, 2.0])])


def test_warning_turned_into_an_error_changes_nothing():
    opt, v = scene(stepped=True)
    with unchanged(opt, *vars(v).values()), pytest.raises(UserWarning, match="Gradients do not exist"):
        opt.apply_gradients([(np.ones(3, F32), v.vec), (None, v.new)])


def test_read_only_slot_changes_nothing(cpu_engine: str):
    opt, v = scene(stepped=True)
    opt.get_slot(v.vec, "rms").value.flags.writeable = False
    with unchanged(opt, *vars(v).values()), pytest.raises((TypeError, ValueError)):
        opt.apply_gradients([(np.ones((4, 2), F32), v.table), (np.ones(3, F32), v.vec)])


# --- what the messages say ----------------------------------------------------------------------------------


def numbers(error: BaseException) -> set[int]:
    return {int(x) for x in re.findall(r"-?\d+", str(error))}


each_outside = pytest.mark.parametrize(
    ("indices", "offset", "index"),
    [([0, 1, 77, 2], 2, 77), ([-3, 0], 0, -3), ([3, 2, 1, 0, 4], 4, 4), ([0, 90, 80], 1, 90)],
    ids=str,
)


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@each_outside
def test_index_error_names_index_offset_and_bound(
    indices: list[int], offset: int, index: int, index_dtype: Any, engine: Engine, **options: Any
):
    opt, v = scene(False, engine, momentum=0.0, centered=False, **options)
    grad = engine.put(slices(np.ones((len(indices), 2)), indices, F32, index_dtype))
    with unchanged(opt, v.table), pytest.raises(IndexError, match="table") as caught:
        opt.apply_gradients([(grad, v.table)])
    assert {index, offset, 4} <= numbers(caught.value)


@each_outside
def test_the_cpu_checks_indices_in_any_case(indices: list[int], offset: int, index: int, cpu_engine: str):
    test_index_error_names_index_offset_and_bound(indices, offset, index, np.int32, HOST, check_indices=False)


def test_index_into_an_empty_table(library: Engine):
    opt, empty = RMSprop(0.1), library.variable(np.ones((0, 2)), "empty")
    with unchanged(opt, empty), pytest.raises(IndexError, match="empty"):
        opt.apply_gradients([(library.put(slices(np.ones((1, 2)), [0], F64)), empty)])


def test_shape_error_names_variable_and_both_shapes(library: Engine):
    opt, v = scene(False, library)
    with pytest.raises(ValueError, match="table") as caught:
        opt.apply_gradients([(library.put(np.ones((4, 3), F32)), v.table)])
    assert "(4, 3)" in str(caught.value)
    assert "(4, 2)" in str(caught.value)


def test_dtype_error_names_both_dtypes(library: Engine):
    opt, v = scene(False, library)
    with pytest.raises(TypeError, match="double") as caught:
        opt.apply_gradients([(library.put(np.ones(3, F32)), v.double)])
    assert "float32" in str(caught.value)
    assert "float64" in str(caught.value)
