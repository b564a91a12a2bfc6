"""How close is a dense step to the speed of memory, and how far ahead of the peers?"""

from __future__ import annotations

import numpy as np

from bench import engines
from bench.answer import Answer, Goal
from bench.engines import NUMBA, NUMPY
from bench.measure import Race, Ready, always
from bench.peers import EPSILON, LR, RHO, load
from gpurms import RMSprop

FLOOR, TENSORFLOW, TORCH, NAIVE = "floor", "TF ResourceApplyRMSProp", "torch foreach", "naive NumPy"


def run(quick: bool) -> Answer:
    n, rounds = (1 << 14, 3) if quick else (1 << 24, 25)
    rng = np.random.default_rng(0)
    var, grad = rng.standard_normal((2, n), np.float32)

    race = Race()
    for engine in (NUMBA, NUMPY):
        engines.enter(race, engine, lambda: ours(var.copy(), grad))
    race.enter(FLOOR, lambda: always(load("floor").floor(var.copy(), grad)))
    race.enter(TENSORFLOW, lambda: always(load("tensorflow").fused(var, grad)))
    race.enter(TORCH, lambda: always(load("torch").dense(var.copy(), grad)))
    race.enter(NAIVE, lambda: always(load("naive").rmsprop(var.copy(), grad)))

    answer = Answer("dense", "one large variable", f"plain rule, {n:,} elements, float32, {rounds} rounds")
    answer.add_times(race.run(rounds), race.skipped)
    answer.add_ratio(NUMBA, FLOOR, Goal("<=", 1.15))
    answer.add_ratio(TENSORFLOW, NUMBA, Goal(">=", 2.3))
    answer.add_ratio(TORCH, NUMBA, Goal(">=", 5))
    answer.add_ratio(TORCH, NUMPY, Goal(">", 1))
    answer.add_ratio(NAIVE, NUMBA)
    answer.add_ratio(NAIVE, NUMPY)
    return answer


def ours(var: np.ndarray, grad: np.ndarray, momentum: float = 0.0, centered: bool = False) -> Ready:
    optimizer = RMSprop(LR, RHO, momentum, EPSILON, centered)
    return always(lambda: optimizer.apply_gradients([(grad, var)]))
