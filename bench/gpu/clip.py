"""What does clipping by norm cost, and does any step wait for the device?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cupy
import numpy as np

from bench.answer import Answer, Goal, name_of
from bench.gpu.stage import Stage, attempt, synchronize
from bench.measure import Missing, Step, always
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from gpurms import IndexedSlices, RMSprop

KINDS: dict[str, dict[str, float]] = {
    "none": {},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
}
NOTES = {"clipvalue": "", "clipnorm": " (memory moved: 1.2x)", "global_clipnorm": " (memory moved: 1.2x)"}


def run(quick: bool) -> Iterator[Answer]:
    rounds = 2 if quick else 25
    layouts = {"1K": [1 << 10], "5 x 64": [64] * 5} if quick else {"64M": [1 << 26], "1,000 x 1,024": [1024] * 1000}
    setting = (
        "plain rule, float32; device: by events; host: until the step returns. A step waits if it returns only after "
        "the device has done what it was given before"
    )
    answer = Answer("clip", "clipping, and whether a step waits", setting)
    yield answer
    stage = Stage(quick)
    for layout, parts in layouts.items():
        for kind in KINDS:
            with attempt(answer, name_of(kind, layout=layout)):
                _measure(answer, stage, kind, layout, parts, rounds)
            yield answer
        for kind, note in NOTES.items():
            for clock in ("device", "host"):
                answer.compare(kind, "none", note=note if clock == "device" else "", layout=layout, time=clock)
    for what, make in _steps(stage, list(layouts.values())[1]).items():
        with attempt(answer, what):
            _watch(answer, stage, what, make)
        yield answer


def _measure(answer: Answer, stage: Stage, kind: str, layout: str, parts: list[int], rounds: int) -> None:
    ready = always(_dense(stage, parts, KINDS[kind]))
    answer.measured("s", stage.device_times(ready, rounds), kind, layout=layout, time="device")
    answer.measured("s", stage.host_times(ready, rounds), kind, layout=layout, time="host")


def _dense(stage: Stage, parts: list[int], options: dict[str, Any]) -> Step:
    pairs = [(stage.noise(n, seed=1), stage.noise(n)) for n in parts]
    optimizer = RMSprop(LR, RHO, epsilon=EPSILON, **options)
    return lambda: optimizer.apply_gradients(pairs)


def _steps(stage: Stage, parts: list[int]) -> dict[str, Callable[[], Step]]:
    """Steps none of which may wait."""
    dense = {f"waits: {kind}": partial(_dense, stage, parts, options) for kind, options in KINDS.items()}
    return {**dense, "waits: sparse, unchecked": lambda: _sparse(stage, {})} | {
        f"waits: sparse, unchecked, {kind}": partial(_sparse, stage, KINDS[kind])
        for kind in ("clipnorm", "global_clipnorm")
    }


def _sparse(stage: Stage, options: dict[str, Any]) -> Step:
    n, n_rows, row_size = (50, 20, 4) if stage.quick else (100_000, 100_000, 64)
    table, values = stage.noise(n_rows * row_size), stage.noise(n * row_size, seed=1)
    ids = cupy.asarray(np.random.default_rng(0).integers(n_rows, size=n))
    slices, table = IndexedSlices(values.reshape(n, row_size), ids), table.reshape(n_rows, row_size)
    optimizer = RMSprop(LR, RHO, MOMENTUM, EPSILON, check_indices=False, **options)
    return lambda: optimizer.apply_gradients([(slices, table)])


def _watch(answer: Answer, stage: Stage, what: str, make: Callable[[], Step]) -> None:
    ready = always(make())
    if stage.returns_early(always(synchronize)) or not stage.returns_early(always(lambda: None)):
        raise Missing("a step that waits and one that does nothing cannot be told apart here")
    answer.add(what, "", [0.0 if stage.returns_early(ready) else 1.0], Goal("<=", 0))
