"""How close is a dense step to the speed of memory?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.answer import Answer, Goal, Series, name_of
from bench.gpu.stage import Stage, attempt
from bench.measure import Missing, always, spread
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from gpurms import RMSprop

RULES = {  # momentum, centered
    "plain": (0.0, False),
    "momentum": (MOMENTUM, False),
    "centered": (0.0, True),
    "both": (MOMENTUM, True),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
JUDGED = ("float32", "bfloat16")
GOAL = Goal(">=", 92)
FRACTION = "of copy"
ONE, RAGGED = "one variable", "200 variables"
SIZES = {"64M": 1 << 26, "256M": 1 << 28}


def run(quick: bool) -> Iterator[Answer]:
    sizes, count, rounds = ({"1K": 1 << 10}, 5, 2) if quick else (SIZES, 200, 25)
    rules = ("plain", "both") if quick else tuple(RULES)
    setting = (
        f"median of {rounds} steps, by events; bytes that a step must move, over its time, over the rate of copies in "
        "the same process; slots of 16-bit variables are float32; 200 variables: of random odd sizes"
    )
    answer = Answer("dense", "dense steps as fractions of the copy bandwidth", setting)
    yield answer
    stage = Stage(quick)
    answer.series.append(Series("copy", "GB/s", stage.copy_rates()))
    for dtype in DTYPES[:2] if quick else DTYPES:
        for size, n in sizes.items():
            for layout, parts in ((ONE, [n]), (RAGGED, ragged(n, count))):
                for rule in rules:
                    conditions = {"dtype": dtype, "rule": rule, "size": size, "layout": layout}
                    with attempt(answer, name_of("gpurms", **conditions)):
                        seconds = stage.device_times(always(_ours(stage, dtype, rule, parts)), rounds)
                        answer.measured("s", seconds, "gpurms", **conditions)
                    _add_fraction(answer, conditions, n * bytes_moved(dtype, rule))
                    yield answer


def ragged(n: int, count: int) -> list[int]:
    """Sizes of ``count`` variables of n elements together, most of them odd."""
    shares = np.random.default_rng(0).dirichlet(np.ones(count))
    sizes = [int(share * n) | 1 for share in shares]
    sizes[sizes.index(max(sizes))] += n - sum(sizes)
    return sizes


def as_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise Missing(str(error)) from error
    return np.dtype(ml_dtypes.bfloat16)


def bytes_moved(dtype: str, rule: str) -> int:
    """Per element: the gradient is read, variable and slots are read and written."""
    element, slot = {"float32": (4, 4), "float64": (8, 8)}.get(dtype, (2, 4))
    momentum, centered = RULES[rule]
    return 3 * element + 2 * slot * (1 + (momentum > 0) + centered)


def _ours(stage: Stage, dtype: str, rule: str, parts: list[int]) -> Any:
    kind = as_dtype(dtype)
    pairs = [(stage.noise(n, kind, 1), stage.noise(n, kind)) for n in parts]
    momentum, centered = RULES[rule]
    optimizer = RMSprop(LR, RHO, momentum, EPSILON, centered)
    return lambda: optimizer.apply_gradients(pairs)


def _add_fraction(answer: Answer, conditions: dict[str, str], n_bytes: int) -> None:
    what = name_of(FRACTION, **conditions)
    goal = GOAL if conditions["dtype"] in JUDGED else None
    seconds, rates = answer.values(name_of("gpurms", **conditions)), answer.values("copy")
    if seconds is None or rates is None:
        answer.add_skipped(what, "%", goal, name_of("gpurms", **conditions))
        return
    percent = [100 * n_bytes / each / 1e9 / spread(rates).median for each in seconds]
    answer.measured("%", percent, FRACTION, **conditions)
    answer.add(what, "%", percent, goal, max(percent))
