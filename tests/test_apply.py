"""`apply_gradients` accepts: iterables, None, duplicates, aliases, NaN, sparse rows and constraints."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from tests.engines import Engine
from tests.support import BFLOAT16, DTYPES, Snapshot, assert_same_bits, sign_sgd, unchanged

F32 = np.float32


pytestmark = pytest.mark.usefixtures("numpy_engine")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


# --- the call -----------------------------------------------------------------------------------------------


class OneShot:
    """An iterable that counts how often it is started."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs
        self.starts = 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        return iter(self.pairs)


ITERABLES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda pairs: (pair for pair in pairs),
    "zip": lambda pairs: zip(*zip(*pairs)),
    "OneShot": OneShot,
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_any_iterable_consumed_once(kind: str):
    opt, a, b = sign_sgd(), Variable(ones(2)), Variable(ones())
    pairs = ITERABLES[kind]([(ones(2), a), (-ones(), b)])
    opt.apply_gradients(pairs)
    assert_same_bits(a, np.array([0.5, 0.5], F32))
    assert_same_bits(b, np.array(1.5, F32))
    if kind == "OneShot":
        assert pairs.starts == 1


def test_returns_the_new_count(library: Engine):
    opt, var = RMSprop(0.1), library.variable(ones(2))
    results = [opt.apply_gradients([(library.put(ones(2)), var)]) for _ in range(3)]
    assert [int(r) for r in results] == [1, 2, 3]
    assert {np.asarray(r).dtype for r in results} == {np.dtype(np.int64)}
    assert {np.ndim(r) for r in results} == {0}


def test_name_argument():
    opt, var = RMSprop(0.1), Variable(ones(2))
    opt.apply_gradients([(ones(2), var)], "step")
    assert opt.apply_gradients([(ones(2), var)], name="step") == 2


@pytest.mark.parametrize("empty", [[], (), iter(()), {}], ids=["list", "tuple", "iterator", "dict"])
@pytest.mark.parametrize("steps", [0, 2])
def test_empty_iterable_is_a_no_op(empty: Any, steps: int):
    opt, var = RMSprop(0.1, momentum=0.5), Variable(ones(2))
    for _ in range(steps):
        opt.apply_gradients([(ones(2), var)])
    slots = Snapshot.of(opt, [var]).contents[1:]
    assert opt.apply_gradients(empty) == steps
    assert opt.iterations.numpy() == steps
    assert Snapshot.of(opt, [var]).contents[1:] == slots


def test_several_dtypes_in_one_call(engine: Engine):
    opt, variables = sign_sgd(), [engine.variable(np.full(3, 2, dtype)) for dtype in DTYPES]
    opt.apply_gradients([(engine.put(np.full(3, 7, v.dtype)), v) for v in variables])
    for var, dtype in zip(variables, DTYPES, strict=True):
        assert_same_bits(var, np.full(3, 1.5, dtype))


# --- gradients ----------------------------------------------------------------------------------------------

BASE = np.array([[1, 2, 3], [-4, -5, -6]], F32)
GRADIENTS: dict[str, Any] = {
    "strided": np.repeat(BASE, 2, axis=1)[:, ::2],
    "Fortran order": np.asfortranarray(BASE),
    "reversed": BASE[::-1, ::-1].copy()[::-1, ::-1],
    "broadcast": np.broadcast_to(BASE[:, :1], (2, 3)),
    "unaligned": np.frombuffer(b"\0" + BASE.tobytes(), np.uint8)[1:].view(F32).reshape(2, 3),
    "slices": IndexedSlices(BASE[::-1], np.array([1, 0])),
    "strided slices": IndexedSlices(np.repeat(BASE, 2, axis=0)[::2], np.array([0, 9, 1, 9])[::2]),
    "int32 slices": IndexedSlices(BASE, np.array([0, 1], np.int32)),
    "slices with dense_shape": IndexedSlices(BASE, np.array([0, 1]), (2, 3)),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient_layouts(kind: str, engine: Engine):
    var = engine.variable(np.zeros((2, 3), F32))
    sign_sgd().apply_gradients([(engine.put(GRADIENTS[kind]), var)])
    assert_same_bits(var, -np.sign(BASE) / 2)


def test_gradient_that_is_a_variable(engine: Engine):
    var = engine.variable(np.zeros((2, 3), F32))
    sign_sgd().apply_gradients([(engine.variable(BASE.copy()), var)])
    assert_same_bits(var, -np.sign(BASE) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_scalar_variable(dtype: np.dtype, engine: Engine):
    var = engine.variable(np.array(2, dtype))
    opt = sign_sgd()
    for grad in (engine.put(dtype.type(3)), engine.put(np.array(3, dtype)), engine.variable(np.array(3, dtype))):
        before = var.numpy()
        opt.apply_gradients([(grad, var)])
        assert_same_bits(var, (before - dtype.type(0.5)).astype(dtype))


@pytest.mark.parametrize("grad_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_wide_gradients_of_16_bit_variables(dtype: np.dtype, grad_dtype: Any, engine: Engine):
    var, table = engine.variable(np.zeros(2, dtype)), engine.variable(np.zeros((2, 1), dtype))
    opt = sign_sgd()
    opt.apply_gradients([(engine.put(np.array([1e-15, -1e10], grad_dtype)), var)])  # float16 holds neither
    assert_same_bits(var, np.array([-0.5, 0.5], dtype))
    slices = IndexedSlices(np.array([[3], [-2]], grad_dtype), np.array([0, 1]))
    opt.apply_gradients([(engine.put(slices), table)])
    assert_same_bits(table, np.array([[-0.5], [0.5]], dtype))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "clipvalue": {"clipvalue": 0.1},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "weight_decay": {"weight_decay": 0.5, "initial_accumulator_value": 1.0},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_never_modified(dtype: np.dtype, option: str, library: Engine):
    opt = RMSprop(0.1, momentum=0.5, **OPTIONS[option])
    variables = [library.variable(np.full((3, 2), 2, dtype)) for _ in range(2)]
    before = [
        np.arange(1, 7).reshape(3, 2).astype(dtype),
        np.arange(1, 9).reshape(4, 2).astype(dtype),
        np.array([2, 0, 2, 2]),
    ]
    arrays = [library.put(a.copy()) for a in before]
    if library.xp is np:
        for a in arrays:
            a.flags.writeable = False
    opt.apply_gradients([(arrays[0], variables[0]), (IndexedSlices(arrays[1], arrays[2]), variables[1])])
    for a, b in zip(arrays, before, strict=True):
        assert_same_bits(a, b)


# --- None ---------------------------------------------------------------------------------------------------


def test_none_gradients_are_skipped_with_one_warning(library: Engine):
    opt = RMSprop(0.1, momentum=0.5)
    a, b, c = (library.variable(ones(2), name) for name in ("first", "second", "third"))
    message = r"^Gradients do not exist for variables \[.*first.*third.*\]"
    with unchanged(RMSprop(), a, c), pytest.warns(UserWarning, match=message) as caught:
        assert opt.apply_gradients([(None, a), (library.put(ones(2)), b), (None, c)]) == 1
    assert len(caught) == 1
    assert "second" not in str(caught[0].message)
    assert len(opt.weights) == 3
    for var in (a, c):
        with pytest.raises(KeyError):
            opt.get_slot(var, "rms")
    assert (b.numpy() < 1).all()


# --- duplicates and aliases ---------------------------------------------------------------------------------


def pair_of_optimizers(**kwargs: Any) -> tuple[RMSprop, RMSprop]:
    options = {"momentum": 0.5, **kwargs}
    return RMSprop(0.1, **options), RMSprop(0.1, **options)


def test_same_variable_twice_is_two_updates_in_order(engine: Engine):
    grads = [engine.put(np.array(grad, F32)) for grad in ([1, 2, 3], [-4, 5, 0.5], [0.25, 1, 1])]
    once, thrice = pair_of_optimizers()
    a, b = engine.put(ones(3)), engine.put(ones(3))
    assert once.apply_gradients([(grads[0], a), (grads[1], Variable(a)), (grads[2], a[:])]) == 1
    for grad in grads:
        thrice.apply_gradients([(grad, b)])
    assert_same_bits(a, b)
    assert len(once.weights) == len(thrice.weights) == 3
    for name in ("rms", "momentum"):
        assert_same_bits(once.get_slot(a, name), thrice.get_slot(b, name))


def test_same_variable_dense_and_sparse_in_order(engine: Engine):
    slices = engine.put(IndexedSlices(np.array([[1, 2], [3, 4]], F32), np.array([1, 1])))
    dense = engine.put(np.array([[5, 6], [-7, 8]], F32))
    once, in_turn = pair_of_optimizers()
    a, b = engine.variable(ones(2, 2)), engine.variable(ones(2, 2))
    once.apply_gradients([(slices, a), (dense, a), (slices, a)])
    for grad in (slices, dense, slices):
        in_turn.apply_gradients([(grad, b)])
    assert_same_bits(a, b)


def swapped(x: Any) -> list[Any]:
    return [(x[1], x[0]), (x[0], x[1])]


def slices(values: Any, *rows: int) -> IndexedSlices:
    """With the row ids where the values are."""
    return IndexedSlices(values, np.asarray(rows, like=values))


ALIASES: dict[str, Callable[[Any], list[Any]]] = {  # of a (4, 3) array
    "each other": swapped,
    "each other, as variables": lambda x: swapped([Variable(x[0]), Variable(x[1])]),
    "a ring": lambda x: [(x[1], x[0]), (x[2], x[1]), (x[3], x[2]), (x[0], x[3])],
    "itself": lambda x: [(x, x)],
    "itself twice": lambda x: [(x, x), (x, x)],
    "itself twice, as rows": lambda x: [(slices(x, 0, 1, 2, 3), x), (x, x)],
    "itself, strided": lambda x: [(x[:, ::2], x[:, ::2])],
    "itself, strided, one object": lambda x: [(view, view) for view in [x[:, ::2]]],
    "itself reversed": lambda x: [(x[::-1, ::-1], x)],
    "one row down": lambda x: [(x[1:], x[:-1])],
    "one row up": lambda x: [(x[:-1], x[1:])],
    "part of a variable": lambda x: [(x[:2], x[2:]), (x[2:], x[:2])],
    "rows of its own": lambda x: [(slices(x[:2], 1, 0), x)],
    "rows of another": lambda x: [(x[2:].copy(), x[:2]), (slices(x[:2], 1, 1), x[2:])],
    "later duplicate": lambda x: [(x[1], x[0]), (x[0], x[1]), (x[1], x[0])],
}


@pytest.mark.parametrize("option", ["plain", "clipnorm", "global_clipnorm", "weight_decay"])
@pytest.mark.parametrize("alias", ALIASES)
def test_gradients_that_are_variables_of_the_call(alias: str, option: str, engine: Engine):
    opt, expected_opt = pair_of_optimizers(**OPTIONS[option])
    x = engine.put(np.array([[1, -2, 3], [4, 5, -6], [-7, 8, 9], [10, -11, 12]], F32))
    y = x.copy()
    for _ in range(2):
        opt.apply_gradients(ALIASES[alias](x))
        expected_opt.apply_gradients([(detached(grad), var) for grad, var in ALIASES[alias](y)])
        assert_same_bits(x, y)


def detached(grad: Any) -> Any:
    if isinstance(grad, IndexedSlices):
        return IndexedSlices(grad.values.copy(), grad.indices)
    return (grad.value if isinstance(grad, Variable) else grad).copy()


def test_gradient_that_is_a_slot(engine: Engine):
    opt, expected_opt = pair_of_optimizers()
    a, b, x, y = (engine.variable(np.array([1, 2, 3], F32)) for _ in range(4))
    grad = engine.put(ones(3))
    opt.apply_gradients([(grad, a), (grad, b)])
    expected_opt.apply_gradients([(grad, x), (grad, y)])
    opt.apply_gradients([(grad, a), (opt.get_slot(a, "rms"), b)])
    expected_opt.apply_gradients([(grad, x), (detached(expected_opt.get_slot(x, "rms")), y)])
    assert_same_bits(b, y)


# --- NaN and Inf --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_elements(dtype: np.dtype, bad: float, engine: Engine):
    opt, expected_opt = pair_of_optimizers(centered=True)
    variables, expected = ([engine.variable(np.ones((3, 2), dtype)) for _ in range(3)] for _ in range(2))
    good = np.arange(1, 7).reshape(3, 2).astype(dtype)
    hurt = good.copy()
    hurt[1, 0] = bad
    finite = np.ones((3, 2), bool)
    finite[1, 0] = False
    rows = np.array([0, 1, 2])
    good_grads = [engine.put(grad) for grad in (good, IndexedSlices(good, rows), good)]
    hurt_grads = [engine.put(grad) for grad in (hurt, IndexedSlices(hurt, rows), good)]
    for grads in (hurt_grads, good_grads):
        opt.apply_gradients(zip(grads, variables))
        expected_opt.apply_gradients(zip(good_grads, expected))
    for got, want in zip([*variables, *opt.weights[1:]], [*expected, *expected_opt.weights[1:]], strict=True):
        assert_same_bits(got.numpy()[finite], want.numpy()[finite])
    assert_same_bits(variables[2], expected[2])
    assert np.isnan(variables[0].numpy()[1, 0].astype(float))
    assert np.isnan(variables[1].numpy()[1, 0].astype(float))
