"""From which size on is who faster?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.answer import Answer, Goal, name_of
from bench.gpu.stage import Stage, Wait, attempt, synchronize
from bench.measure import Step, always
from bench.peers import EPSILON, LR, RHO, load
from gpurms import RMSprop

OURS, AGAIN = "gpurms", "gpurms again"
NAIVE, FOREACH, COMPILED, OPTAX = "naive CuPy", "torch foreach", "torch.compile", "optax jit"
PEERS = (FOREACH, COMPILED, OPTAX, NAIVE)
CONTESTANTS = (OURS, FOREACH, NAIVE, OPTAX, COMPILED, AGAIN)
"""In this order, the slow to start last: if time runs out, it is theirs."""
MODULES = {FOREACH: "torch_cuda", COMPILED: "torch_cuda", OPTAX: "optax", NAIVE: "naive_cupy"}
SIZES = {f"{1 << (power % 10)}{'KMG'[power // 10 - 1]}": 1 << power for power in range(10, 31, 2)}
LARGE = 1 << 20
GRADIENTS = 1 << 28
"""Bytes that gradients taking turns may have."""


def run(quick: bool) -> Iterator[Answer]:
    sizes, rounds = ({"1K": 1 << 10, "4K": 1 << 12}, 2) if quick else (SIZES, 15)
    setting = (
        "plain rule, one float32 variable, random data, up to 8 gradients that take turns; wall: time per step of "
        "blocks of steps, the last of which is waited for; device: by events, the cache emptied before each step"
    )
    answer = Answer("sizes", "1K to 1G elements, beside the peers", setting)
    yield answer
    stage = Stage(quick)
    for who in CONTESTANTS:
        with attempt(answer, who):
            if who in MODULES:
                load(MODULES[who])
        if who in answer.skipped:
            continue
        for size, n in sizes.items():
            with attempt(answer, name_of(who, size=size)):
                _measure(answer, stage, who, size, n, rounds)
            _judge(answer, sizes)
            yield answer


def _judge(answer: Answer, sizes: dict[str, int]) -> None:
    """The figures that what is measured so far allows."""
    answer.figures.clear()
    for who in (*PEERS, AGAIN):
        for size, n in sizes.items():
            answer.compare(who, OURS, _goal(who, n), size=size, time="wall")


def _goal(who: str, n: int) -> Goal | None:
    """Never slower than the peers, and from 1M on 2.5 times faster than multi-tensor operations."""
    if who in (NAIVE, AGAIN):
        return None
    return Goal(">=", 2.5 if who == FOREACH and n >= LARGE else 1)


def _measure(answer: Answer, stage: Stage, who: str, size: str, n: int, rounds: int) -> None:
    step, wait = _contestant(stage, who, n)
    answer.measured("s", stage.wall_times(step, wait), who, size=size, time="wall")
    if who != OPTAX:  # whose streams our events do not see
        answer.measured("s", stage.device_times(always(step), rounds), who, size=size, time="device")


def _contestant(stage: Stage, who: str, n: int) -> tuple[Step, Wait]:
    n_grads = max(1, min(8, GRADIENTS // (4 * n)))
    if who == OPTAX:
        step, wait = load("optax").rotating(n, n_grads)
        return step, wait
    if who in (FOREACH, COMPILED):
        return load("torch_cuda").rotating(n, n_grads, who == COMPILED), synchronize
    var = stage.noise(n)
    if who == NAIVE:
        return _turning(stage, load("naive_cupy").rmsprop(var), n, n_grads), synchronize
    optimizer = RMSprop(LR, RHO, epsilon=EPSILON)
    return _turning(stage, lambda grad: optimizer.apply_gradients([(grad, var)]), n, n_grads), synchronize


def _turning(stage: Stage, step: Callable[[Any], object], n: int, n_grads: int) -> Step:
    grads, at = [stage.noise(n, seed=1 + i) for i in range(n_grads)], 0

    def turn() -> None:
        nonlocal at
        step(grads[at])
        at = (at + 1) % n_grads

    return turn
