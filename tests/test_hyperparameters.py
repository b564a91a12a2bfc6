"""Hyperparameters as attributes: numbers, 0-d arrays, callables and schedules, checks at every step."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from gpurms.schedules import ExponentialDecay, LearningRateSchedule
from tests.support import assert_same_bits, unchanged

NAMES = ("learning_rate", "rho", "momentum", "epsilon", "decay")
BAD = {  # hyperparameter -> (refused value, what the message says)
    "learning_rate": (-0.1, ">= 0"),
    "momentum": (1.5, "momentum"),
    "epsilon": (-1e-9, ">= 0"),
    "decay": (-0.5, ">= 0"),
}


pytestmark = pytest.mark.usefixtures("numpy_engine")


class Recorded(LearningRateSchedule):
    """A schedule that remembers the steps it was asked for."""

    def __init__(self, rate: Callable[[int], Any]) -> None:
        self.rate = rate
        self.steps: list[int] = []

    def __call__(self, step: Any) -> Any:
        self.steps.append(int(step))
        return self.rate(int(step))

    def get_config(self) -> dict[str, Any]:
        return {}


class Counted:
    """A hyperparameter callable that counts its calls."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return self.value


def reference(grads: list[float], lrs: list[float], rho: float, momentum: float, epsilon: float) -> float:
    """The update rule with momentum on Python floats, from 0."""
    var = rms = mom = 0.0
    for g, lr in zip(grads, lrs, strict=True):
        rms = rms + (g * g - rms) * (1 - rho)
        mom = momentum * mom + (lr * g) / math.sqrt(rms + epsilon)
        var = var - mom
    return var


def run(opt: RMSprop, grads: list[float]) -> float:
    var = Variable(np.array(0.0))
    for g in grads:
        opt.apply_gradients([(np.array(g), var)])
    return float(var.numpy())


# --- reading and setting ------------------------------------------------------------------------------------

NUMBERS = [1, 0.5, np.float32(0.1), np.float64(0.1), np.int32(1), np.array(0.25), np.array(0.1, np.float32)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_number_reads_back_as_a_python_float(name: str, value: Any):
    given = RMSprop(**{name: value})
    later = RMSprop()
    setattr(later, name, value)
    for opt in (given, later):
        assert type(getattr(opt, name)) is float
        assert getattr(opt, name) == float(value)
        assert type(opt.get_config()[name]) is float


@pytest.mark.parametrize("name", NAMES)
def test_zero_d_array_is_read_once(name: str):
    value = np.array(0.25)
    opt = RMSprop(**{name: value})
    value[...] = 0.5
    assert getattr(opt, name) == 0.25
    setattr(opt, name, value)
    value[...] = 0.75
    assert getattr(opt, name) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_callable_reads_as_its_current_value(name: str):
    source = Counted(0.25)
    opt = RMSprop(**{name: source})
    assert getattr(opt, name) == 0.25
    source.value = 1
    assert getattr(opt, name) == 1.0
    assert type(getattr(opt, name)) is float


@pytest.mark.parametrize("name", NAMES)
def test_callable_is_read_once_per_step(name: str):
    source = Counted(0.25)
    opt = RMSprop(**{name: source})
    variables = [Variable(np.ones(2)), Variable(np.ones((2, 2))), Variable(np.ones(3, np.float32))]
    for steps in (1, 2, 3):
        before = source.calls
        opt.apply_gradients([(np.ones(v.shape, v.dtype), v) for v in variables])
        assert source.calls == before + 1, f"step {steps}"


def test_callable_value_can_change_between_steps():
    rates = iter([0.5, 0.25, 0.125])
    opt = RMSprop(lambda: next(rates), rho=0.0, epsilon=0.0)
    assert run(opt, [1.0, 1.0, 1.0]) == -0.875


def test_schedule_reads_as_itself():
    schedule = ExponentialDecay(0.1, 10, 0.5)
    opt = RMSprop(schedule)
    assert opt.learning_rate is schedule
    opt.learning_rate = 0.5
    assert opt.learning_rate == 0.5
    opt.learning_rate = schedule
    assert opt.learning_rate is schedule


@pytest.mark.parametrize("name", ["rho", "momentum", "epsilon", "decay"])
def test_only_the_learning_rate_may_be_a_schedule(name: str):
    with pytest.raises((TypeError, ValueError), match=name):
        RMSprop(**{name: ExponentialDecay(0.1, 10, 0.5)})


def test_lr_is_an_alias():
    opt = RMSprop(0.25)
    assert opt.lr == 0.25
    opt.lr = 0.5
    assert opt.learning_rate == 0.5
    opt.learning_rate = 0.125
    assert opt.lr == 0.125


@pytest.mark.parametrize("first_step", [False, True], ids=["before the first step", "after it"])
@pytest.mark.parametrize("kind", ["number", "callable", "schedule"])
def test_set_learning_rate_counts_from_the_next_step(kind: str, first_step: bool):
    opt = RMSprop(0.5, rho=0.0, epsilon=0.0)
    var = Variable(np.array([4.0]))
    if first_step:
        opt.apply_gradients([(np.array([1.0]), var)])
    before = var.numpy()
    opt.learning_rate = {"number": 2, "callable": lambda: 2.0, "schedule": Recorded(lambda _: 2.0)}[kind]
    opt.apply_gradients([(np.array([1.0]), var)])
    assert var.numpy() == before - 2.0


@pytest.mark.parametrize("name", ["beta", "learningrate", "rms", "_no_such_thing"])
def test_unknown_attribute(name: str):
    opt = RMSprop()
    with pytest.raises(AttributeError, match=name):
        getattr(opt, name)


def test_unknown_attribute_in_an_augmented_assignment():
    opt = RMSprop()
    with pytest.raises(AttributeError, match="beta"):
        opt.beta += 1
    assert not hasattr(opt, "beta")


def test_unknown_attribute_cannot_be_set():
    opt = RMSprop(0.5)
    with pytest.raises(AttributeError, match="learningrate"):
        opt.learningrate = 0.1
    assert opt.learning_rate == 0.5


# --- checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_set_value_is_checked(name: str):
    value, message = BAD[name]
    opt = RMSprop(momentum=0.5)
    before = getattr(opt, name)
    with pytest.raises(ValueError, match=message):
        setattr(opt, name, value)
    assert getattr(opt, name) == before


def test_value_set_through_the_alias_is_checked():
    opt = RMSprop(0.5)
    with pytest.raises(ValueError, match=">= 0"):
        opt.lr = -1.0
    assert opt.lr == 0.5


@pytest.mark.parametrize("value", ["0.1", [0.1], np.array([0.1]), 1j], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_set_value_that_is_no_number(name: str, value: Any):
    opt = RMSprop(momentum=0.5)
    before = getattr(opt, name)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(opt, name, value)
    assert getattr(opt, name) == before


def stepped_pair(**kwargs: Any) -> tuple[RMSprop, Variable, Variable]:
    opt = RMSprop(**kwargs)
    seen, new = Variable(np.array([1.0, 2.0])), Variable(np.array([3.0]))
    opt.apply_gradients([(np.array([1.0, -1.0]), seen)])
    return opt, seen, new


@pytest.mark.parametrize("when", ["given", "set"])
@pytest.mark.parametrize("name", BAD)
def test_callable_result_is_checked_before_anything_changes(name: str, when: str):
    value, message = BAD[name]
    source = Counted(0.5)
    opt, seen, new = stepped_pair(**({name: source} if when == "given" else {}))
    if when == "set":
        setattr(opt, name, source)
    source.value = value
    with unchanged(opt, seen, new), pytest.raises(ValueError, match=message):
        opt.apply_gradients([(np.ones(2), seen), (np.ones(1), new)])


@pytest.mark.parametrize("value", ["0.1", {}, [0.1], np.array([0.1]), 1j], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_callable_result_that_is_no_number(name: str, value: Any):
    source = Counted(0.5)
    opt, seen, new = stepped_pair(**{name: source})
    source.value = value
    with unchanged(opt, seen, new), pytest.raises((TypeError, ValueError), match=name):
        opt.apply_gradients([(np.ones(2), seen), (np.ones(1), new)])


@pytest.mark.parametrize("value", [-0.5, "0.1", None], ids=repr)
def test_schedule_result_is_checked_before_anything_changes(value: Any):
    opt, seen, new = stepped_pair(learning_rate=Recorded(lambda step: 0.1 if step == 0 else value))
    with unchanged(opt, seen, new), pytest.raises((TypeError, ValueError), match="learning_rate"):
        opt.apply_gradients([(np.ones(2), seen), (np.ones(1), new)])


@pytest.mark.parametrize("name", NAMES)
def test_callable_that_raises_changes_nothing(name: str):
    opt, seen, new = stepped_pair()
    setattr(opt, name, lambda: {}["missing"])
    with unchanged(opt, seen, new), pytest.raises(KeyError, match="missing"):
        opt.apply_gradients([(np.ones(2), seen), (np.ones(1), new)])


def test_failed_first_step_leaves_no_counter():
    opt = RMSprop(lambda: -1.0)
    var = Variable(np.ones(2))
    with unchanged(opt, var), pytest.raises(ValueError, match=">= 0"):
        opt.apply_gradients([(np.ones(2), var)])
    assert opt.weights == []


# --- the learning rate of a step ----------------------------------------------------------------------------


def test_schedule_sees_the_counter_before_the_step():
    schedule = Recorded(lambda step: 0.5)
    opt = RMSprop(schedule)
    run(opt, [1.0, 1.0, 1.0])
    assert schedule.steps == [0, 1, 2]
    opt.iterations.assign(40)
    run(opt, [1.0])
    assert schedule.steps == [0, 1, 2, 40]


@pytest.mark.parametrize("decay", [0.0, 0.1, 1, np.array(0.3)], ids=repr)
@pytest.mark.parametrize("scheduled", [False, True], ids=["number", "schedule"])
def test_decay(decay: Any, scheduled: bool):
    rates = [0.1 / (step + 1) if scheduled else 0.1 for step in range(4)]
    opt = RMSprop(Recorded(lambda step: rates[step]) if scheduled else 0.1, momentum=0.3, decay=decay)
    lrs = [rate / (1 + float(decay) * step) for step, rate in enumerate(rates)]
    assert run(opt, [1.0, -2.0, 0.7, 3.0]) == reference([1.0, -2.0, 0.7, 3.0], lrs, 0.9, 0.3, 1e-7)


def test_decay_can_be_set_later():
    opt = RMSprop(0.5, rho=0.0, epsilon=0.0)
    assert run(opt, [1.0]) == -0.5
    opt.decay = 1.0
    assert run(opt, [1.0]) == -0.25


MAKES: dict[str, Callable[[float], Any]] = {
    "float": float,
    "callable": lambda x: lambda: x,
    "0-d array": np.array,
    "NumPy scalar": np.float64,
}


@pytest.mark.parametrize("make", MAKES)
def test_numbers_are_exact_in_float64_variables(make: str):
    number = MAKES[make]
    lr, rho, momentum, epsilon = 0.1, 0.7, 0.3, 1e-3
    opt = RMSprop(number(lr), rho=number(rho), momentum=number(momentum), epsilon=number(epsilon))
    grads = [1 / 3, -0.1, 2.7]
    assert run(opt, grads) == reference(grads, [lr] * 3, rho, momentum, epsilon)


# --- slots that appear later --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "slot"),
    [("momentum", 0.5, "momentum"), ("momentum", lambda: 0.0, "momentum"), ("centered", True, "mg")],
    ids=["momentum", "callable momentum", "centered"],
)
def test_slot_appears_at_the_next_step(name: str, value: Any, slot: str):
    opt = RMSprop(0.1)
    a, b = Variable(np.ones(2)), Variable(np.ones((2, 2)))
    pairs = [(np.ones(2), a), (np.ones((2, 2)), b)]
    opt.apply_gradients(pairs)
    weights = list(opt.weights)
    setattr(opt, name, value)
    assert opt.weights == weights
    opt.apply_gradients(pairs)
    assert opt.get_slot_names() == ["rms", slot]
    assert opt.weights == [*weights, opt.get_slot(a, slot), opt.get_slot(b, slot)]


def test_late_momentum_acts():
    opt, never = RMSprop(0.5, rho=0.0, epsilon=0.0), RMSprop(0.5, rho=0.0, epsilon=0.0, momentum=0.5)
    a, b = Variable(np.zeros(1)), Variable(np.zeros(1))
    opt.apply_gradients([(np.ones(1), a)])
    opt.momentum = 0.5
    for _ in range(2):
        opt.apply_gradients([(np.ones(1), a)])
        never.apply_gradients([(np.ones(1), b)])
    assert_same_bits(a.numpy(), b.numpy() - 0.5)


def test_late_slot_is_made_for_the_variables_of_the_call_only():
    opt = RMSprop(0.1)
    a, b = Variable(np.ones(2)), Variable(np.ones(2))
    opt.apply_gradients([(np.ones(2), a), (np.ones(2), b)])
    opt.momentum = 0.5
    opt.apply_gradients([(np.ones(2), b)])
    opt.get_slot(b, "momentum")
    with pytest.raises(KeyError, match="momentum"):
        opt.get_slot(a, "momentum")


def test_momentum_set_back_to_zero_keeps_its_slot():
    opt = RMSprop(0.5, rho=0.0, epsilon=0.0, momentum=0.5)
    var = Variable(np.zeros(1))
    opt.apply_gradients([(np.ones(1), var)])
    opt.momentum = 0.0
    opt.apply_gradients([(np.ones(1), var)])
    assert var.numpy() == [-1.0]
    assert opt.get_slot(var, "momentum").numpy() == [0.5]


def test_callable_momentum_always_has_its_slot():
    opt = RMSprop(0.1, momentum=lambda: 0.0)
    var = Variable(np.ones(1))
    opt.apply_gradients([(np.ones(1), var)])
    assert opt.get_slot_names() == ["rms", "momentum"]
