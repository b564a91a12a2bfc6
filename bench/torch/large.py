"""How much faster is a step of a model of 100M parameters?

torch's operations on lists have temporaries as large as the parameters. Whether their memory goes back to the system at
each step depends on what else the process has allocated, and it matters: so contestants are measured in processes of
their own, in turns, as they would be in a program that trains, and once more together in one process.
"""

from __future__ import annotations

import gc
from functools import partial

import numpy as np

from bench import child
from bench.answer import Answer, Goal
from bench.measure import Race, Ready, always
from bench.peers import load
from bench.torch.contestants import FOREACH, GPURMS, optimizer, parameters

COUNT = 200
TOGETHER = ", in one process"
FLOOR = "floor"

CODE = """
import json, statistics, time
from bench.torch.contestants import optimizer, parameters

step, seconds = optimizer({name!r}, parameters([{size}] * {count}), {momentum}).step, []
for _ in range(8):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
print(json.dumps(statistics.median(seconds[2:])))
"""


def run(quick: bool) -> Answer:
    total, rounds = (20_000, 2) if quick else (100_000_000, 5)
    setting = (
        f"{total:,} parameters in {COUNT} tensors, float32, {rounds} rounds: of a process for each contestant, which "
        "takes 8 steps, and of one process, in which each takes a step"
    )
    answer = Answer("large", "a model's parameters", setting)
    for rule in ("plain", "momentum"):
        seconds: dict[str, list[float]] = {f"{name}, {rule}": [] for name in (GPURMS, FOREACH)}
        for _ in range(rounds):
            for name in (GPURMS, FOREACH):
                code = CODE.format(name=name, size=total // COUNT, count=COUNT, momentum=rule == "momentum")
                seconds[f"{name}, {rule}"].append(child.run(code))
        answer.add_times(seconds, {})
        answer.add_ratio(f"{FOREACH}, {rule}", f"{GPURMS}, {rule}", Goal(">=", 4) if rule == "plain" else None)
    for rule in ("plain", "momentum"):
        race = Race()
        for name in (GPURMS, FOREACH):
            race.enter(f"{name}, {rule}{TOGETHER}", partial(_ready, name, total, rule))
        if rule == "plain":
            race.enter(FLOOR, partial(_floor, total))
        answer.add_times(race.run(rounds), race.skipped)
        answer.add_ratio(f"{FOREACH}, {rule}{TOGETHER}", f"{GPURMS}, {rule}{TOGETHER}")
        del race
        gc.collect()
    answer.add_ratio(f"{GPURMS}, plain{TOGETHER}", FLOOR)
    return answer


def _ready(name: str, total: int, rule: str) -> Ready:
    return always(optimizer(name, parameters([total // COUNT] * COUNT), rule == "momentum").step)


def _floor(total: int) -> Ready:
    return always(load("floor").floor(np.zeros(total, np.float32), np.ones(total, np.float32)))
