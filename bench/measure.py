"""Contestants timed in turns: whatever slows the machine down slows all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

Step = Callable[[], object]
Ready = Callable[[], Step]

PAUSE = 0.01
"""Seconds between steps: thread pools of the peers spin for some milliseconds after their last task."""
WARM_UP = 2


class Missing(Exception):
    """A contestant cannot take part; the message says why."""


def always(step: Step) -> Ready:
    """For a step that needs no preparation."""
    return lambda: step


class _Contestant(NamedTuple):
    name: str
    ready: Ready
    around: Callable[[], AbstractContextManager[object]]


class Race:
    """Contestants, each of which takes one step per round."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self._contestants: list[_Contestant] = []

    def enter(
        self,
        name: str,
        make: Callable[[], Ready],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Add a contestant, or note by name why it is missing.

        Args:
            name: its name in tables.
            make: sets the contestant up and returns ``ready``, which prepares a step, untimed, and returns it.
            around: context of each step, entered and left untimed.
        """
        try:
            self._contestants.append(_Contestant(name, make(), around))
        except Missing as missing:
            self.skipped[name] = str(missing)

    def run(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of each contestant's step in each round. Who begins moves on from round to round."""
        seconds: dict[str, list[float]] = {contestant.name: [] for contestant in self._contestants}
        gc.collect()
        gc.disable()
        try:
            for nth in range(-WARM_UP, rounds):
                first = nth % max(1, len(self._contestants))
                for contestant in self._contestants[first:] + self._contestants[:first]:
                    elapsed = _time(contestant)
                    if nth >= 0:
                        seconds[contestant.name].append(elapsed)
        finally:
            gc.enable()
        return seconds


def _time(contestant: _Contestant) -> float:
    with contestant.around():
        step = contestant.ready()
        start = time.perf_counter() + PAUSE
        while time.perf_counter() < start:  # asleep, the core would lose its clock rate and its caches
            pass
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


class Spread(NamedTuple):
    """Median and quartiles of a series."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles; of a single value, the value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)
