"""What one call asks of the kernels: the terms of the update that are on, its scalars, and its arrays.

Every engine (NumPy, Numba, CUDA) takes the same three things, so nothing about an option is decided twice:
``Flags`` are compile-time constants of a kernel, ``Rule.scalars`` is the one struct of numbers handed to it,
``Update`` names the arrays of one variable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

SCALARS = ("lr", "one_minus_rho", "momentum", "epsilon", "weight_decay", "lr_weight_decay", "clipvalue")
"""The order of ``Rule.scalars``, the same in every engine."""


class Flags(NamedTuple):
    """Which terms of the update are on. Hashable: one compiled kernel per value.

    ``has_factor``: gradients are multiplied by a factor, which clips their norm or undoes the scale of a loss.
    """

    clip_value: bool = False
    has_factor: bool = False
    maximize: bool = False
    l2: bool = False
    decoupled: bool = False
    centered: bool = False
    has_momentum: bool = False
    nesterov: bool = False
    eps_in_sqrt: bool = True
    lr_in_momentum: bool = True


class Rule(NamedTuple):
    """The update of one step in one compute type: ``flags`` and ``scalars``, shape (7,), rounded to that type.

    ``live`` is where a capturable optimizer keeps the scalars on GPUs, for graphs to read them; ``skip`` holds one
    float32 per GPU, which leaves out the step unless it is 0. Both are by device, and None elsewhere.
    """

    flags: Flags
    scalars: np.ndarray[Any, np.dtype[np.floating[Any]]]
    live: Any = None
    skip: Any = None

    @property
    def compute(self) -> np.dtype[np.floating[Any]]:
        """The type in which the rule is evaluated: float32 or float64."""
        return self.scalars.dtype


@dataclass(frozen=True)
class Step:
    """The options and float64 hyperparameters of one ``apply_gradients``; makes its rules."""

    lr: float
    rho: float
    momentum: float
    epsilon: float
    weight_decay: float
    clipvalue: float | None
    flags: Flags
    live: Any = None
    skip: Any = None

    def scalars(self, compute: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """The scalars in the order of ``SCALARS``.

        ``1 - rho`` and ``lr*weight_decay`` are formed in float64 and rounded once, like every other scalar.
        """
        scalars = {
            "lr": self.lr,
            "one_minus_rho": 1.0 - self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "weight_decay": self.weight_decay,
            "lr_weight_decay": self.lr * self.weight_decay,
            "clipvalue": 0.0 if self.clipvalue is None else self.clipvalue,
        }
        with np.errstate(over="ignore", under="ignore"):
            return np.array([scalars[name] for name in SCALARS]).astype(compute)

    def rule(self, compute: np.dtype[Any], has_momentum: bool) -> Rule:
        """The rule for variables of one compute type, with or without a momentum slot."""
        flags = self.flags._replace(has_momentum=has_momentum, nesterov=self.flags.nesterov and has_momentum)
        return Rule(flags, self.scalars(compute), self.live, self.skip)


@dataclass(slots=True, eq=False)
class Update:
    """One variable's share of a call. All arrays belong to one library; a slot the rule does not use is None.

    Dense: ``grad`` has the variable's shape and ``indices`` is None. Sparse: ``grad`` holds the values, of shape
    ``indices.shape + var.shape[1:]``. ``factor`` is that of ``has_factor``, a scalar of the compute type, or None.

    ``var`` and the slots stay the same from step to step, and so does the object; ``prepared`` is what the library
    has made of them.
    """

    var: Any
    rms: Any
    mom: Any
    mg: Any
    rule: Rule
    grad: Any
    indices: Any = None
    factor: Any = None
    prepared: Any = None


def release(updates: Sequence[Update]) -> None:
    """Let go of the gradients, which would otherwise live until the next step."""
    for update in updates:
        update.grad = update.indices = update.factor = None


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float64 for float64 variables, float32 for float32 and the 16-bit types."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """ml_dtypes' type, in native byte order, without importing ml_dtypes."""
    return dtype.name == "bfloat16" and bool(dtype.isnative)


FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
