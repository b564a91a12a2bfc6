"""`minimize`, `get_gradients` and `get_updates`."""

from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable, gather
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, sign_sgd, unchanged

F32 = np.float32


def fails() -> Any:
    raise OSError("no data")


def test_example_of_the_page(library: Engine):
    opt, var = RMSprop(0.1), Variable(10.0)
    opt.minimize(lambda: var.value**2 / 2, [var])
    assert f"{var.numpy():.6f}" == "9.683772"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minimize_is_gradient_then_step(library: Engine, dtype: np.dtype):
    opt, expected_opt = RMSprop(0.1, momentum=0.5), RMSprop(0.1, momentum=0.5)
    var, expected = library.variable(np.array([1, -2], dtype)), library.variable(np.array([1, -2], dtype))
    factors = library.put(np.array([2, 4], dtype))
    for _ in range(3):
        opt.minimize(lambda: anp.sum(var.value * factors), [var])
        expected_opt.apply_gradients([(factors, expected)])
    assert_same_bits(var, expected)


def test_minimize_returns_the_new_count(library: Engine):
    opt, var = RMSprop(0.1), Variable(1.0)
    assert [int(opt.minimize(lambda: var.value**2, [var])) for _ in range(3)] == [1, 2, 3]
    assert np.asarray(opt.minimize(lambda: var.value**2, [var], name="step")).dtype == np.int64


def test_loss_is_called_once(library: Engine):
    calls = []
    opt, var = RMSprop(0.1), Variable(1.0)

    def loss() -> Any:
        calls.append(1)
        return var.value**2

    opt.minimize(loss, [var])
    assert calls == [1]


def test_non_scalar_loss_is_summed(library: Engine):
    opt, expected_opt = RMSprop(0.1), RMSprop(0.1)
    var, expected = library.variable(np.array([1, 2], F32)), library.variable(np.array([1, 2], F32))
    opt.minimize(lambda: var.value**2, [var])
    expected_opt.apply_gradients([(library.put(np.array([2, 4], F32)), expected)])
    assert_same_bits(var, expected)


@pytest.mark.parametrize(
    ("shape", "weights"), [((2,), np.array([3, -1], F32)), ((), np.array(-2, F32))], ids=["vector", "scalar"]
)
def test_grad_loss_weighs_the_loss(library: Engine, shape: tuple[int, ...], weights: np.ndarray):
    opt, expected_opt = RMSprop(0.1), RMSprop(0.1)
    var, expected = library.variable(np.ones(shape, F32)), library.variable(np.ones(shape, F32))
    opt.minimize(lambda: var.value**2, [var], grad_loss=library.put(weights))
    expected_opt.apply_gradients([(library.put(np.asarray(2 * weights)), expected)])
    assert_same_bits(var, expected)


# --- var_list -----------------------------------------------------------------------------------------------


def test_var_list_may_nest(library: Engine):
    opt, a, b, c = sign_sgd(), Variable(1.0), Variable(1.0), Variable(1.0)
    opt.minimize(lambda: a.value + 2 * b.value - c.value, [a, (b, [c])])
    assert [float(v.numpy()) for v in (a, b, c)] == [0.5, 0.5, 1.5]


@pytest.mark.parametrize("form", ["variable", "list", "tuple", "callable of one", "callable of a list"])
def test_forms_of_var_list(library: Engine, form: str):
    opt, var = sign_sgd(), Variable(1.0)
    forms: dict[str, Any] = {
        "variable": var,
        "list": [var],
        "tuple": (var,),
        "callable of one": lambda: var,
        "callable of a list": lambda: [[var]],
    }
    opt.minimize(lambda: var.value * 3, forms[form])
    assert var.numpy() == 0.5


def test_callable_var_list_is_evaluated_after_the_loss(library: Engine):
    opt = sign_sgd()
    variables: list[Variable] = []

    def loss() -> Any:  # builds its variable at the first call, as a model does
        if not variables:
            variables.append(Variable(1.0))
        return variables[0].value * 3

    opt.minimize(loss, lambda: variables)
    assert variables[0].numpy() == 0.5


def test_variables_outside_var_list_stay(library: Engine):
    opt, a, b = sign_sgd(), Variable(1.0), Variable(1.0)
    opt.minimize(lambda: a.value * b.value, [a])
    assert (a.numpy(), b.numpy()) == (0.5, 1.0)
    assert len(opt.weights) == 2


def test_embedding_rows(library: Engine):
    opt, table, plain = sign_sgd(), library.variable(np.ones((4, 2), F32)), library.put(np.ones((4, 2), F32))
    rows = np.array([2, 0, 2])
    opt.minimize(lambda: anp.sum(gather(table, rows)) - anp.sum(gather(plain, rows)), [table, plain])
    expected = np.ones((4, 2), F32)
    expected[[0, 2]] = 0.5
    assert_same_bits(table, expected)
    assert_same_bits(plain, 2 - expected)


@pytest.mark.parametrize("bad", [3, 1.5, "v", None, object], ids=repr)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [[x]]], ids=["bare", "list", "nested"])
def test_not_a_variable(library: Engine, bad: Any, wrap: Any):
    opt, var = RMSprop(0.1), Variable(1.0)
    with unchanged(opt, var), pytest.raises(ValueError):
        opt.minimize(lambda: var.value**2, wrap(bad) if bad is not object else [var, object()])


@pytest.mark.parametrize("dtype", [np.int64, bool, np.complex64, object])
def test_array_of_a_wrong_dtype(library: Engine, dtype: Any):
    opt, var, other = RMSprop(0.1), Variable(1.0), np.ones(2, dtype)
    if dtype is not object:  # which only NumPy has
        other = library.put(other)
    with unchanged(opt, var), pytest.raises(TypeError, match=np.dtype(dtype).name):
        opt.minimize(lambda: var.value**2, [var, other])


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [4.0, None, np.float32(1.0), np.ones(2), "loss", [1.0]], ids=repr)
@pytest.mark.parametrize("method", ["minimize", "get_gradients", "get_updates"])
def test_loss_must_be_callable(library: Engine, method: str, loss: Any):
    opt, var = RMSprop(0.1), Variable(1.0)
    with unchanged(opt, var), pytest.raises(TypeError, match="callable"):
        getattr(opt, method)(loss, [var])


@pytest.mark.parametrize("method", ["minimize", "get_gradients", "get_updates"])
def test_loss_that_raises_changes_nothing_and_leaves_no_tape_open(library: Engine, method: str):
    array = library.put(np.array([1, 2], F32))
    opt, var = RMSprop(0.1), Variable(array)
    with unchanged(opt, var), pytest.raises(OSError, match="no data"):
        getattr(opt, method)(lambda: (var.value, fails()), [var])
    assert var.value is array
    opt.minimize(lambda: anp.sum(var.value), [var])
    assert opt.iterations.numpy() == 1


def test_gather_out_of_range_inside_minimize_changes_nothing(library: Engine):
    opt, table = RMSprop(0.1), library.variable(np.ones((3, 2), F32))
    with unchanged(opt, table), pytest.raises(IndexError):
        opt.minimize(lambda: anp.sum(gather(table, np.array([0, 3]))), [table])
    assert type(table.value) is library.xp.ndarray


def test_minimize_warns_of_unconnected_variables(library: Engine):
    opt, a, b = sign_sgd(), Variable(1.0, name="a"), Variable(1.0, name="unconnected")
    with pytest.warns(UserWarning, match="Gradients do not exist for variables .*unconnected"):
        opt.minimize(lambda: a.value * 2, [a, b])
    assert (a.numpy(), b.numpy()) == (0.5, 1.0)


@pytest.mark.parametrize("loss", [lambda: 1.0, lambda: np.float32(2.0)], ids=["float", "scalar"])
def test_minimize_without_any_gradient(library: Engine, loss: Any):
    opt, var = RMSprop(0.1), Variable(1.0)
    with unchanged(opt, var), pytest.raises(ValueError, match="No gradients provided for any variable"):
        opt.minimize(loss, [var])


# --- get_gradients and get_updates --------------------------------------------------------------------------


def test_get_gradients(library: Engine):
    opt, a, table = RMSprop(0.1), library.variable(np.array([1, 2], F32)), library.variable(np.ones((3, 2), F32))
    with unchanged(opt, a, table):
        grads = opt.get_gradients(lambda: anp.sum(a.value**2) + anp.sum(gather(table, np.array([1]))), [table, a])
    assert isinstance(grads, list)
    assert isinstance(grads[0], IndexedSlices)
    assert_same_bits(grads[1], np.array([2, 4], F32))


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_get_gradients_are_unclipped(library: Engine, clip: str):
    opt, var = RMSprop(0.1, **{clip: 0.1}), library.variable(np.array([3, 4], F32))
    assert_same_bits(opt.get_gradients(lambda: var.value**2, [var])[0], np.array([6, 8], F32))


@pytest.mark.parametrize("method", ["get_gradients", "get_updates"])
def test_none_gradient_is_an_error(library: Engine, method: str):
    opt, a, b = RMSprop(0.1), Variable(1.0, name="a"), Variable(1.0, name="lonely")
    with unchanged(opt, a, b), pytest.raises(ValueError, match=r"Variable .*lonely.* has `None` for gradient"):
        getattr(opt, method)(lambda: a.value**2, [a, b])


@pytest.mark.parametrize("kwargs", [{}, {"clipnorm": 0.7}, {"clipvalue": 0.7}, {"global_clipnorm": 0.7}], ids=str)
@pytest.mark.parametrize("method", ["minimize", "get_updates"])
def test_gradients_are_clipped_once(library: Engine, method: str, kwargs: dict[str, float]):
    opt, expected_opt = RMSprop(0.1, **kwargs), RMSprop(0.1, **kwargs)
    var, expected = library.variable(np.array([3, 4], F32)), library.variable(np.array([3, 4], F32))
    getattr(opt, method)(lambda: var.value**2, [var])
    expected_opt.apply_gradients([(library.put(np.array([6, 8], F32)), expected)])
    assert_same_bits(var, expected)


def test_get_updates_returns_a_list_with_the_count(library: Engine):
    opt, var = sign_sgd(), Variable(1.0)
    for count in (1, 2):
        updates = opt.get_updates(lambda: var.value * 2, [var])
        assert isinstance(updates, list)
        assert updates == [count]
    assert var.numpy() == 0.0
