"""`get_config` and `from_config`: order, Python numbers, round trips, schedules, refusals."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from gpurms.schedules import ExponentialDecay, LearningRateSchedule, PolynomialDecay
from tests.support import OPTIONS

BASE = ["learning_rate", "decay", "rho", "momentum", "epsilon", "centered"]


pytestmark = pytest.mark.usefixtures("numpy_engine")


class Halving(LearningRateSchedule):
    """A user's schedule."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: Any) -> float:
        return self.start / 2 ** int(step)

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}


# --- get_config ---------------------------------------------------------------------------------------------


def test_default():
    assert RMSprop().get_config() == {
        "name": "RMSprop",
        "learning_rate": 0.001,
        "decay": 0.0,
        "rho": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-7,
        "centered": False,
    }


@pytest.mark.parametrize(
    ("kwargs", "keys"),
    [
        ({}, ["name", *BASE]),
        ({"clipvalue": 1.0, "clipnorm": 2.0}, ["name", "clipnorm", "clipvalue", *BASE]),
        ({"global_clipnorm": 3.0, "clipvalue": 1.0}, ["name", "clipvalue", "global_clipnorm", *BASE]),
        ({"nesterov": True, "clipnorm": 1}, ["name", "clipnorm", *BASE, "nesterov"]),
        ({"weight_decay": 0.5, "centered": True}, ["name", *BASE, "weight_decay"]),
    ],
    ids=str,
)
def test_order(kwargs: dict[str, Any], keys: list[str]):
    assert list(RMSprop(**kwargs).get_config()) == keys


def test_numbers_are_python_floats():
    options = ("clipnorm", "clipvalue", "weight_decay", "initial_accumulator_value")
    opt = RMSprop(1, rho=np.float32(0.5), momentum=1, epsilon=np.array(1), decay=2, **dict.fromkeys(options, 1))
    config = opt.get_config()
    for name in (*BASE[:-1], *options):
        assert type(config[name]) is float, name
    assert config["centered"] is False


def test_callables_are_evaluated():
    opt = RMSprop(lambda: 0.5, rho=lambda: 0.25, momentum=lambda: 1, epsilon=lambda: 0.125, decay=lambda: 2)
    config = opt.get_config()
    assert [config[name] for name in BASE[:-1]] == [0.5, 2.0, 0.25, 1.0, 0.125]
    assert {type(config[name]) for name in BASE[:-1]} == {float}


def test_current_values():
    opt = RMSprop()
    opt.learning_rate, opt.momentum, opt.centered = 0.5, 0.25, True
    config = opt.get_config()
    assert (config["learning_rate"], config["momentum"], config["centered"]) == (0.5, 0.25, True)


EXPONENTIAL = {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5, "staircase": True}


def test_schedule():
    config = RMSprop(ExponentialDecay(**EXPONENTIAL)).get_config()
    assert config["learning_rate"] == {"class_name": "ExponentialDecay", "config": {**EXPONENTIAL, "name": None}}


# --- round trips --------------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "default": {},
    "numbers": {"learning_rate": 0.1, "rho": 0.7, "momentum": 0.3, "epsilon": 0.0, "decay": 0.2, "name": "mine"},
    "clips": {"clipnorm": 1.0, "clipvalue": 0.0},
    "global clip": {"global_clipnorm": 0.5},
    "schedule": {"learning_rate": PolynomialDecay(0.1, 100)},
    "options": {"centered": True, **OPTIONS},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip(name: str):
    config = RMSprop(**ROUND_TRIPS[name]).get_config()
    through_json = json.loads(json.dumps(config))
    assert through_json == config
    again = RMSprop.from_config(through_json).get_config()
    assert again == config
    assert list(again) == list(config)


def test_restored_optimizer_steps_the_same():
    opt = RMSprop(**{**ROUND_TRIPS["options"], **ROUND_TRIPS["schedule"], "momentum": 0.5})
    steps = []
    for each in (opt, RMSprop.from_config(opt.get_config())):
        var = Variable(np.array([1.0, -2.0]))
        for _ in range(3):
            each.apply_gradients([(np.array([1.0, 3.0]), var)])
        steps.append([w.tolist() for w in (var.numpy(), *each.get_weights())])
    assert steps[0] == steps[1]


def test_argument_is_not_modified():
    schedule = {"class_name": "ExponentialDecay", "config": {**EXPONENTIAL, "name": None}}
    config = {"lr": schedule, "use_ema": False, "jit_compile": False, "rho": 0.5}
    before = copy.deepcopy(config)
    RMSprop.from_config(config)
    assert config == before
    assert list(config) == list(before)


def test_lr_is_accepted():
    assert RMSprop.from_config({"lr": 0.5}).learning_rate == 0.5
    config = {"name": "RMSprop", "lr": 0.25, "learning_rate": 0.5}
    assert RMSprop.from_config(config).learning_rate == 0.25
    assert config == {"name": "RMSprop", "lr": 0.25, "learning_rate": 0.5}


def test_subclass():
    class Mine(RMSprop):
        pass

    assert type(Mine.from_config(RMSprop(0.5).get_config())) is Mine


@pytest.mark.parametrize("key", ["beta_1", "nestrov", "class_name"])
def test_unknown_key(key: str):
    with pytest.raises(TypeError, match=key):
        RMSprop.from_config({"learning_rate": 0.1, key: 0.5})


# --- schedules in a configuration ---------------------------------------------------------------------------


def test_custom_schedule():
    config = RMSprop(Halving(0.5)).get_config()
    assert config["learning_rate"] == {"class_name": "Halving", "config": {"start": 0.5}}
    schedule = RMSprop.from_config(config, custom_objects={"Halving": Halving}).learning_rate
    assert type(schedule) is Halving
    assert schedule.start == 0.5


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"class_name": "Halving", "config": {"start": 0.5}}, "Unknown decay: Halving"),
        ({"class_name": "ExponentialDecay"}, "Improper config format"),
        ({"config": {}}, "Improper config format"),
        ({}, "Improper config format"),
    ],
    ids=str,
)
def test_bad_schedule(schedule: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RMSprop.from_config({"learning_rate": schedule})
