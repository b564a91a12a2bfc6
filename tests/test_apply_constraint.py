"""Constraints: when they run, what they may return, and what a failing one leaves behind."""

from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, Variable
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, sign_sgd, unchanged

pytestmark = pytest.mark.usefixtures("numpy_engine")


def fails(x: np.ndarray) -> np.ndarray:
    raise LookupError("no bound known")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constraint_is_applied_after_the_update(dtype: np.dtype, library: Engine):
    array = library.put(np.array([1, 1], dtype))
    var = Variable(array, constraint=lambda x: np.maximum(x, 1))
    sign_sgd().apply_gradients([(library.put(np.array([2, -2], dtype)), var)])
    assert_same_bits(array, np.array([1, 1.5], dtype))
    assert var.value is array


def test_constraint_gets_an_array_of_the_variable(library: Engine):
    seen: list[Any] = []

    def record(x: Any) -> Any:
        seen.append((type(x), x.shape, x.dtype, x.tolist()))
        return x

    var = library.variable(np.array([[1.0, 2.0]]), constraint=record)
    sign_sgd().apply_gradients([(library.put(np.ones((1, 2))), var)])
    assert seen == [(library.xp.ndarray, (1, 2), np.float64, [[0.5, 1.5]])]


def test_constraints_run_after_all_updates_of_the_call():
    late = Variable(np.array([1.0]))
    seen: list[float] = []

    def record(x: np.ndarray) -> np.ndarray:
        seen.append(float(late.numpy()[0]))
        return x

    early = Variable(np.array([1.0]), constraint=record)
    sign_sgd().apply_gradients([(np.ones(1), early), (np.ones(1), late)])
    assert seen[-1] == 0.5


def test_constraint_acts_at_every_step(library: Engine):
    var = library.variable(np.array([1.0]), constraint=lambda x: np.maximum(x, 0.75))
    opt = sign_sgd()
    for _ in range(3):
        opt.apply_gradients([(library.put(np.ones(1)), var)])
        assert var.numpy() == [0.75]


def test_constraint_on_a_non_contiguous_variable(library: Engine):
    base = library.put(np.ones((3, 2)))
    var = Variable(base[:, 1], constraint=lambda x: x * 2)
    sign_sgd().apply_gradients([(library.put(np.ones(3)), var)])
    assert base.tolist() == [[1.0, 1.0]] * 3


def test_constraint_on_a_scalar(library: Engine):
    var = library.variable(np.array(1.0), constraint=abs)
    sign_sgd(learning_rate=3.0).apply_gradients([(library.put(np.array(1.0)), var)])
    assert_same_bits(var, np.array(2.0))


def test_constraint_is_that_of_the_handle_in_the_call(library: Engine):
    opt, array = sign_sgd(), library.put(np.array([1.0]))
    bounded = Variable(array, constraint=lambda x: np.maximum(x, 0.25))
    moved = []
    for handle in (array, bounded, Variable(array), bounded):
        opt.apply_gradients([(library.put(np.ones(1)), handle)])
        moved.append(float(array[0]))
    assert moved == [0.5, 0.25, -0.25, 0.25]


def test_sparse_gradient_is_refused_before_any_change(library: Engine):
    opt, put = sign_sgd(), library.put
    other, var = library.variable(np.ones(2)), library.variable(np.ones((2, 2)), "bounded", constraint=np.abs)
    opt.apply_gradients([(put(np.ones(2)), other), (put(np.ones((2, 2))), var)])
    slices = put(IndexedSlices(np.ones((1, 2)), np.array([0])))
    with unchanged(opt, other, var), pytest.raises(RuntimeError, match="bounded"):
        opt.apply_gradients([(put(np.ones(2)), other), (slices, var)])


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        (fails, LookupError, "no bound known"),
        (lambda x: x[:1], ValueError, r"(?s)bounded.*\(1,\)|\(1,\).*bounded"),
        (lambda x: x[:, None], ValueError, r"\(2, 1\)"),
        (lambda x: np.float64(1.0), ValueError, r"\(\)"),
    ],
    ids=["raises", "shorter", "another rank", "scalar"],
)
def test_failing_constraint_leaves_the_step_standing(
    constraint: Any, error: type[Exception], message: str, library: Engine
):
    opt, expected_opt, put = sign_sgd(momentum=0.5), sign_sgd(momentum=0.5), library.put
    other, var = library.variable(np.ones(2)), library.variable(np.ones(2), "bounded", constraint=constraint)
    expected_other, expected = (library.variable(np.ones(2)) for _ in range(2))
    with pytest.raises(error, match=message):
        opt.apply_gradients([(put(np.ones(2)), var), (put(-np.ones(2)), other)])
    expected_opt.apply_gradients([(put(np.ones(2)), expected), (put(-np.ones(2)), expected_other)])
    assert_same_bits(var, expected)
    assert_same_bits(other, expected_other)
    assert opt.iterations.numpy() == 1
    for slot, expected_slot in zip(opt.weights, expected_opt.weights, strict=True):
        assert_same_bits(slot, expected_slot)
