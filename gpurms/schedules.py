"""Learning-rate schedules: functions of the step counter, evaluated in float64.

The step is the value of `iterations` before the update, so the first one is 0. Formulas and arguments are
those of TensorFlow r2.0, `tensorflow/python/keras/optimizer_v2/learning_rate_schedule.py`. A custom
schedule derives from `LearningRateSchedule`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self, final

from gpurms.arguments import flag, increasing, name_or_none, number, numbers

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LearningRateSchedule",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "deserialize",
    "serialize",
]


class LearningRateSchedule(ABC):
    """Base of all schedules: a callable from the step counter to a learning rate.

    A subclass defines `__call__`, and `get_config` if it is to be saved.

    Example:
        >>> class InverseSqrt(LearningRateSchedule):
        ...     def __call__(self, step):
        ...         return 0.1 / (1 + step) ** 0.5
        >>> InverseSqrt()(3)
        0.05
    """

    @abstractmethod
    def __call__(self, step: Any) -> float:
        """The learning rate of the update that follows `step` completed ones."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-serializable."""
        raise NotImplementedError(f"{type(self).__name__} must override get_config to be saved")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The schedule that `get_config` described."""
        return cls(**config)


# The sign of a learning rate is checked where it is used: by the optimizer, at each step.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "alpha": number,
    "boundaries": increasing,
    "cycle": flag,
    "decay_rate": partial(number, least=0),
    "decay_steps": partial(number, above=0),
    "end_learning_rate": number,
    "first_decay_steps": partial(number, above=0),
    "initial_learning_rate": number,
    "m_mul": partial(number, least=0),
    "name": name_or_none,
    "power": partial(number, least=0),
    "staircase": flag,
    "t_mul": partial(number, least=1),
    "values": numbers,
}


@dataclass(frozen=True)
class _Decay(LearningRateSchedule):
    """A schedule whose fields are its constructor's arguments, checked by `_CHECKS`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            what = f"{type(self).__name__}: {field.name}"
            object.__setattr__(self, field.name, _CHECKS[field.name](what, getattr(self, field.name)))

    def __call__(self, step: Any) -> float:
        t = number("step", step, least=0)
        try:
            return float(self._at(t))
        except OverflowError as error:
            raise ValueError(f"{self!r} is too large at step {t}") from error

    @abstractmethod
    def _at(self, t: float) -> float: ...

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments in their order, JSON-serializable."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


@dataclass(frozen=True)
class _RateDecay(_Decay):
    """A function of time in units of `decay_steps`."""

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def _p(self, t: float) -> float:
        p = t / self.decay_steps
        return math.floor(p) if self.staircase else p


@final
@dataclass(frozen=True)
class ExponentialDecay(_RateDecay):
    """Decay by a constant factor: `lr = initial_learning_rate * decay_rate ** p`, `p = step / decay_steps`.

    Args:
        initial_learning_rate: learning rate at step 0.
        decay_steps: steps in which the rate falls by `decay_rate`; > 0.
        decay_rate: factor per `decay_steps`; >= 0.
        staircase: round `p` down, so that the rate falls in steps. Default False.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; out of range or not finite.

    Example:
        >>> ExponentialDecay(0.5, decay_steps=10, decay_rate=0.25)(5)
        0.25

    Source: TensorFlow r2.0, `learning_rate_schedule.ExponentialDecay`.
    """

    def _at(self, t: float) -> float:
        return self.initial_learning_rate * math.pow(self.decay_rate, self._p(t))


@final
@dataclass(frozen=True)
class PiecewiseConstantDecay(_Decay):
    """Constant between boundaries: `values[k]` for the first `k` with `step <= boundaries[k]`, else the last.

    Args:
        boundaries: steps, strictly increasing.
        values: learning rates, one more than boundaries.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; not increasing, not finite, of another length.

    Example:
        >>> rate = PiecewiseConstantDecay(boundaries=[100], values=[0.1, 0.01])
        >>> rate(100), rate(101)
        (0.1, 0.01)

    Source: TensorFlow r2.0, `learning_rate_schedule.PiecewiseConstantDecay`.
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                "PiecewiseConstantDecay: the length of boundaries must be 1 less than the length of values; "
                f"got {len(self.boundaries)} boundaries and {len(self.values)} values"
            )

    def _at(self, t: float) -> float:
        return self.values[sum(t > boundary for boundary in self.boundaries)]


@final
@dataclass(frozen=True)
class PolynomialDecay(_Decay):
    """Polynomial descent from one learning rate to another.

    `lr = (initial_learning_rate - end_learning_rate) * (1 - p) ** power + end_learning_rate` with
    `p = min(step, decay_steps) / decay_steps`, or with `cycle` `p = step / d`, where `d` is the smallest
    multiple of `decay_steps` that is not below `step`.

    Args:
        initial_learning_rate: learning rate at step 0.
        decay_steps: steps until the end is reached; > 0.
        end_learning_rate: learning rate from then on. Default 0.0001.
        power: exponent; >= 0. Default 1.0, a straight line.
        cycle: rise again after the end, to ever lower peaks. Default False.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; out of range or not finite.

    Example:
        >>> PolynomialDecay(0.5, decay_steps=10, end_learning_rate=0.25)(5)
        0.375

    Source: TensorFlow r2.0, `learning_rate_schedule.PolynomialDecay`.
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def _at(self, t: float) -> float:
        d = self.decay_steps
        if self.cycle:
            d *= max(1, math.ceil(t / d))
        p = min(t / d, 1.0)
        span = self.initial_learning_rate - self.end_learning_rate
        return span * math.pow(1.0 - p, self.power) + self.end_learning_rate


@final
@dataclass(frozen=True)
class InverseTimeDecay(_RateDecay):
    """Hyperbolic decay: `lr = initial_learning_rate / (1 + decay_rate * p)`, `p = step / decay_steps`.

    Args:
        initial_learning_rate: learning rate at step 0.
        decay_steps: the unit of time in steps; > 0.
        decay_rate: decay per unit of time; >= 0.
        staircase: round `p` down, so that the rate falls in steps. Default False.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; out of range or not finite.

    Example:
        >>> InverseTimeDecay(0.5, decay_steps=10, decay_rate=1.0)(10)
        0.25

    Source: TensorFlow r2.0, `learning_rate_schedule.InverseTimeDecay`.
    """

    def _at(self, t: float) -> float:
        return self.initial_learning_rate / (1 + self.decay_rate * self._p(t))


def _cosine(p: float) -> float:
    """Half a period, from 1 at `p = 0` to 0 at `p = 1`."""
    return (1 + math.cos(math.pi * p)) / 2


@final
@dataclass(frozen=True)
class CosineDecay(_Decay):
    """Half a cosine: `lr = initial_learning_rate * ((1 - alpha) * (1 + cos(pi * p)) / 2 + alpha)`.

    Here `p = min(step, decay_steps) / decay_steps` (Loshchilov & Hutter, "SGDR", arXiv:1608.03983).

    Args:
        initial_learning_rate: learning rate at step 0.
        decay_steps: steps until the end is reached; > 0.
        alpha: the end, as a fraction of `initial_learning_rate`. Default 0.0.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; out of range or not finite.

    Example:
        >>> CosineDecay(0.5, decay_steps=10)(5)
        0.25

    Source: TensorFlow r2.0, `learning_rate_schedule.CosineDecay`.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The schedule that `get_config` described, here or in Keras 3 without a warm-up."""
        kept = dict(config)
        warmup = {
            "warmup_target": kept.pop("warmup_target", None),
            "warmup_steps": kept.pop("warmup_steps", 0),
        }
        if warmup["warmup_target"] is not None or warmup["warmup_steps"]:
            raise ValueError(
                f"CosineDecay has no warm-up, expected warmup_target=None and warmup_steps=0; got {warmup}"
            )
        return cls(**kept)

    def _at(self, t: float) -> float:
        p = min(t / self.decay_steps, 1.0)
        return self.initial_learning_rate * ((1 - self.alpha) * _cosine(p) + self.alpha)


@final
@dataclass(frozen=True)
class CosineDecayRestarts(_Decay):
    """`CosineDecay` over and over, in periods of changing length and height.

    Period `k = 0, 1, ...` lasts `first_decay_steps * t_mul**k` steps. In it, `p` of the way through,
    `lr = initial_learning_rate * ((1 - alpha) * m_mul**k * (1 + cos(pi * p)) / 2 + alpha)`
    (Loshchilov & Hutter, "SGDR", arXiv:1608.03983).

    Args:
        initial_learning_rate: learning rate at step 0.
        first_decay_steps: steps in the first period; > 0.
        t_mul: length of a period over that of the one before; >= 1. Default 2.0.
        m_mul: height of a period over that of the one before; >= 0. Default 1.0.
        alpha: the lowest rate, as a fraction of `initial_learning_rate`. Default 0.0.
        name: kept in the config. Default None.

    Raises:
        TypeError, ValueError: an argument of another type; out of range or not finite.

    Example:
        >>> rate = CosineDecayRestarts(0.5, first_decay_steps=10, m_mul=0.5)
        >>> rate(0), rate(5), rate(10), rate(20), rate(30)
        (0.5, 0.25, 0.25, 0.125, 0.125)

    Source: TensorFlow r2.0, `learning_rate_schedule.CosineDecayRestarts`; unlike there, a step on which a
    period begins never falls into the period before by rounding.
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = None

    def _start(self, k: int) -> float:
        """The step on which period `k` begins."""
        periods = k if self.t_mul == 1 else (self.t_mul**k - 1) / (self.t_mul - 1)
        return self.first_decay_steps * periods

    def _period(self, t: float) -> int:
        """The period of step `t`: a logarithm, then corrected for its rounding."""
        q = t / self.first_decay_steps
        k = math.floor(q if self.t_mul == 1 else math.log1p(q * (self.t_mul - 1)) / math.log(self.t_mul))
        while self._start(k + 1) <= t:
            k += 1
        while self._start(k) > t:
            k -= 1
        return k

    def _at(self, t: float) -> float:
        k = self._period(t)
        p = (t - self._start(k)) / (self.first_decay_steps * self.t_mul**k)
        return self.initial_learning_rate * ((1 - self.alpha) * self.m_mul**k * _cosine(p) + self.alpha)


_COSINE = (CosineDecay, CosineDecayRestarts)
_OTHERS = (ExponentialDecay, InverseTimeDecay, PiecewiseConstantDecay, PolynomialDecay)
_BUILT_IN: dict[str, type[LearningRateSchedule]] = {cls.__name__: cls for cls in (*_COSINE, *_OTHERS)}


def serialize(learning_rate_schedule: LearningRateSchedule) -> dict[str, Any]:
    """`{"class_name", "config"}` of a schedule, JSON-serializable.

    Example:
        >>> serialize(PiecewiseConstantDecay([5], [0.1, 0.01]))["class_name"]
        'PiecewiseConstantDecay'
    """
    if not isinstance(learning_rate_schedule, LearningRateSchedule):
        raise TypeError(f"expected a LearningRateSchedule; got {learning_rate_schedule!r}")
    name = type(learning_rate_schedule).__name__
    return {"class_name": name, "config": learning_rate_schedule.get_config()}


def deserialize(
    config: Mapping[str, Any],
    custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None,
) -> LearningRateSchedule:
    """The schedule of a `{"class_name", "config"}` made by `serialize`, tf.keras or Keras 3.

    Args:
        config: the dictionary; further keys of Keras 3 ("module", "registered_name", "build_config"), which
            say where the class came from, are not needed. It is not modified.
        custom_objects: class name -> class of schedules defined elsewhere, looked up first.

    Raises:
        ValueError: "Improper config format" or "Unknown decay: ...".

    Example:
        >>> deserialize(serialize(CosineDecay(0.1, decay_steps=4)))
        CosineDecay(initial_learning_rate=0.1, decay_steps=4, alpha=0.0, name=None)
    """
    if (
        not isinstance(config, Mapping)
        or not isinstance(config.get("class_name"), str)
        or not isinstance(config.get("config"), Mapping)
    ):
        raise ValueError(f"Improper config format: expected {{'class_name', 'config'}}; got {config!r}")
    name = config["class_name"]
    cls = {**_BUILT_IN, **(custom_objects or {})}.get(name)
    if cls is None:
        raise ValueError(f"Unknown decay: {name}")
    return cls.from_config(config["config"])
