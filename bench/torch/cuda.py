"""How much faster is a step on a GPU, and does it wait for the GPU?"""

from __future__ import annotations

from typing import Any

import torch

from bench.answer import Answer, Goal
from bench.measure import Missing, Race, Ready, Step, always
from bench.torch.contestants import FOREACH, GPURMS, fresh, optimizer, parameters

COMPILED = "torch.compile"
NO_GPU = "torch finds no CUDA device"


def run(quick: bool) -> Answer:
    total, count, rounds = (20_000, 5, 3) if quick else (100_000_000, 200, 25)
    setting = f"{total:,} parameters in {count} tensors, plain rule, float32, {rounds} rounds, each waited for"
    answer = Answer("cuda", "a model's parameters on a GPU", setting)
    race = Race()
    for name in (GPURMS, FOREACH, COMPILED):
        race.enter(name, lambda name=name: _ready(name, [total // count] * count))
    answer.add_times(race.run(rounds), race.skipped)
    answer.add_ratio(FOREACH, GPURMS, Goal(">=", 2.5))
    answer.add_ratio(COMPILED, GPURMS, Goal(">=", 1))
    what, goal = "steps that wait for the GPU", Goal("<=", 0)
    if torch.cuda.is_available():
        if can_see_waits():
            answer.add(what, "", [float(waits()) for _ in range(3)], goal)
        else:
            answer.add_skipped(what, "", goal, "a step that waits is not noticed")
    else:
        answer.add_skipped(what, "", goal, NO_GPU)
    return answer


def _ready(name: str, sizes: list[int]) -> Ready:
    if not torch.cuda.is_available():
        raise Missing(NO_GPU)
    if name == COMPILED:
        of = parameters(sizes, "cuda")
        step: Any = torch.compile(optimizer(FOREACH, of).step)
        taken = always(step)
    else:
        taken = fresh(name, parameters(sizes, "cuda"))

    def ready() -> Step:
        one = taken()
        torch.cuda.synchronize()

        def waited() -> None:
            one()
            torch.cuda.synchronize()

        return waited

    return ready


def can_see_waits() -> bool:
    """Whether torch raises an error where the host waits for the GPU, and none where it does not."""
    one = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.add_(1)
        one.item()
    except RuntimeError as error:
        return "synchroniz" in str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def waits() -> bool:
    """Whether a step under a gradient scaler waits: torch raises an error at the first wait that it makes."""
    of = parameters([1000] * 5, "cuda")
    taken = optimizer(GPURMS, of)
    taken.step()
    taken.grad_scale, taken.found_inf = torch.full((1,), 4.0, device="cuda"), torch.zeros(1, device="cuda")
    taken.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken.step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
