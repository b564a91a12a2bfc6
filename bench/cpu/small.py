"""What does a variable cost that is too small to matter?"""

from __future__ import annotations

import numpy as np

from bench import engines
from bench.answer import Answer, Goal
from bench.engines import NUMBA, NUMPY
from bench.measure import Race, Ready, Step
from bench.peers import EPSILON, LR, RHO, load
from gpurms import RMSprop

TORCH = "torch foreach"
SIZE = 256


def run(quick: bool) -> Answer:
    count, rounds = (10, 3) if quick else (1000, 41)
    rng = np.random.default_rng(0)
    values, source = rng.standard_normal((2, count, SIZE), np.float32)

    def variables() -> list[np.ndarray]:
        return [value.copy() for value in values]

    def ours() -> Ready:
        optimizer, own = RMSprop(LR, RHO, epsilon=EPSILON), variables()

        def ready() -> Step:
            grads = [grad.copy() for grad in source]
            return lambda: optimizer.apply_gradients(zip(grads, own))

        return ready

    def torch() -> Ready:
        peer = load("torch")
        optimizer = peer.rmsprop(variables())

        def ready() -> Step:
            peer.set_grads(optimizer, [grad.copy() for grad in source])
            return optimizer.step

        return ready

    race = Race()
    for engine in (NUMBA, NUMPY):
        engines.enter(race, engine, ours)
    race.enter(TORCH, torch)

    title = f"{count:,} variables of {SIZE} elements"
    answer = Answer("small", title, f"plain rule, float32, new gradient arrays at every step, {rounds} rounds")
    answer.add_times(race.run(rounds), race.skipped)
    for series in list(answer.series):
        micro = [seconds / count * 1e6 for seconds in series.values]
        goal = None if series.name == TORCH else Goal("<", 4)
        answer.add(f"{series.name}, per variable", "us", micro, goal, min(micro))
    for engine in (NUMBA, NUMPY):
        answer.add_ratio(TORCH, engine)
    return answer
