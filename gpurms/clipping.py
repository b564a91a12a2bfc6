"""Clip factors: one scalar per gradient, made where the gradient is; the kernels multiply by it as they read."""

from __future__ import annotations

from typing import Any

import numpy as np


def factor(square_sum: Any, clip: float, compute: np.dtype[Any]) -> Any:
    """``clip / max(norm, clip)`` for ``norm = sqrt(square_sum)``, formed in float64 and rounded once.

    Exactly 1 where the norm is within the limit, 0 included; NaN where the norm is NaN. Only functions that NumPy
    dispatches, so a factor of CuPy arrays stays on the device.
    """
    with np.errstate(all="ignore"):
        norm = np.sqrt(square_sum)
        within = norm <= clip
        return np.where(within, 1.0, clip / np.where(within, 1.0, norm)).astype(compute)[()]
