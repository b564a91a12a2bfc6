"""Answers to the questions of a benchmark: what was measured, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.measure import spread


@dataclass(frozen=True)
class Goal:
    """A bound on a figure: ``sense`` is "<=", "<", ">=" or ">"."""

    sense: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether the value is within the bound."""
        return {
            "<=": value <= self.bound,
            "<": value < self.bound,
            ">=": value >= self.bound,
            ">": value > self.bound,
        }[self.sense]


@dataclass(frozen=True)
class Figure:
    """One line of a table. The median over rounds, with its quartiles; ``best`` is made of minima over rounds."""

    what: str
    unit: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    best: float | None = None
    goal: Goal | None = None
    met: bool | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Series:
    """What was measured: one value per round, in ``unit``.

    ``of`` says what the name says, for programs and for a table: "who" was measured, and under which conditions.
    """

    name: str
    unit: str
    values: list[float]
    of: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """The answer to one question."""

    name: str
    title: str
    setting: str
    figures: list[Figure] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answer:
        """The answer that ``asdict`` made a record of."""
        goals = [each["goal"] and Goal(**each["goal"]) for each in record["figures"]]
        figures = [Figure(**{**each, "goal": goal}) for each, goal in zip(record["figures"], goals)]
        return cls(**{**record, "figures": figures, "series": [Series(**each) for each in record["series"]]})

    def values(self, name: str) -> list[float] | None:
        """The series of that name."""
        return next((each.values for each in self.series if each.name == name), None)

    def measured(self, unit: str, values: list[float], who: str, **conditions: str) -> str:
        """Add a series; returns its name."""
        name = name_of(who, **conditions)
        self.series.append(Series(name, unit, values, {"who": who, **conditions}))
        return name

    def add_times(self, seconds: Mapping[str, list[float]], skipped: Mapping[str, str]) -> None:
        """Take over what a race measured."""
        self.series += [Series(name, "s", values) for name, values in seconds.items()]
        self.skipped.update(skipped)

    def add_ratio(self, over: str, under: str, goal: Goal | None = None, note: str = "") -> None:
        """The figure ``over / under``: how many times longer the first series takes than the second, by round."""
        what = f"{over} / {under}{note}"
        found = self._both(what, goal, over, under)
        if found is not None:
            above, below = found
            ratios = [a / b for a, b in zip(above, below, strict=True)]
            self.add(what, "x", ratios, goal, min(above) / min(below))

    def compare(self, over: str, under: str, goal: Goal | None = None, note: str = "", **conditions: str) -> None:
        """The same of two that did not take turns, under the same conditions.

        The ratio of their medians; its quartiles are those of one over the opposite ones of the other.
        """
        what = f"{', '.join(conditions.values())}: {over} / {under}{note}"
        found = self._both(what, goal, name_of(over, **conditions), name_of(under, **conditions))
        if found is not None:
            (above, below), (a, b) = found, map(spread, found)
            median = a.median / b.median
            met = None if goal is None else goal.met(median)
            best = min(above) / min(below)
            self.figures.append(Figure(what, "x", median, a.low / b.high, a.high / b.low, best, goal, met))

    def _both(self, what: str, goal: Goal | None, *names: str) -> tuple[list[float], list[float]] | None:
        above, below = (self.values(name) for name in names)
        if above is None or below is None:
            self.add_skipped(what, "x", goal, *(name for name in names if self.values(name) is None))
            return None
        return above, below

    def add(
        self, what: str, unit: str, values: list[float], goal: Goal | None = None, best: float | None = None
    ) -> None:
        """The figure that is the median of ``values``; ``best`` is what the least disturbed round says."""
        median, low, high = spread(values)
        met = None if goal is None else goal.met(median)
        if len(values) == 1:
            self.figures.append(Figure(what, unit, median, goal=goal, met=met))
        else:
            self.figures.append(Figure(what, unit, median, low, high, best, goal, met))

    def add_skipped(self, what: str, unit: str, goal: Goal | None, *missing: str) -> None:
        """The figure that could not be made, for what is missing."""
        self.figures.append(Figure(what, unit, goal=goal, skipped=", ".join(missing)))


def name_of(who: str, **conditions: str) -> str:
    """The name of a series."""
    return ", ".join([who, *conditions.values()])
