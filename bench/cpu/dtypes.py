"""What do the other types cost, in terms of float32?"""

from __future__ import annotations

import numpy as np

from bench import engines
from bench.answer import Answer
from bench.cpu.dense import ours
from bench.engines import NUMBA, NUMPY
from bench.measure import Missing, Race, Ready

DTYPES = {"float32": 20, "float64": 40, "float16": 14, "bfloat16": 14}  # bytes that a step moves per element


def run(quick: bool) -> Answer:
    n, rounds = (1 << 14, 3) if quick else (1 << 24, 7)
    rng = np.random.default_rng(0)
    var, grad = rng.standard_normal((2, n), np.float32)

    def make(dtype: str) -> Ready:
        kind = _dtype(dtype)
        return ours(var.astype(kind), grad.astype(kind))

    answer = Answer("dtypes", "float64, float16, bfloat16", f"plain rule, {n:,} elements, {rounds} rounds")
    race = Race()
    for dtype in DTYPES:
        for engine in (NUMBA, NUMPY):
            engines.enter(race, engine, lambda dtype=dtype: make(dtype), f", {dtype}")
    answer.add_times(race.run(rounds), race.skipped)
    for engine in (NUMBA, NUMPY):
        for dtype, moved in DTYPES.items():
            if dtype != "float32":
                note = f" (memory moved: {moved / DTYPES['float32']:.1f}x)"
                answer.add_ratio(f"{engine}, {dtype}", f"{engine}, float32", note=note)
    return answer


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise Missing(str(error)) from error
    return np.dtype(ml_dtypes.bfloat16)
