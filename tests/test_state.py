"""State: the counter, weights and their order, slots, `add_slot`, `add_weight`."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, full_rmsprop, sign_sgd, step, unchanged

F32 = np.float32


pytestmark = pytest.mark.usefixtures("numpy_engine")


# --- iterations ---------------------------------------------------------------------------------------------


def test_iterations_is_an_int64_scalar_variable():
    counter = RMSprop().iterations
    assert isinstance(counter, Variable)
    assert_same_bits(counter, np.array(0, np.int64))


def test_iterations_appears_at_the_first_access():
    opt = RMSprop()
    assert opt.weights == []
    counter = opt.iterations
    assert opt.weights == [counter]
    assert opt.iterations is counter


def test_iterations_appears_at_the_first_step(library: Engine):
    opt = RMSprop()
    step(opt, Variable(1.0))
    assert opt.weights[0] is opt.iterations
    assert opt.iterations.numpy() == 1


def test_every_call_counts_once(library: Engine):
    opt, a, b = RMSprop(0.1), Variable(1.0), Variable(2.0)
    step(opt, a, b, a)
    opt.minimize(lambda: a.value**2, [a])
    opt.get_updates(lambda: a.value**2, [a])
    opt.get_gradients(lambda: a.value**2, [a])
    assert opt.iterations.numpy() == 3


def test_iterations_can_be_set_before_it_exists():
    opt, counter = RMSprop(), Variable(np.array(7, np.int64))
    opt.iterations = counter
    assert opt.iterations is counter
    assert opt.weights == [counter]
    assert opt.apply_gradients([(np.ones(1), np.ones(1))]) == 8
    assert_same_bits(counter, np.array(8, np.int64))


@pytest.mark.parametrize("how", ["access", "step", "set"])
def test_iterations_cannot_be_replaced(how: str):
    opt, var = RMSprop(), Variable(1.0)
    if how == "access":
        _ = opt.iterations
    elif how == "step":
        step(opt, var)
    else:
        opt.iterations = Variable(np.array(1, np.int64))
    message = "^Cannot set `iterations` to a new Variable after the Optimizer weights have been created"
    with unchanged(opt, var), pytest.raises(RuntimeError, match=message):
        opt.iterations = Variable(np.array(5, np.int64))


def test_read_only_counter_is_refused_before_any_change():
    opt, var, count = RMSprop(0.1), Variable(np.ones(2)), np.array(3)
    count.flags.writeable = False

    def set_and_step() -> None:
        opt.iterations = Variable(count)
        step(opt, var)

    before = var.numpy()
    with pytest.raises((TypeError, ValueError)):
        set_and_step()
    assert_same_bits(var, before)
    assert opt.get_slot_names() == []


def test_iterations_assign_always_works(library: Engine):
    opt, var = sign_sgd(decay=1.0), library.variable(np.array([0.0]))
    opt.iterations.assign(3)
    step(opt, var)
    assert var.numpy() == [-0.125]
    opt.iterations.assign(0)
    step(opt, var)
    assert var.numpy() == [-0.625]
    assert opt.iterations.numpy() == 1


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_is_one_live_list(library: Engine):
    opt, var = full_rmsprop(), Variable(1.0)
    weights = opt.weights
    assert weights is opt.variables()
    assert weights == []
    step(opt, var)
    assert weights is opt.weights
    assert len(weights) == 4


def test_order_of_weights(library: Engine):
    opt = full_rmsprop()
    a, b, c, d = (library.variable(np.ones(n)) for n in (1, 2, 3, 4))
    step(opt, b, a)
    step(opt, c, a, d)
    slots = [(v, name) for call in ((b, a), (c, d)) for name in ("rms", "momentum", "mg") for v in call]
    assert opt.weights == [opt.iterations, *(opt.get_slot(v, name) for v, name in slots)]
    assert [w.shape for w in opt.weights] == [(), *(v.shape for v, _ in slots)]
    assert all(isinstance(w, Variable) for w in opt.weights)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ["rms"]),
        ({"momentum": 0.0}, ["rms"]),
        ({"momentum": np.array(0.0)}, ["rms"]),
        ({"momentum": 0.5}, ["rms", "momentum"]),
        ({"momentum": lambda: 0.0}, ["rms", "momentum"]),
        ({"centered": True}, ["rms", "mg"]),
        ({"momentum": 0.5, "centered": True}, ["rms", "momentum", "mg"]),
        ({"nesterov": True}, ["rms"]),
    ],
)
def test_only_slots_in_use_exist(kwargs: dict[str, Any], names: list[str]):
    opt, var = RMSprop(**kwargs), Variable(1.0)
    assert opt.get_slot_names() == []
    step(opt, var)
    assert opt.get_slot_names() == names
    assert opt.weights == [opt.iterations, *(opt.get_slot(var, name) for name in names)]


def test_slot_names_are_in_order_of_first_use(library: Engine):
    opt, var = RMSprop(centered=True), Variable(1.0)
    step(opt, var)
    opt.momentum = 0.5
    step(opt, var)
    assert opt.get_slot_names() == ["rms", "mg", "momentum"]


# --- slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 1, 3)], ids=str)
def test_slot_is_a_variable_of_equal_shape(shape: tuple[int, ...], dtype: np.dtype, library: Engine):
    opt, var = full_rmsprop(), library.variable(np.ones(shape, dtype))
    step(opt, var)
    for name in ("rms", "momentum", "mg"):
        slot = opt.get_slot(var, name)
        assert isinstance(slot, Variable)
        assert type(slot.value) is library.xp.ndarray
        assert slot.shape == shape
        assert slot.dtype == (F32 if dtype.itemsize == 2 else dtype)
        assert opt.get_slot(var, name) is slot


def test_slot_of_an_unknown_variable():
    opt, var = full_rmsprop(), Variable(1.0)
    step(opt, var)
    with pytest.raises(KeyError, match="stranger"):
        opt.get_slot(Variable(1.0, name="stranger"), "rms")


@pytest.mark.parametrize("name", ["momentum", "velocity"])
def test_slot_of_an_unknown_name(name: str):
    opt, var = RMSprop(), Variable(1.0, name="known")
    step(opt, var)
    with pytest.raises(KeyError, match=name):
        opt.get_slot(var, name)


INITIALIZERS: dict[str, tuple[Any, Any]] = {
    "zeros": ("zeros", [0, 0, 0]),
    "ones": ("ones", [1, 1, 1]),
    "callable": (lambda shape, dtype: np.full(shape, 2.5, dtype), [2.5, 2.5, 2.5]),
    "list": ([1, 2, 3], [1, 2, 3]),
    "array": (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
    "Variable": (Variable(np.array([4.0, 5.0, 6.0])), [4, 5, 6]),
}


@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_slot(dtype: np.dtype, initializer: str, library: Engine):
    given, expected = INITIALIZERS[initializer]
    opt, var = RMSprop(), library.variable(np.ones(3, dtype))
    slot = opt.add_slot(var, "rms", given)
    assert_same_bits(slot, np.array(expected, F32 if dtype.itemsize == 2 else dtype))
    assert opt.get_slot(var, "rms") is slot
    assert opt.get_slot_names() == ["rms"]
    assert type(slot.value) is library.xp.ndarray
    assert slot.value is not given


def test_add_slot_from_where_the_variable_is(library: Engine):
    given = library.put(np.array([1.0, 2.0, 3.0]))
    for initializer in (given, Variable(given), lambda shape, dtype: given):
        slot = RMSprop().add_slot(library.variable(np.ones(3, F32)), "rms", initializer)
        assert_same_bits(slot, np.array([1, 2, 3], F32))
    slot.assign([0, 0, 0])
    assert_same_bits(given, np.array([1.0, 2.0, 3.0]))


def test_add_slot_defaults_to_zeros(library: Engine):
    slot = full_rmsprop().add_slot(library.variable(np.ones(3)), "mg")
    assert_same_bits(slot, np.zeros(3))


def test_initializer_gets_shape_and_dtype_of_the_slot():
    seen = []

    def initializer(shape: Any, dtype: Any) -> np.ndarray:
        seen.append((tuple(shape), np.dtype(dtype)))
        return np.zeros(shape, dtype)

    RMSprop().add_slot(Variable(np.ones((2, 3), np.float16)), "rms", initializer)
    assert seen == [((2, 3), np.dtype(F32))]


def test_added_slot_is_the_one_the_step_uses(library: Engine):
    opt, var = RMSprop(1.0, rho=0.5, epsilon=0.0), library.variable(np.array([0.0]))
    slot = opt.add_slot(var, "rms", [7.0])
    opt.apply_gradients([(library.put(np.array([1.0])), var)])
    assert slot.numpy() == [4.0]
    assert var.numpy() == [-0.5]
    assert opt.weights == [opt.iterations, slot]


def test_add_slot_returns_an_existing_slot_as_it_is(library: Engine):
    opt, var = full_rmsprop(), library.variable(np.ones(3))
    step(opt, var)
    with unchanged(opt, var):
        assert opt.add_slot(var, "rms", "ones") is opt.get_slot(var, "rms")


def test_counter_is_first_also_after_add_slot():
    opt, var = RMSprop(), Variable(np.ones(3))
    slot = opt.add_slot(var, "rms")
    assert opt.weights in ([], [opt.weights[0], slot] if opt.weights else [])
    assert opt.iterations.numpy() == 0
    assert opt.weights == [opt.iterations, slot]


@pytest.mark.parametrize("initializer", [[1.0, 2.0], np.ones((3, 1)), 1.0, lambda shape, dtype: np.ones(4)])
def test_add_slot_value_of_a_wrong_shape(initializer: Any, library: Engine):
    opt, var = RMSprop(), library.variable(np.ones(3))
    with unchanged(opt, var), pytest.raises(ValueError, match=r"\(3,\)"):
        opt.add_slot(var, "rms", initializer)


def test_add_slot_with_an_unknown_initializer():
    opt, var = RMSprop(), Variable(np.ones(3))
    with unchanged(opt, var), pytest.raises(ValueError, match="twos"):
        opt.add_slot(var, "rms", "twos")


# --- add_weight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, np.zeros((2, 3), F32)),
        ({"dtype": "float64", "initializer": "ones"}, np.ones((2, 3))),
        ({"dtype": np.float16, "initializer": lambda s, d: np.full(s, 3, d)}, np.full((2, 3), 3, np.float16)),
        ({"dtype": "int64"}, np.zeros((2, 3), np.int64)),
        ({"initializer": [[1, 2, 3], [4, 5, 6]]}, np.array([[1, 2, 3], [4, 5, 6]], F32)),
        ({"trainable": False, "synchronization": None, "aggregation": None}, np.zeros((2, 3), F32)),
    ],
)
def test_add_weight(kwargs: dict[str, Any], expected: np.ndarray, library: Engine):
    opt = RMSprop()
    weight = opt.add_weight("ema", (2, 3), **kwargs)
    assert type(weight.value) is library.xp.ndarray
    assert weight.name == "ema"
    assert_same_bits(weight, expected)
    assert opt.weights == []


def test_add_weight_of_a_scalar_stays_out_of_weights():
    opt, var = RMSprop(), Variable(1.0)
    step(opt, var)
    with unchanged(opt, var):
        assert opt.add_weight("scale", ()).shape == ()
    assert len(opt.get_weights()) == 2
