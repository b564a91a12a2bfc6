"""Clip factors: one scalar per gradient; the kernels multiply by it as they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gpurms.aliasing import Pair


class Clip(NamedTuple):
    """Limit of the norm of each gradient, or of all together; elements are limited to ``clipvalue`` before that."""

    limit: float
    over_all: bool
    clipvalue: float | None


def factor(square_sum: float, limit: float) -> float:
    """``limit / max(norm, limit)`` for ``norm = sqrt(square_sum)``, in float64.

    Exactly 1 where the norm is within the limit, 0 included; NaN where the norm is NaN.
    """
    norm = math.sqrt(square_sum)
    return 1.0 if norm <= limit else limit / norm


def factors(pairs: Sequence[Pair], clip: Clip | None) -> list[Any]:
    """The clip factor of each gradient, where the gradient is; None without a limit.

    Nothing waits for a GPU, except where one norm is over arrays of several libraries.
    """
    found: list[Any] = [None] * len(pairs)
    if clip is None:
        return found
    by_home: dict[Any, list[int]] = {}
    for i, (entry, _, _) in enumerate(pairs):
        by_home.setdefault(entry.backend, []).append(i)
    arguments = {
        home: ([pairs[i][1] for i in places], [pairs[i][0].compute for i in places]) for home, places in by_home.items()
    }
    known = None
    if clip.over_all and len(by_home) > 1:
        sums = np.zeros(len(pairs))
        for home, places in by_home.items():
            sums[places] = home.square_sums(*arguments[home], clip.clipvalue)
        known = factor(sum(sums), clip.limit)
    for home, places in by_home.items():
        for i, each in zip(places, home.clip_factors(*arguments[home], clip, known)):
            found[i] = each
    return found
