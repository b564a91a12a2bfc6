"""The formula as one writes it down in CuPy, a kernel and a temporary per operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy

from bench.peers import EPSILON, LR, RHO

Array = Any  # cupy.ndarray


def rmsprop(var: Array) -> Callable[[Array], None]:
    """The plain rule."""
    rms = cupy.zeros_like(var)

    def step(grad: Array) -> None:
        rms[...] = RHO * rms + (1 - RHO) * grad**2
        var[...] = var - LR * grad / cupy.sqrt(rms + EPSILON)

    return step
