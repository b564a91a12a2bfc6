"""What does an embedding table cost whose ids repeat as words do?"""

from __future__ import annotations

import numpy as np

from bench import engines
from bench.answer import Answer, Goal
from bench.engines import NUMBA, NUMPY
from bench.measure import Race, Ready, always
from bench.peers import EPSILON, LR, MOMENTUM, RHO, load
from gpurms import IndexedSlices, RMSprop

TF_KERAS, TF_FUNCTION, SPARSE_ADAM = "tf_keras legacy", "tf_keras legacy in tf.function", "torch SparseAdam"
ROW_SIZE = 64


def run(quick: bool) -> Answer:
    rows, n, rounds = (1_000, 256, 3) if quick else (1_000_000, 65_536, 25)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, ROW_SIZE), np.float32)
    values = rng.standard_normal((n, ROW_SIZE), np.float32)
    ids = (rng.zipf(1.2, n) - 1) % rows
    counts = np.unique(ids, return_counts=True)[1]

    def ours() -> Ready:
        optimizer, own = RMSprop(LR, RHO, MOMENTUM, EPSILON), table.copy()
        return always(lambda: optimizer.apply_gradients([(IndexedSlices(values, ids), own)]))

    race = Race()
    for engine in (NUMBA, NUMPY):
        engines.enter(race, engine, ours)
    race.enter(TF_KERAS, lambda: always(load("tf_keras").sparse(table, values, ids)))
    race.enter(TF_FUNCTION, lambda: always(load("tf_keras").sparse(table, values, ids, compiled=True)))
    race.enter(SPARSE_ADAM, lambda: load("torch").sparse_adam(table.copy(), values, ids))

    setting = (
        f"momentum, table {rows:,} x {ROW_SIZE}, {n:,} Zipf(1.2) ids ({counts.size:,} distinct, the hottest "
        f"{counts.max():,} times), float32, {rounds} rounds"
    )
    answer = Answer("sparse", "an embedding table", setting)
    answer.add_times(race.run(rounds), race.skipped)
    for peer, goal in ((TF_KERAS, Goal(">=", 6)), (TF_FUNCTION, None), (SPARSE_ADAM, Goal(">=", 8))):
        answer.add_ratio(peer, NUMBA, goal)
        answer.add_ratio(peer, NUMPY)
    return answer
