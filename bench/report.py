"""Answers to the questions of a benchmark, and how they are printed and written."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.measure import spread

SCHEMA = 1
COLUMNS = ("figure", "median", "quartiles", "of minima", "goal", "met")


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
    """What was measured: one value per round, in ``unit``."""

    name: str
    unit: str
    values: list[float]


@dataclass
class Answer:
    """The answer to one question."""

    name: str
    title: str
    setting: str
    figures: list[Figure] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add_times(self, seconds: Mapping[str, list[float]], skipped: Mapping[str, str]) -> None:
        """Take over what a race measured."""
        self.series += [Series(name, "s", values) for name, values in seconds.items()]
        self.skipped.update(skipped)

    def add_ratio(self, over: str, under: str, goal: Goal | None = None, note: str = "") -> None:
        """The figure ``over / under``: how many times longer the first series takes than the second, by round."""
        what = f"{over} / {under}{note}"
        series = {each.name: each.values for each in self.series}
        if missing := [name for name in (over, under) if name not in series]:
            self.figures.append(Figure(what, "x", goal=goal, skipped=", ".join(missing)))
            return
        pairs = zip(series[over], series[under], strict=True)
        self.add(what, "x", [a / b for a, b in pairs], goal, min(series[over]) / min(series[under]))

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


def unjudged(answer: Answer) -> Answer:
    """The answer without verdicts, for sizes other than those of the goals."""
    return replace(answer, figures=[replace(figure, met=None) for figure in answer.figures])


def verdict(answers: Iterable[Answer]) -> str:
    """One line: how many goals are met, missed and not judged."""
    figures = [figure for answer in answers for figure in answer.figures if figure.goal is not None]
    met = sum(figure.met is True for figure in figures)
    missed = sum(figure.met is False for figure in figures)
    return f"goals: {met} met, {missed} missed, {len(figures) - met - missed} not judged"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['os']}, Python {machine['python']}, {versions}; "
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}, load before {machine['load_before']}"
    )


def as_text(answer: Answer) -> str:
    """Title, aligned table, medians of what was measured."""
    table = _table(answer)
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{answer.name}: {answer.title}", answer.setting]
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    footer = (textwrap.wrap(line, 110, initial_indent="  ", subsequent_indent="    ") for line in _footer(answer))
    return "\n".join(lines + [line for paragraph in footer for line in paragraph])


def as_markdown(machine: Mapping[str, Any], answers: Sequence[Answer]) -> str:
    """All answers as one page."""
    parts = [f"{machine_line(machine)}\n\n{verdict(answers)}"]
    for answer in answers:
        header, *rows = _table(answer)
        table = [header, ("---",) + ("---:",) * (len(COLUMNS) - 1), *rows]
        lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
        footer = "\n".join(f"- {line}" for line in _footer(answer))
        parts.append(f"## {answer.name}: {answer.title}\n\n{answer.setting}\n\n{lines}\n\n{footer}".rstrip())
    return "\n\n".join(parts) + "\n"


def write(
    folder: Path, suite: str, quick: bool, machine: Mapping[str, Any], answers: Sequence[Answer]
) -> tuple[Path, Path]:
    """Write ``<suite>-<date>.json`` and ``.md`` into the folder, over those of the same day; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{suite}-{machine['date'][:10]}"
    questions = [asdict(answer) for answer in answers]
    record = {"schema": SCHEMA, "suite": suite, "quick": quick, "machine": dict(machine), "questions": questions}
    data, page = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    title = f"# python -m bench {suite}{' --quick' if quick else ''}"
    page.write_text(f"{title}\n\n{as_markdown(machine, answers)}", encoding="utf-8")
    return data, page


def _table(answer: Answer) -> list[tuple[str, ...]]:
    return [COLUMNS, *(_row(figure) for figure in answer.figures)]


def _row(figure: Figure) -> tuple[str, ...]:
    goal = "" if figure.goal is None else f"{figure.goal.sense} {_number(figure.goal.bound, figure.unit)}"
    if figure.median is None:
        return figure.what, f"skipped: {figure.skipped}", "", "", goal, ""
    quartiles = "" if figure.low is None or figure.high is None else f"{_digits(figure.low)} to {_digits(figure.high)}"
    best = "" if figure.best is None else _number(figure.best, figure.unit)
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    return figure.what, _number(figure.median, figure.unit), quartiles, best, goal, met


def _footer(answer: Answer) -> list[str]:
    medians = [f"{each.name} {_measured(spread(each.values).median, each.unit)}" for each in answer.series]
    lines = ["medians: " + "; ".join(medians)] if medians else []
    return lines + [f"skipped: {name}: {why}" for name, why in answer.skipped.items()]


def _measured(value: float, unit: str) -> str:
    if unit == "s":
        return _number(value * 1e3, "ms")
    return _number(value, unit)


def _number(value: float, unit: str) -> str:
    return f"{_digits(value)}{unit if unit in ('x', '') else ' ' + unit}"


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"
