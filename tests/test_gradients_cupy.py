"""Gradients of computations on CuPy arrays: those that NumPy's arrays have, on the device of the variables."""

from collections.abc import Callable
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest

from gpurms import GradientTape, IndexedSlices, RMSprop, Variable, gather
from tests.engines import Engine, emulated
from tests.support import BFLOAT16, assert_same_bits, dense, host

X = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
C = np.array([[1.0, -2.0, 0.5], [-0.25, 1.0, 3.0]])
"""A constant, without a value of X in the same place."""

Function = Callable[[Any, Any], Any]
COMPUTATIONS: dict[str, Function] = {  # of a variable's value and a constant, both of shape (2, 3)
    "sum": lambda x, c: anp.sum(x * c),
    "sum of an axis": lambda x, c: anp.sum(x * x, axis=1),
    "sum of axes": lambda x, c: anp.sum(x[None] * c, axis=(0, -1)),
    "sum kept": lambda x, c: x / anp.sum(x * x, axis=0, keepdims=True),
    "sum of a number": lambda x, c: anp.sum(anp.sum(x)) ** 2,
    "method sum": lambda x, c: (x * x).sum(1),
    "mean": lambda x, c: anp.mean(x * x),
    "mean of an axis": lambda x, c: anp.mean(x * x, axis=0),
    "prod": lambda x, c: anp.prod(x, axis=1),
    "var": lambda x, c: anp.var(x, axis=1),
    "var with ddof": lambda x, c: anp.var(x, ddof=1),
    "std": lambda x, c: anp.std(x, axis=1),
    "std with ddof": lambda x, c: anp.std(x, ddof=1),
    "std of one": lambda x, c: anp.std(x[:, :1], axis=1),
    "max": lambda x, c: anp.max(x, axis=1),
    "max of equals": lambda x, c: anp.max(x * 0 + c[:, :1] ** 2, axis=1),
    "min": lambda x, c: anp.min(x * c),
    "power": lambda x, c: x**2,
    "power of zero": lambda x, c: (x * 0) ** 1 + x**0,
    "power of an array": lambda x, c: (x * x) ** c,
    "power of a number": lambda x, c: 2.0**x,
    "power of a scalar": lambda x, c: x ** np.float64(3.0),
    "where": lambda x, c: anp.where(c > 0, x * x, c),
    "where broadcast": lambda x, c: anp.where(c > 0, c, x[0] * x[1]),
    "constant first": lambda x, c: c / (5 - c * x) - c**2 + x,
    "comparison": lambda x, c: (x > c) * x * x,
    "abs": lambda x, c: anp.abs(x),
    "exp": lambda x, c: anp.exp(x) + anp.log(x * x) + anp.tanh(x),
    "sqrt": lambda x, c: anp.sqrt(x * x + 1),
    "logaddexp": lambda x, c: anp.logaddexp(0, x) + anp.logaddexp(c, x),
    "maximum": lambda x, c: anp.maximum(x, 0) + anp.minimum(x, c),
    "clip": lambda x, c: anp.clip(x, -0.8, 1.0),
    "broadcast": lambda x, c: x[0] * c + c[:, :1] * x,
    "matmul": lambda x, c: (x @ c.T) @ x,
    "matmul of a constant": lambda x, c: c.T @ x,
    "dot": lambda x, c: anp.dot(anp.dot(x, c.T), x),
    "dot with a vector": lambda x, c: anp.dot(x, x[1]),
    "dot of vectors": lambda x, c: anp.dot(x[0], x[1]),
    "dot with a scalar": lambda x, c: anp.dot(x, anp.sum(x)) + anp.dot(x[0, 0], x),
    "inner": lambda x, c: anp.inner(x, x * c),
    "inner with a scalar": lambda x, c: anp.inner(anp.sum(x), x),
    "outer": lambda x, c: anp.outer(x[0], x[1]),
    "tensordot": lambda x, c: anp.tensordot(x, x * c, axes=1 if x.shape[1] == 2 else ([1], [1])),
    "tensordot crossed": lambda x, c: anp.tensordot(x[None] * c[:, None], x[:, None] * c, axes=([2, 0], [2, 0])),
    "tensordot by count": lambda x, c: anp.tensordot(x, x.T, 1),
    "tensordot of one axis": lambda x, c: anp.tensordot(x, x, axes=(0, 0)),
    "einsum": lambda x, c: anp.einsum("ij,kj->ik", x, x * c),
    "einsum summed": lambda x, c: anp.einsum("ij,kj->k", x * x, c),
    "einsum implicit": lambda x, c: anp.einsum("ij,jk", x, x.T),
    "einsum ellipsis": lambda x, c: anp.einsum("...j,j->...", x * x, x[0]),
    "reshape": lambda x, c: x.reshape(3, 2) @ anp.reshape(x, (2, 3)),
    "reshape F": lambda x, c: anp.reshape(x * x, (3, 2), order="F"),
    "ravel": lambda x, c: x.ravel() * x.flatten(),
    "transposed": lambda x, c: anp.transpose(x, (1, 0)) @ anp.swapaxes(x, 0, 1).T,
    "axes": lambda x, c: anp.squeeze(anp.expand_dims(x, 0) * x[:, None].reshape(1, 2, 3)),
    "broadcast_to": lambda x, c: anp.broadcast_to(x[:1] * x[:1], (2, 3)) * c,
    "concatenate": lambda x, c: anp.concatenate([x * x, c, x], axis=1),
    "stack": lambda x, c: anp.vstack([anp.stack([x * x, x]), c[None]]),
    "hstack": lambda x, c: anp.hstack([x, x * x]),
    "array": lambda x, c: anp.array([x[0, 0] * x[1, 1], x[0, 1]]),
    "cumsum": lambda x, c: anp.cumsum(x * x, axis=1),
    "astype": lambda x, c: (x * x).astype("float32").astype("float64"),
    "row": lambda x, c: x[0] * x[-1],
    "slices": lambda x, c: x[1:, ::2] * x[0, None, ::-2],
    "element": lambda x, c: x[1, 2] ** 2,
    "rows": lambda x, c: x[[0, 1, 0]] ** 2,
    "rows of NumPy": lambda x, c: x[np.array([1, 1, 0])] ** 2,
    "pairs": lambda x, c: x[[0, 1, 0], [2, 0, 2]] ** 2,
    "mask": lambda x, c: x[c > 0] ** 2,
    "softmax": lambda x, c: anp.exp(x - anp.max(x, axis=1, keepdims=True)) / anp.sum(anp.exp(x), axis=1, keepdims=True),
}


def gradient_of(function: Function, put: Callable[[np.ndarray], Any]) -> tuple[Any, Any]:
    """The value of a computation and its gradient, each element weighted by another number."""
    var = Variable(put(X))
    with GradientTape() as tape:
        value = function(var.value, put(C))
    weights = 0.5 + 0.25 * np.arange(value.size).reshape(value.shape)
    return value._value, tape.gradient(value, var, put(weights))


def second_gradient_of(function: Function, put: Callable[[np.ndarray], Any]) -> Any:
    var = Variable(put(X))
    with GradientTape() as outer:
        with GradientTape() as inner:
            value = function(var.value, put(C))
        gradient = inner.gradient(value, var)
    return outer.gradient(anp.sum(gradient * put(C)), var)


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_values_and_gradients_are_those_of_numpy(device: Engine, name: str) -> None:
    expected_value, expected = gradient_of(COMPUTATIONS[name], np.array)
    value, gradient = gradient_of(COMPUTATIONS[name], device.put)
    assert type(value) is type(gradient) is device.xp.ndarray
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(value.get(), expected_value, rtol=1e-13)
    np.testing.assert_allclose(gradient.get(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_gradients_of_gradients_are_those_of_numpy(device: Engine, name: str) -> None:
    expected = second_gradient_of(COMPUTATIONS[name], np.array)
    got = second_gradient_of(COMPUTATIONS[name], device.put)
    if expected is None:
        assert got is None
    else:
        np.testing.assert_allclose(got.get(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
@pytest.mark.parametrize("name", ["mean", "std", "max", "power", "where", "dot", "inner", "concatenate"])
def test_gradients_of_small_types_stay_small(device: Engine, name: str, dtype: Any) -> None:
    var, constant = device.variable(X.astype(dtype)), device.put(C.astype(dtype))
    with GradientTape() as tape:
        value = COMPUTATIONS[name](var.value, constant)
    gradient = tape.gradient(value, var)
    assert value.dtype == gradient.dtype == dtype
    expected = Variable(X.astype(dtype).astype(np.float64))
    with GradientTape() as tape:
        value = COMPUTATIONS[name](expected.value, C.astype(dtype).astype(np.float64))
    expected = tape.gradient(value, expected)
    np.testing.assert_allclose(host(gradient).astype(np.float64), expected, rtol=0.05, atol=0.05)


def test_gradients_do_not_share_their_elements(device: Engine) -> None:
    """That of a sum is one number, repeated."""
    var = device.variable(np.ones((2, 3), np.float32))
    with GradientTape() as tape:
        loss = anp.sum(var.value)
    gradient = tape.gradient(loss, var)
    gradient[0, 0] = 5
    assert gradient.get().tolist() == [[5, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("weights", [[[1.0, -2.0]], np.array([[1.0, -2.0]]), np.array([[1, -2]])], ids=repr)
def test_output_gradients_may_be_on_the_host(device: Engine, weights: Any) -> None:
    var = device.variable(np.array([[3.0, 4.0]], np.float32))
    with GradientTape() as tape:
        value = var.value**2
    assert_same_bits(tape.gradient(value, var, output_gradients=weights), np.array([[6, -16]], np.float32))


def test_a_loss_of_no_dimensions_is_an_array(device: Engine) -> None:
    var = Variable(3.0)
    loss = var.value**2
    assert type(loss) is device.xp.ndarray
    with GradientTape() as tape:
        loss = var.value**2
    gradient = tape.gradient(loss, var, output_gradients=device.put(np.array(0.5)))
    assert type(gradient) is device.xp.ndarray
    assert_same_bits(gradient, np.array(3, np.float32))


def test_indexed_slices_are_on_the_device(device: Engine) -> None:
    table = device.variable(np.ones((4, 2), np.float32))
    with GradientTape() as tape:
        loss = anp.sum(gather(table, [[3, 1], [1, 0]])) + anp.sum(gather(table, device.put(np.array([2], np.int32))))
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, IndexedSlices)
    assert type(gradient.values) is type(gradient.indices) is device.xp.ndarray
    assert gradient.indices.get().tolist() == [3, 1, 1, 0, 2]
    assert_same_bits(gradient.values, np.ones((5, 2), np.float32))


def test_a_tape_inside_a_tape_reads_rows(device: Engine) -> None:
    table = device.variable(np.array([[1.0, 2.0], [3.0, 4.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            loss = anp.sum(gather(table, [1, 0, 1]) ** 3)
        gradient = inner.gradient(loss, table)
    second = outer.gradient(anp.sum(gradient.values), table)
    np.testing.assert_array_equal(dense(second, (2, 2)), [[6, 12], [36, 48]])


def test_variables_of_two_libraries_in_one_tape(device: Engine) -> None:
    there, here = device.variable(np.array([1.0, 2.0])), Variable(np.array([3.0, 4.0]))
    with GradientTape() as tape:
        first, second = anp.sum(there.value**2), anp.sum(here.value**3)
    gradients = tape.gradient(first, [there, here]), tape.gradient(second, [there, here])
    assert gradients[0][1] is gradients[1][0] is None
    assert_same_bits(gradients[0][0], np.array([2.0, 4.0]))
    assert_same_bits(gradients[1][1], np.array([27.0, 48.0]))


@pytest.mark.parametrize("operation", [lambda x: x * C, lambda x: C * x, lambda x: x @ C.T, lambda x: anp.dot(C, x.T)])
def test_libraries_do_not_mix(device: Engine, operation: Callable[[Any], Any]) -> None:
    var = device.variable(X)
    with pytest.raises(TypeError, match=r"numpy\.ndarray"), GradientTape():
        operation(var.value)


def test_variables_first_made_inside_a_tape(device: Engine) -> None:
    opt, made = RMSprop(0.5, rho=0.0, epsilon=0.0), []

    def loss() -> Any:
        if not made:
            made.append(device.variable(np.array([1.0, -2.0])))
        return anp.sum(made[0].value ** 2)

    opt.minimize(loss, lambda: made)
    assert made[0].numpy().tolist() == [0.5, -1.5]


def test_gradients_are_made_on_the_device_of_their_variable() -> None:
    with emulated(2):
        import cupy

        variables = []
        for number in (0, 1):
            with cupy.cuda.Device(number):
                variables.append(Variable(cupy.arange(6.0).reshape(3, 2)))
        with GradientTape() as tape:
            losses = []
            for number, variable in enumerate(variables):
                with cupy.cuda.Device(number):
                    losses.append(anp.sum(variable.value**2) + anp.sum(gather(variable, [1, 1])))
        gradients = [tape.gradient(loss, variable) for loss, variable in zip(losses, variables)]
        for number, gradient in enumerate(gradients):
            assert gradient.device.id == number
            assert gradient.get().tolist() == [[0, 2], [6, 8], [8, 10]]
        assert cupy.cuda.runtime.getDevice() == 0
        rows = gather(variables[1], [2, 0])
        assert rows.device.id == 1
        assert rows.get().tolist() == [[4, 5], [0, 1]]
