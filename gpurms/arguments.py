"""Checks of arguments: each returns the plain Python value, or raises naming what was expected and got."""

import math
from itertools import pairwise
from numbers import Integral, Real
from typing import Any


def scalar(value: Any) -> Any:
    """The Python number in a NumPy scalar, a 0-d array or a 0-d `Variable`; anything else as it is."""
    if getattr(value, "ndim", None) != 0:
        return value
    return value.numpy().item() if hasattr(value, "numpy") else value.item()


def real(what: str, value: Any) -> Real:
    """A real number of any kind; True and False are none."""
    x = scalar(value)
    if not isinstance(x, Real) or isinstance(x, bool):
        raise TypeError(f"{what} must be a real number; got {value!r}")
    return x


def number(what: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """A finite real number; an int stays an int."""
    x = real(what, value)
    if not math.isfinite(x):
        raise ValueError(f"{what} must be finite; got {value!r}")
    if x <= above:
        raise ValueError(f"{what} must be > {above}; got {value!r}")
    if x < least:
        raise ValueError(f"{what} must be >= {least}; got {value!r}")
    return int(x) if isinstance(x, Integral) else float(x)


def numbers(what: str, value: Any) -> tuple[float, ...]:
    """A sequence of finite real numbers."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"{what} must be a sequence of real numbers; got {value!r}")
    return tuple(number(f"{what}[{k}]", item) for k, item in enumerate(value))


def increasing(what: str, value: Any) -> tuple[float, ...]:
    """A strictly increasing sequence of finite real numbers."""
    xs = numbers(what, value)
    if any(high <= low for low, high in pairwise(xs)):
        raise ValueError(f"{what} must be strictly increasing; got {list(xs)}")
    return xs


def flag(what: str, value: Any) -> bool:
    """True or False, not just something truthy."""
    x = scalar(value)
    if not isinstance(x, bool):
        raise TypeError(f"{what} must be True or False; got {value!r}")
    return x


def name_or_none(what: str, value: Any) -> str | None:
    """A string, or None."""
    if not (value is None or isinstance(value, str)):
        raise TypeError(f"{what} must be a string or None; got {value!r}")
    return value
