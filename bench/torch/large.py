"""How much faster is a step of a model of 100M parameters?"""

from __future__ import annotations

import gc
import statistics
from functools import partial

import numpy as np
import torch

from bench.answer import Answer, Goal
from bench.measure import Race, Ready, always
from bench.torch.contestants import FOREACH, GPURMS, optimizer, parameters


def run(quick: bool) -> Answer:
    total, count, rounds = (20_000, 5, 3) if quick else (100_000_000, 200, 9)
    shares = np.random.default_rng(0).dirichlet(np.ones(count))
    sizes = [max(1, int(share * total)) for share in shares]
    setting = f"{sum(sizes):,} parameters in {count} tensors of random sizes, float32, {rounds} rounds"
    shared = parameters(sizes)  # all contestants update the same: it is the time that is asked for
    answer = Answer("large", "a model's parameters", setting)
    for rule in ("plain", "momentum"):
        race = Race()
        for name in (GPURMS, FOREACH):
            race.enter(f"{name}, {rule}", partial(_ready, name, shared, rule))
        answer.add_times(race.run(rounds), race.skipped)
        answer.add_ratio(f"{FOREACH}, {rule}", f"{GPURMS}, {rule}", Goal(">=", 4) if rule == "plain" else None)
        del race
        gc.collect()
    plain = answer.values(f"{GPURMS}, plain")
    if plain:
        rate = 20 * sum(sizes) / statistics.median(plain) / 1e9
        answer.notes.append(f"gpurms, plain rule: {rate:.1f} GB/s of parameters, gradients and state")
    return answer


def _ready(name: str, of: list[torch.nn.Parameter], rule: str) -> Ready:
    return always(optimizer(name, of, rule == "momentum").step)
