"""Clip factors: one scalar per gradient; the kernels multiply by it as they read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def factor(square_sum: float, clip: float, compute: np.dtype[Any]) -> Any:
    """``clip / max(norm, clip)`` for ``norm = sqrt(square_sum)``, formed in float64 and rounded once.

    Exactly 1 where the norm is within the limit, 0 included; NaN where the norm is NaN.
    """
    norm = math.sqrt(square_sum)
    return compute.type(1.0 if norm <= clip else clip / norm)
