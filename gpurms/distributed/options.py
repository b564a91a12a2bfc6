"""What ranks compare of their optimizers: updates of the same variable must be equal on all of them."""

from __future__ import annotations

from typing import Any

from gpurms import backend
from gpurms.rmsprop import RMSprop
from gpurms.schedules import LearningRateSchedule, serialize
from gpurms.settings import DEFAULTS

HYPERPARAMETERS = ("learning_rate", "rho", "momentum", "epsilon", "decay")


def settings_of(optimizer: RMSprop) -> list[str]:
    """One line per setting, hyperparameters as they are for the next step: callables are called, schedules evaluated.

    The name is not among them. Of ``gradient_aggregator``, which may communicate, there is the type.

    Raises:
        TypeError: no optimizer; a hyperparameter is no number now.
        ValueError: a hyperparameter is out of its range now.
    """
    if not isinstance(optimizer, RMSprop):
        raise TypeError(f"optimizer must be a gpurms.RMSprop; got {backend.type_name(optimizer)}")
    iterations = int(optimizer._count())
    found: dict[str, Any] = {"iterations": iterations, "centered": optimizer.centered}
    schedule = optimizer._settings["learning_rate"]
    if isinstance(schedule, LearningRateSchedule):
        found["schedule"] = _config(schedule)
    kind = type(optimizer)
    found |= {key: getattr(kind, key).at(optimizer, iterations) for key in HYPERPARAMETERS}
    found |= {key: getattr(optimizer, key) for key in DEFAULTS if key not in found}
    found["gradient_aggregator"] = backend.type_name(optimizer.gradient_aggregator)
    return [f"the optimizer's {key}={value}" for key, value in found.items()]


def _config(schedule: LearningRateSchedule) -> Any:
    try:
        return serialize(schedule)
    except NotImplementedError:  # a schedule that is never saved needs no config
        return backend.type_name(schedule)
