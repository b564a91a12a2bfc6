"""Schedules: values, configs, copies, and every error."""

import copy
import json
import math
import pickle

import numpy as np
import pytest

from gpurms import schedules
from gpurms.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
    deserialize,
    serialize,
)

# One per class with every argument away from its default; configs list the keys in the order of tf.keras.
CONFIGS = [
    (
        ExponentialDecay(0.5, 7, 0.8, staircase=True, name="e"),
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8, "staircase": True, "name": "e"},
    ),
    (
        PiecewiseConstantDecay([4, 11.5], (0.5, 0.25, 1), name="c"),
        {"boundaries": [4, 11.5], "values": [0.5, 0.25, 1], "name": "c"},
    ),
    (
        PolynomialDecay(0.5, 7, 0.01, 2.0, cycle=True, name="p"),
        {
            "initial_learning_rate": 0.5,
            "decay_steps": 7,
            "end_learning_rate": 0.01,
            "power": 2.0,
            "cycle": True,
            "name": "p",
        },
    ),
    (
        InverseTimeDecay(0.5, 7, 0.8, staircase=True, name="i"),
        {"initial_learning_rate": 0.5, "decay_steps": 7, "decay_rate": 0.8, "staircase": True, "name": "i"},
    ),
    (
        CosineDecay(0.5, 7, alpha=0.1, name="k"),
        {"initial_learning_rate": 0.5, "decay_steps": 7, "alpha": 0.1, "name": "k"},
    ),
    (
        CosineDecayRestarts(0.5, 7, t_mul=1.5, m_mul=0.9, alpha=0.1, name="r"),
        {
            "initial_learning_rate": 0.5,
            "first_decay_steps": 7,
            "t_mul": 1.5,
            "m_mul": 0.9,
            "alpha": 0.1,
            "name": "r",
        },
    ),
]
IDS = [type(schedule).__name__ for schedule, _ in CONFIGS]

VALUES = [
    (ExponentialDecay(0.1, 10, 0.5), {0: 0.1, 5: 0.1 * math.sqrt(0.5), 10: 0.05, 30: 0.0125}),
    (ExponentialDecay(0.1, 10, 0.5, staircase=True), {0: 0.1, 9: 0.1, 10: 0.05, 19: 0.05, 20: 0.025}),
    (ExponentialDecay(0.1, 10, 0), {0: 0.1, 1: 0.0}),
    (
        PiecewiseConstantDecay([4, 11], [3.0, 2.0, 1.0]),
        {0: 3.0, 4: 3.0, 5: 2.0, 11: 2.0, 12: 1.0, 10**9: 1.0},
    ),
    (PiecewiseConstantDecay([], [3.0]), {0: 3.0, 7: 3.0}),
    (PolynomialDecay(1.0, 10, 0.5), {0: 1.0, 5: 0.75, 10: 0.5, 11: 0.5, 1000: 0.5}),
    (PolynomialDecay(1.0, 10), {10: 0.0001}),
    (PolynomialDecay(1.0, 10, 0.0, power=2), {0: 1.0, 5: 0.25, 10: 0.0}),
    (PolynomialDecay(1.0, 10, 0.0, power=0.5, cycle=True), {0: 1.0, 10: 0.0, 11: math.sqrt(9 / 20), 20: 0.0}),
    (InverseTimeDecay(0.1, 10, 0.5), {0: 0.1, 5: 0.08, 10: 0.1 / 1.5, 20: 0.05}),
    (InverseTimeDecay(0.1, 10, 0.5, staircase=True), {9: 0.1, 10: 0.1 / 1.5, 19: 0.1 / 1.5, 20: 0.05}),
    (CosineDecay(0.2, 8), {0: 0.2, 2: 0.1 * (1 + math.sqrt(0.5)), 4: 0.1, 8: 0.0, 99: 0.0}),
    (CosineDecay(0.2, 8, alpha=0.5), {0: 0.2, 4: 0.15, 8: 0.1, 99: 0.1}),
    # periods [0, 10), [10, 30), [30, 70): each as high as the first
    (CosineDecayRestarts(0.2, 10), {0: 0.2, 5: 0.1, 10: 0.2, 20: 0.1, 30: 0.2, 50: 0.1, 70: 0.2}),
    (CosineDecayRestarts(0.2, 10, m_mul=0.5), {0: 0.2, 5: 0.1, 10: 0.1, 20: 0.05, 30: 0.05, 50: 0.025}),
    (CosineDecayRestarts(0.2, 10, t_mul=1), {0: 0.2, 5: 0.1, 10: 0.2, 15: 0.1, 10**7: 0.2, 10**7 + 5: 0.1}),
    (CosineDecayRestarts(0.2, 10, t_mul=1, m_mul=0.5, alpha=0.5), {0: 0.2, 5: 0.15, 10: 0.15, 15: 0.125}),
]


@pytest.mark.parametrize(("schedule", "values"), VALUES, ids=lambda x: repr(x) if not isinstance(x, dict) else "")
def test_value(schedule, values):
    for step, expected in values.items():
        rate = schedule(step)
        assert type(rate) is float
        assert rate == pytest.approx(expected, rel=1e-14, abs=1e-17), step


@pytest.mark.parametrize("t_mul", [1, 1.25, 1.5, 2, 3, 10])
def test_every_restart_begins_at_the_top(t_mul):
    schedule = CosineDecayRestarts(0.2, 1000, t_mul=t_mul)
    start = 0.0
    for k in range(30 if t_mul <= 2 else 12):
        assert schedule(math.ceil(start)) > 0.199, k
        assert k == 0 or schedule(math.ceil(start) - 1) < 1e-6, k
        start += 1000 * t_mul**k


def test_polynomial_cycle_never_goes_below_zero_by_rounding():
    # In float64 63 / (0.7 * 90) > 1, and a base below 0 with a fractional power has no real value.
    assert PolynomialDecay(1.0, 0.7, 0.0, power=0.5, cycle=True)(63) == 0


@pytest.mark.parametrize(
    "step",
    [6, 6.0, np.int32(6), np.int64(6), np.uint8(6), np.float32(6), np.array(6)],
    ids=lambda step: type(step).__name__,
)
@pytest.mark.parametrize("schedule", [schedule for schedule, _ in CONFIGS], ids=IDS)
def test_step_may_be_any_integer_scalar(schedule, step):
    assert type(schedule(step)) is float
    assert schedule(step) == schedule(6)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (math.nan, ValueError), ("6", TypeError)])
def test_bad_step(step, error):
    with pytest.raises(error, match="step must be"):
        CosineDecay(0.1, 10)(step)


@pytest.mark.parametrize(("schedule", "config"), CONFIGS, ids=IDS)
def test_config(schedule, config):
    got = schedule.get_config()
    assert got == config
    assert list(got) == list(config)
    assert type(schedule).from_config(got).get_config() == config
    assert json.loads(json.dumps(got)) == config
    assert got == config, "from_config must not modify its argument"


@pytest.mark.parametrize(("schedule", "config"), CONFIGS, ids=IDS)
def test_serialize_and_back(schedule, config):
    serialized = serialize(schedule)
    assert serialized == {"class_name": type(schedule).__name__, "config": config}
    keras3 = {
        **serialized,
        "module": "keras.optimizers.schedules",
        "registered_name": None,
        "build_config": {},
    }
    for form in (serialized, json.loads(json.dumps(serialized)), keras3):
        back = deserialize(form)
        assert type(back) is type(schedule)
        assert back.get_config() == config


@pytest.mark.parametrize(("schedule", "config"), CONFIGS, ids=IDS)
def test_copies_and_repr(schedule, config):
    for twin in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert twin.get_config() == config
        assert twin(5) == schedule(5)
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert {schedule: 1}[copy.deepcopy(schedule)] == 1


def test_a_schedule_is_immutable():
    with pytest.raises(AttributeError):
        CosineDecay(0.1, 10).decay_steps = 0


def test_arguments_may_be_numpy_scalars_and_arrays():
    schedule = PolynomialDecay(np.float32(0.5), np.int64(10), np.array(0.25), cycle=np.True_)
    assert schedule == PolynomialDecay(0.5, 10, 0.25, cycle=True)
    config = schedule.get_config()
    assert [type(value) for value in config.values()] == [float, int, float, float, bool, type(None)]
    piecewise = PiecewiseConstantDecay(np.array([3, 9]), np.array([1.0, 0.5, 0.25]))
    assert json.dumps(piecewise.get_config()["boundaries"]) == "[3, 9]"


def test_config_lists_are_not_shared():
    schedule = PiecewiseConstantDecay([3], [1.0, 0.5])
    schedule.get_config()["values"].clear()
    assert schedule(9) == 0.5


ERRORS = [
    (
        lambda: ExponentialDecay("0.1", 7, 0.8),
        TypeError,
        "initial_learning_rate must be a real number; got '0.1'",
    ),
    (
        lambda: ExponentialDecay(True, 7, 0.8),
        TypeError,
        "initial_learning_rate must be a real number; got True",
    ),
    (lambda: ExponentialDecay(1j, 7, 0.8), TypeError, "initial_learning_rate must be a real number"),
    (lambda: ExponentialDecay([0.1], 7, 0.8), TypeError, "initial_learning_rate must be a real number"),
    (
        lambda: ExponentialDecay(np.array([0.1]), 7, 0.8),
        TypeError,
        "initial_learning_rate must be a real number",
    ),
    (lambda: ExponentialDecay(math.nan, 7, 0.8), ValueError, "initial_learning_rate must be finite; got nan"),
    (lambda: ExponentialDecay(0.1, 0, 0.8), ValueError, "ExponentialDecay: decay_steps must be > 0; got 0"),
    (lambda: ExponentialDecay(0.1, math.inf, 0.8), ValueError, "decay_steps must be finite; got inf"),
    (lambda: ExponentialDecay(0.1, 7, -0.8), ValueError, "decay_rate must be >= 0; got -0.8"),
    (lambda: ExponentialDecay(0.1, 7, 0.8, staircase=1), TypeError, "staircase must be True or False; got 1"),
    (lambda: ExponentialDecay(0.1, 7, 0.8, name=3), TypeError, "name must be a string or None; got 3"),
    (lambda: InverseTimeDecay(0.1, -7, 0.8), ValueError, "InverseTimeDecay: decay_steps must be > 0; got -7"),
    (lambda: InverseTimeDecay(0.1, 7, None), TypeError, "decay_rate must be a real number; got None"),
    (lambda: PolynomialDecay(0.1, 0.0), ValueError, "decay_steps must be > 0; got 0.0"),
    (lambda: PolynomialDecay(0.1, 7, None), TypeError, "end_learning_rate must be a real number"),
    (lambda: PolynomialDecay(0.1, 7, power=-1), ValueError, "power must be >= 0; got -1"),
    (lambda: PolynomialDecay(0.1, 7, cycle="no"), TypeError, "cycle must be True or False; got 'no'"),
    (lambda: CosineDecay(0.1, 0), ValueError, "CosineDecay: decay_steps must be > 0; got 0"),
    (lambda: CosineDecay(0.1, 7, alpha="x"), TypeError, "alpha must be a real number"),
    (lambda: CosineDecayRestarts(0.1, 0), ValueError, "first_decay_steps must be > 0; got 0"),
    (lambda: CosineDecayRestarts(0.1, 7, t_mul=0.5), ValueError, "t_mul must be >= 1; got 0.5"),
    (lambda: CosineDecayRestarts(0.1, 7, m_mul=-1), ValueError, "m_mul must be >= 0; got -1"),
    (
        lambda: PiecewiseConstantDecay([3], [1.0]),
        ValueError,
        "the length of boundaries must be 1 less than the length of values; got 1 boundaries and 1 values",
    ),
    (lambda: PiecewiseConstantDecay([3, 3], [1, 2, 3]), ValueError, "boundaries must be strictly increasing"),
    (lambda: PiecewiseConstantDecay([9, 3], [1, 2, 3]), ValueError, "strictly increasing; got [9, 3]"),
    (
        lambda: PiecewiseConstantDecay(3, [1, 2]),
        TypeError,
        "boundaries must be a sequence of real numbers; got 3",
    ),
    (
        lambda: PiecewiseConstantDecay([3], "12"),
        TypeError,
        "values must be a sequence of real numbers; got '12'",
    ),
    (lambda: PiecewiseConstantDecay([3], [1, "2"]), TypeError, "values[1] must be a real number; got '2'"),
    (
        lambda: CosineDecay.from_config({"initial_learning_rate": 1, "decay_steps": 2, "beta": 3}),
        TypeError,
        "beta",
    ),
    (lambda: serialize(0.1), TypeError, "expected a LearningRateSchedule; got 0.1"),
    (lambda: serialize(OnlyCall()), NotImplementedError, "OnlyCall must override get_config"),
    (lambda: deserialize(None), ValueError, "Improper config format"),
    (lambda: deserialize("CosineDecay"), ValueError, "Improper config format"),
    (lambda: deserialize(CosineDecay(0.1, 10)), ValueError, "Improper config format"),
    (lambda: deserialize({}), ValueError, "Improper config format"),
    (lambda: deserialize({"class_name": "CosineDecay"}), ValueError, "Improper config format"),
    (
        lambda: deserialize({"class_name": "CosineDecay", "config": None}),
        ValueError,
        "Improper config format",
    ),
    (lambda: deserialize({"class_name": None, "config": {}}), ValueError, "Improper config format"),
    (lambda: deserialize({"class_name": "Nope", "config": {}}), ValueError, "Unknown decay: Nope"),
    (lambda: deserialize({"class_name": "serialize", "config": {}}), ValueError, "Unknown decay: serialize"),
]


class OnlyCall(LearningRateSchedule):
    def __call__(self, step):
        return 1.0 / (1 + step)


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[f"{k}" for k in range(len(ERRORS))])
def test_error(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_negative_rates_are_the_optimizer_s_to_refuse():
    assert PiecewiseConstantDecay([3], [0.1, -0.1])(4) == -0.1


def test_warm_up_of_keras_3_is_dropped_when_off_and_refused_when_on():
    config = {"initial_learning_rate": 0.1, "decay_steps": 10, "alpha": 0.0, "name": "CosineDecay"}
    off = {**config, "warmup_target": None, "warmup_steps": 0}
    assert deserialize({"class_name": "CosineDecay", "config": off}).get_config() == config
    assert set(off) > set(config), "the argument must not be modified"
    for on in ({"warmup_target": 0.2, "warmup_steps": 5}, {"warmup_target": 0.0}, {"warmup_steps": 5}):
        with pytest.raises(ValueError, match=next(iter(on))):
            deserialize({"class_name": "CosineDecay", "config": {**config, **on}})


class Halving(LearningRateSchedule):
    def __init__(self, start, name=None):
        self.start = start
        self.name = name

    def __call__(self, step):
        return self.start / 2 ** int(step)

    def get_config(self):
        return {"start": self.start, "name": self.name}


def test_custom_objects():
    config = serialize(Halving(0.5))
    assert config == {"class_name": "Halving", "config": {"start": 0.5, "name": None}}
    with pytest.raises(ValueError, match="Unknown decay: Halving"):
        deserialize(config)
    assert deserialize(config, custom_objects={"Halving": Halving})(2) == 0.125
    mine = {"class_name": "CosineDecay", "config": {"start": 0.5}}
    assert type(deserialize(mine, custom_objects={"CosineDecay": Halving})) is Halving


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        LearningRateSchedule()
