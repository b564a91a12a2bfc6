"""Settings of the optimizer: attributes whose every value is checked, when it is set and when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms.arguments import real
from gpurms.kernels.rule import FLOAT32, FLOAT64, is_bfloat16
from gpurms.schedules import LearningRateSchedule
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

Check = Callable[[str, Any], Any]


def as_float(name: str, value: Any) -> float:
    """A real number as a Python float."""
    try:
        return float(real(name, value))
    except OverflowError as error:
        raise ValueError(f"{name} must fit a float; got {value!r}") from error


def non_negative(name: str, value: Any) -> float:
    """A real number >= 0, NaN refused."""
    number = as_float(name, value)
    if not number >= 0:
        raise ValueError(f"{name} must be >= 0; got {number}")
    return number


def fraction(name: str, value: Any) -> float:
    """A real number in [0, 1]."""
    number = as_float(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1]; got {number}")
    return number


def fuzz(name: str, value: Any) -> float:
    """``epsilon``: None stands for the default."""
    return 1e-7 if value is None else non_negative(name, value)


def limit(name: str, value: Any) -> float | None:
    """A real number >= 0, or None for "off"."""
    return None if value is None else non_negative(name, value)


def function(name: str, value: Any) -> Any:
    """A callable, or None."""
    if not (value is None or callable(value)):
        raise TypeError(f"{name} must be a function or None; got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {value!r}")
    return value


def slot_type(name: str, value: Any) -> np.dtype[Any] | None:
    """One of the four float types, or None for the rule of ``slot_dtype``."""
    if value is None:
        return None
    try:
        if isinstance(value, str) and value == "bfloat16":
            import ml_dtypes

            value = ml_dtypes.bfloat16
        dtype: np.dtype[Any] = np.dtype(value)
    except ImportError as error:
        raise TypeError(f"{name}='bfloat16' needs ml_dtypes: pip install ml_dtypes") from error
    except TypeError as error:
        raise TypeError(f"{name} must be None, {FLOAT_NAMES}; got {value!r}") from error
    if not is_supported(dtype):
        raise TypeError(f"{name} must be None, {FLOAT_NAMES}; got {value!r}")
    return dtype


FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def is_supported(dtype: np.dtype[Any]) -> bool:
    """One of the four types the optimizer updates, in native byte order."""
    return dtype in (FLOAT32, FLOAT64, FLOAT16) or is_bfloat16(dtype)


FLOAT16 = np.dtype(np.float16)


class Setting:
    """An attribute that holds what ``check`` makes of a value; ``excludes`` names one that may not be on beside it."""

    def __init__(self, check: Check, doc: str, excludes: str | None = None) -> None:
        self.check = check
        self.excludes = excludes
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: RMSprop | None, owner: type) -> Any:
        return self if optimizer is None else optimizer._settings[self.name]

    def __set__(self, optimizer: RMSprop, value: Any) -> None:
        checked = self.check(self.name, value)
        if self.excludes and checked is not None and optimizer._settings.get(self.excludes) is not None:
            raise ValueError(f"at most one of {self.name} and {self.excludes} may be set; got both")
        optimizer._settings[self.name] = checked


class Hyperparameter(Setting):
    """A setting that may also be a zero-argument callable (or, if ``schedule``, a schedule), read at each step."""

    def __init__(self, check: Check, doc: str, schedule: bool = False) -> None:
        super().__init__(check, doc)
        self.schedule = schedule

    def __get__(self, optimizer: RMSprop | None, owner: type) -> Any:
        if optimizer is None:
            return self
        value = optimizer._settings[self.name]
        return value if isinstance(value, LearningRateSchedule) else self._now(value)

    def __set__(self, optimizer: RMSprop, value: Any) -> None:
        if isinstance(value, LearningRateSchedule):
            if not self.schedule:
                raise TypeError(f"{self.name} cannot be a schedule; only learning_rate can")
        elif not _is_callable(value):
            value = self.check(self.name, value)
        optimizer._settings[self.name] = value

    def at(self, optimizer: RMSprop, iterations: int) -> float:
        """The value for the step that follows ``iterations`` steps."""
        value = optimizer._settings[self.name]
        if isinstance(value, LearningRateSchedule):
            return float(self.check(self.name, value(iterations)))
        return self._now(value)

    def _now(self, value: Any) -> float:
        if not callable(value):
            return float(value)
        result = value()
        if result is None:  # which some checks take for "the default" when it is set
            raise TypeError(f"{self.name} must be a real number; its callable returned None")
        return float(self.check(self.name, result))


def _is_callable(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | Variable)
