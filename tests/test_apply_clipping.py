"""Clipping inside `apply_gradients`: by value, by norm, by global norm; order, precision, sparse values."""

from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from tests.engines import DEVICE, Engine, running
from tests.support import DTYPES, assert_same_bits

F32, F64 = np.float32, np.float64
WIDE = [np.dtype(F32), np.dtype(F64)]


pytestmark = pytest.mark.usefixtures("numpy_engine")


def as_grad(values: Any, dtype: Any = F32) -> np.ndarray:
    return np.array(values, dtype)


def run(engine: Engine, grads: list[Any], dtype: Any = F32, shape: tuple[int, ...] = (2,), **clip: float) -> list[Any]:
    """All variables and slots after two steps with one variable per gradient."""
    opt = RMSprop(0.1, momentum=0.5, **clip)
    variables = ones(engine, *[dtype] * len(grads), shape=shape)
    for _ in range(2):
        opt.apply_gradients(zip(put(engine, grads), variables))
    return [*variables, *opt.weights]


def ones(engine: Engine, *dtypes: Any, shape: tuple[int, ...] = (2,)) -> list[Variable]:
    """A variable of each type."""
    return [engine.variable(np.ones(shape, dtype)) for dtype in dtypes]


def put(engine: Engine, grads: list[Any]) -> list[Any]:
    return [None if grad is None else engine.put(grad) for grad in grads]


def assert_same(got: list[Any], want: list[Any]) -> None:
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)


# --- by value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipvalue(dtype: np.dtype, engine: Engine):
    got = run(engine, [as_grad([3, -4], dtype), as_grad([0.25, -0.5], dtype)], dtype, clipvalue=0.5)
    assert_same(got, run(engine, [as_grad([0.5, -0.5], dtype), as_grad([0.25, -0.5], dtype)], dtype))


def test_clipvalue_of_infinity_and_nan(library: Engine):
    got = run(library, [as_grad([np.inf, -np.inf]), as_grad([np.nan, 1])], clipvalue=2.0)
    want = run(library, [as_grad([2, -2]), as_grad([np.nan, 1])])
    assert_same(got[:1], want[:1])
    assert np.isnan(got[1].numpy()).tolist() == [True, False]


def test_clipvalue_acts_on_sparse_values_before_they_are_summed(library: Engine):
    got = run(library, [IndexedSlices(as_grad([3, 4, -9]), np.array([0, 0, 1]))], clipvalue=1.0)
    assert_same(got, run(library, [IndexedSlices(as_grad([2, -1]), np.array([0, 1]))]))


def test_clipvalue_zero(library: Engine):
    assert_same(run(library, [as_grad([3, -4])], clipvalue=0.0), run(library, [as_grad([0, 0])]))


# --- by norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_clipnorm_is_per_variable(dtype: np.dtype, engine: Engine):
    grads = [as_grad([3, -4], dtype), as_grad([0.1, 0.2], dtype), as_grad([30, 40], dtype)]
    factors = [dtype.type(0.7 / 5), dtype.type(1), dtype.type(0.7 / 50)]
    want = run(engine, [g * f for g, f in zip(grads, factors, strict=True)], dtype)
    assert_same(run(engine, grads, dtype, clipnorm=0.7), want)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_global_clipnorm_is_over_the_call(dtype: np.dtype, engine: Engine):
    grads = [as_grad([2, -4], dtype), as_grad([5, 6], dtype)]  # squares sum to 81
    factor = dtype.type(0.7 / 9)
    assert_same(run(engine, grads, dtype, global_clipnorm=0.7), run(engine, [g * factor for g in grads], dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_clipped_16_bit_gradients_stay_in_float32(clip: str, dtype: np.dtype, engine: Engine):
    got = run(engine, [as_grad([3, -4], dtype)], dtype, **{clip: 0.7})
    assert_same(got, run(engine, [as_grad([3, -4], F32) * F32(0.7 / 5)], dtype))


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize(("scale", "limit"), [(1e-30, 1e-30), (1e30, 5.0)])
def test_norm_does_not_overflow_or_underflow_in_float32(scale: float, limit: float, clip: str, library: Engine):
    grad = as_grad([3, -4]) * F32(scale)
    norm = float(np.sqrt((grad.astype(F64) ** 2).sum()))
    got = run(library, [grad], **{clip: limit})
    assert_same(got, run(library, [grad * F32(limit / norm)]))


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_norm_accumulates_in_float64(clip: str, library: Engine):
    grad = np.ones(1001, F32)
    grad[0] = 4096  # 4096**2 + 1 is not a float32
    norm = float(np.sqrt(np.float64(4096**2 + 1000)))
    got = run(library, [grad], shape=(1001,), **{clip: 1.0})
    assert_same(got, run(library, [grad * F32(1.0 / norm)], shape=(1001,)))


@pytest.mark.parametrize("size", [1023, 1 << 16, (1 << 16) + 1, 3 * (1 << 16) + 1000])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("engine", ["numba", *DEVICE], indirect=True)
def test_norms_of_long_gradients_have_the_same_bits(dtype: np.dtype, size: int, engine: Engine):
    grads = [np.random.default_rng(k).standard_normal(size).astype(dtype) for k in range(2)]
    with running("numpy") as numpy:
        want = run(numpy, grads, dtype, (size,), global_clipnorm=1.0)
    assert_same(run(engine, grads, dtype, (size,), global_clipnorm=1.0), want)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_norm_of_a_sparse_gradient_is_that_of_its_values(clip: str, library: Engine):
    slices = IndexedSlices(as_grad([3, 4]), np.array([1, 1]))  # norm 5; summed it would be 7
    scaled = IndexedSlices(slices.values * F32(0.7 / 5), slices.indices)
    assert_same(run(library, [slices], **{clip: 0.7}), run(library, [scaled]))


def test_global_norm_over_dense_and_sparse_and_none(library: Engine):
    def grads(factor: np.float32) -> list[Any]:
        return [
            as_grad([2, -4]) * factor,
            IndexedSlices(as_grad([5, 6]) * factor, np.array([1, 1])),
        ]

    opt, expected_opt = RMSprop(0.1, global_clipnorm=0.7), RMSprop(0.1)
    x, y = (ones(library, F32, F32, F32) for _ in range(2))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        opt.apply_gradients(zip(put(library, [*grads(F32(1)), None]), x))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        expected_opt.apply_gradients(zip(put(library, [*grads(F32(0.7 / 9)), None]), y))
    assert_same(x, y)


def test_global_norm_over_dtypes(engine: Engine):
    grads = [as_grad([2, -4], dtype) for dtype in DTYPES]  # 4 * 20, and 1 more
    x, y = ([*ones(engine, *DTYPES), *ones(engine, F64, shape=(1,))] for _ in range(2))
    factor = 0.7 / 9
    compute = [F32, F32, F32, F64]
    scaled = [g.astype(c) * c(factor) for g, c in zip(grads, compute, strict=True)]
    RMSprop(0.1, global_clipnorm=0.7).apply_gradients(zip(put(engine, [*grads, np.ones(1)]), x))
    RMSprop(0.1).apply_gradients(zip(put(engine, [*scaled, np.full(1, factor)]), y))
    assert_same(x, y)


def test_same_variable_twice_counts_twice_in_the_global_norm(library: Engine):
    grads = [as_grad([2, -4]), as_grad([5, 6])]
    x, y = ones(library, F32, F32)
    RMSprop(0.1, global_clipnorm=0.7).apply_gradients([(library.put(g), x) for g in grads])
    RMSprop(0.1).apply_gradients([(library.put(g * F32(0.7 / 9)), y) for g in grads])
    assert_same_bits(x, y)


# --- order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_value_before_norm(clip: str, library: Engine):
    got = run(library, [as_grad([30, 4])], clipvalue=3.0, **{clip: 0.5})
    assert_same(got, run(library, [as_grad([3, 3])], **{clip: 0.5}))


def test_weight_decay_is_added_after_clipping(library: Engine):
    kwargs: dict[str, Any] = {"weight_decay": 0.5, "decoupled_weight_decay": False}
    assert_same(run(library, [as_grad([3, -4])], clipvalue=1.0, **kwargs), run(library, [as_grad([1, -1])], **kwargs))


# --- within the limit ---------------------------------------------------------------------------------------

TINY = float(np.finfo(F32).smallest_subnormal)


@pytest.mark.parametrize(
    ("clip", "limit"),
    [("clipnorm", 5.0), ("clipnorm", 5.5), ("global_clipnorm", 10.0), ("clipvalue", 4.0), ("clipvalue", 1e9)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_within_the_limit_is_unchanged(dtype: np.dtype, clip: str, limit: float, engine: Engine):
    grads = [as_grad([3, -4], dtype), as_grad([-0.0, 1 / 3], dtype), as_grad([TINY, -TINY], dtype)]
    assert_same(run(engine, grads, dtype, **{clip: limit}), run(engine, grads, dtype))


def test_zero_gradient_is_within_a_limit_of_zero(library: Engine):
    got = run(library, [as_grad([0, 0]), as_grad([3, 4])], clipnorm=0.0)
    assert_same(got, run(library, [as_grad([0, 0]), as_grad([0, 0])]))
    assert_same(run(library, [as_grad([0, 0])], global_clipnorm=0.0), run(library, [as_grad([0, 0])]))


# --- NaN and Inf --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_stays_in_its_own_gradient_with_clipnorm(bad: float, engine: Engine):
    good = as_grad([30, -40])
    got = run(engine, [as_grad([bad, 1]), good, IndexedSlices(good, np.array([0, 1]))], clipnorm=1.0)
    want = run(engine, [good, good, IndexedSlices(good, np.array([0, 1]))], clipnorm=1.0)
    assert_same(got[1:3], want[1:3])
    assert np.isnan(got[0].numpy()[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_nan_stays_in_the_call_with_global_clipnorm(bad: float, library: Engine):
    opt, expected_opt = RMSprop(0.1, global_clipnorm=1.0), RMSprop(0.1, global_clipnorm=1.0)
    hurt, fine, expected = ones(library, F32, F32, F32)
    opt.apply_gradients([(library.put(as_grad([bad, 1])), hurt)])
    opt.apply_gradients([(library.put(as_grad([3, 4])), fine)])
    expected_opt.apply_gradients([(library.put(as_grad([3, 4])), expected)])
    assert_same_bits(fine, expected)
    assert np.isnan(hurt.numpy()[0])


# --- precision of the variable's own step -------------------------------------------------------------------


def test_clipping_does_not_touch_other_calls(library: Engine):
    opt, expected_opt = RMSprop(0.1, clipnorm=1.0), RMSprop(0.1)
    var, expected = ones(library, F32, F32)
    for grad, factor in (([3, 4], 0.2), ([0.3, 0.4], 1.0), ([6, 8], 0.1)):
        opt.apply_gradients([(library.put(as_grad(grad)), var)])
        expected_opt.apply_gradients([(library.put(as_grad(grad) * F32(factor)), expected)])
    assert_same_bits(var, expected)
