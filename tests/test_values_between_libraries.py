"""Values that callers hand over on purpose go wherever they are wanted; gradients stay where they are."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.engines import Engine, emulated
from tests.support import assert_same_bits

VALUES = np.array([[1.0, 2.0], [3.0, 4.0]])


@pytest.fixture(params=["to the device", "to the host"])
def pair(request: pytest.FixtureRequest, device: Engine) -> tuple[Any, Any]:
    """An array of zeros, and values on the other side."""
    if request.param == "to the device":
        return device.put(np.zeros((2, 2), np.float32)), VALUES
    return np.zeros((2, 2), np.float32), device.put(VALUES)


def test_assign(pair: tuple[Any, Any]) -> None:
    array, values = pair
    for given in (values, Variable(values), values.T.copy().T):
        array[...] = 0
        Variable(array).assign(given)
        assert_same_bits(array, VALUES.astype(np.float32))


def test_assign_checks_as_ever(pair: tuple[Any, Any]) -> None:
    array, values = pair
    var = Variable(array, name="w")
    with pytest.raises(ValueError, match=r"^variable 'w': expected shape \(2, 2\); got \(2,\)$"):
        var.assign(values[0])
    with pytest.raises(TypeError, match=r"^variable 'w': cannot convert complex128 to float32$"):
        var.assign(values * 1j)
    assert not var.numpy().any()


def test_slots_and_weights(pair: tuple[Any, Any]) -> None:
    array, values = pair
    opt = RMSprop(0.1)
    for name, initializer in (("rms", values), ("made", lambda shape, dtype: values)):
        slot = opt.add_slot(array, name, initializer)
        assert type(slot.value) is type(array)
        assert_same_bits(slot, VALUES.astype(np.float32))
    opt.iterations.assign(5)
    opt.set_weights([values[0, 0].astype(np.int64), values * 2, values * 3])
    assert opt.iterations.numpy() == 1
    assert [weight.tolist() for weight in opt.get_weights()[1:]] == [(VALUES * 2).tolist(), (VALUES * 3).tolist()]


def test_gradients_are_not_moved(pair: tuple[Any, Any]) -> None:
    array, values = pair
    opt = RMSprop(0.1)
    with pytest.raises(TypeError, match=r"is a (NumPy|CuPy) array, but its gradient a (NumPy|CuPy) array"):
        opt.apply_gradients([(values, array)])
    assert opt.weights == []


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_values_of_another_device(dtype: Any, strided: bool) -> None:
    with emulated(2):
        import cupy

        with cupy.cuda.Device(1):
            values = cupy.arange(8, dtype=dtype).reshape(2, 4)
            values = values[:, ::2] if strided else values[:, :2].copy()
        var = Variable(cupy.zeros((2, 2), np.float32))
        var.assign(values)
        assert var.value.device.id == 0
        assert var.numpy().tolist() == ([[0, 2], [4, 6]] if strided else [[0, 1], [4, 5]])
