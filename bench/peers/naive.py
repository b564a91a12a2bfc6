"""The formula as one writes it down in NumPy, with a temporary per operation."""

from __future__ import annotations

import numpy as np

from bench.measure import Step
from bench.peers import EPSILON, LR, RHO

Array = np.ndarray


def rmsprop(var: Array, grad: Array) -> Step:
    """The plain rule."""
    rms = np.zeros_like(var)

    def step() -> None:
        rms[...] = RHO * rms + (1 - RHO) * grad**2
        var[...] = var - LR * grad / np.sqrt(rms + EPSILON)

    return step
