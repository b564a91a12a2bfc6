"""What does a step of an embedding table cost, with the gradients of ``nn.Embedding(sparse=True)``?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.answer import Answer
from bench.measure import Race, Ready
from bench.peers import LR
from bench.torch.contestants import GPURMS, optimizer

SPARSE_ADAM = "torch SparseAdam"
ROW_SIZE = 64


def run(quick: bool) -> Answer:
    n_rows, n, rounds = (1_000, 256, 3) if quick else (1_000_000, 65_536, 15)
    ids = torch.from_numpy((np.random.default_rng(0).zipf(1.2, n) - 1) % n_rows)
    values = torch.randn(n, ROW_SIZE)

    def ready(make: Any) -> Ready:
        table = torch.nn.Parameter(torch.randn(n_rows, ROW_SIZE))
        taken = make([table])

        def gradient() -> Any:
            table.grad = torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=False)
            return taken.step

        return gradient

    race = Race()
    race.enter(GPURMS, lambda: ready(lambda of: optimizer(GPURMS, of, momentum=True)))
    race.enter(SPARSE_ADAM, lambda: ready(lambda of: torch.optim.SparseAdam(of, lr=LR)))
    distinct = np.unique(ids.numpy()).size
    setting = (
        f"momentum, {n_rows:,} x {ROW_SIZE}, {n:,} Zipf(1.2) ids ({distinct:,} distinct), float32, {rounds} rounds"
    )
    answer = Answer("rows", "an embedding table", setting)
    answer.add_times(race.run(rounds), race.skipped)
    answer.add_ratio(SPARSE_ADAM, GPURMS)
    return answer
