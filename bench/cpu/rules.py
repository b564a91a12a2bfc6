"""What do momentum and centering cost, and what do they cost the peers?"""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import engines
from bench.answer import Answer
from bench.cpu.dense import ours
from bench.engines import NUMBA, NUMPY
from bench.measure import Race, always
from bench.peers import MOMENTUM, load

RULES = {  # name: (momentum, centered), bytes that a step moves per float32 element
    "plain": ((False, False), 20),
    "momentum": ((True, False), 28),
    "centered": ((False, True), 28),
    "both": ((True, True), 36),
}
TENSORFLOW, TORCH = "TF fused op", "torch foreach"


def run(quick: bool) -> Answer:
    n, rounds = (1 << 14, 3) if quick else (1 << 24, 9)
    rng = np.random.default_rng(0)
    var, grad = rng.standard_normal((2, n), np.float32)

    answer = Answer("rules", "momentum and centering", f"{n:,} elements, float32, {rounds} rounds per rule")
    race = Race()
    for name, ((momentum, centered), _) in RULES.items():
        make = partial(ours, grad=grad, momentum=MOMENTUM * momentum, centered=centered)
        for engine in (NUMBA, NUMPY):
            engines.enter(race, engine, lambda make=make: make(var.copy()), f", {name}")
        if name != "plain":  # which is another question's
            on = {"momentum": momentum, "centered": centered}
            race.enter(f"{TENSORFLOW}, {name}", lambda on=on: always(load("tensorflow").fused(var, grad, **on)))
            race.enter(f"{TORCH}, {name}", lambda on=on: always(load("torch").dense(var.copy(), grad, **on)))
    answer.add_times(race.run(rounds), race.skipped)
    for name, (_, moved) in RULES.items():
        if name != "plain":
            note = f" (memory moved: {moved / RULES['plain'][1]:.1f}x)"
            answer.add_ratio(f"{NUMBA}, {name}", f"{NUMBA}, plain", note=note)
            answer.add_ratio(f"{TENSORFLOW}, {name}", f"{NUMBA}, {name}")
            answer.add_ratio(f"{TORCH}, {name}", f"{NUMBA}, {name}")
            answer.add_ratio(f"{TORCH}, {name}", f"{NUMPY}, {name}")
    return answer
