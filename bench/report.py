"""How answers are printed and written."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.answer import Answer, Figure, Series
from bench.measure import spread

SCHEMA = 1
COLUMNS = ("figure", "median", "quartiles", "of minima", "goal", "met")


def unjudged(answer: Answer) -> Answer:
    """The answer without verdicts, for sizes other than those of the goals."""
    return replace(answer, figures=[replace(figure, met=None) for figure in answer.figures])


def verdict(answers: Iterable[Answer]) -> str:
    """One line: how many goals are met, missed and not judged."""
    met, missed, rest = _judged(figure for answer in answers for figure in answer.figures)
    return f"goals: {met} met, {missed} missed, {rest} not judged"


def _judged(figures: Iterable[Figure]) -> tuple[int, int, int]:
    verdicts = [figure.met for figure in figures if figure.goal is not None]
    return verdicts.count(True), verdicts.count(False), verdicts.count(None)


def summary(answers: Sequence[Answer]) -> str:
    """The goals that were missed, and last a line per question."""
    missed = [(answer.name, *_row(figure)) for answer in answers for figure in answer.figures if figure.met is False]
    lines = [f"missed: {name}: {what}: {value} (goal {goal})" for name, what, value, _, _, goal, _ in missed]
    table = [("question", "met", "missed", "not judged", "skipped")]
    for answer in answers:
        table.append((answer.name, *map(str, _judged(answer.figures)), str(len(answer.skipped) or "")))
    return "\n".join([*lines, *_aligned(table)])


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpu = f"{_gpu(machine['gpu'])}; " if "gpu" in machine else ""
    missing = f" (missing: {', '.join(machine['missing'])})" if machine.get("missing") else ""
    sources = f" (sources {machine['sources']})" if "sources" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['os']}, Python {machine['python']}, "
        f"{versions}{missing}; commit {machine['commit'] or 'unknown'}{sources}, {machine['date']}, "
        f"load before {machine['load_before']}"
    )


def _gpu(gpu: Mapping[str, Any]) -> str:
    copy = "" if gpu["copy_GB_per_s"] is None else f", copies {_digits(gpu['copy_GB_per_s'])} GB/s"
    return (
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, {gpu['memory_GiB']} GiB{copy}), "
        f"driver {gpu['driver']}, CUDA {gpu['cuda_runtime']}, NVRTC {gpu['nvrtc']}"
    )


def as_text(answer: Answer) -> str:
    """Title, aligned tables, medians of what was measured."""
    lines = [f"{answer.name}: {answer.title}", answer.setting, *_aligned(_table(answer))]
    if pivot := _pivot(answer):
        lines += _aligned(pivot)
    footer = (textwrap.wrap(line, 110, initial_indent="  ", subsequent_indent="    ") for line in _footer(answer))
    return "\n".join(lines + [line for paragraph in footer for line in paragraph])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def as_markdown(machine: Mapping[str, Any], answers: Sequence[Answer]) -> str:
    """All answers as one page."""
    parts = [f"{machine_line(machine)}\n\n{verdict(answers)}"]
    for answer in answers:
        tables = [_markdown(table) for table in (_table(answer), _pivot(answer)) if table]
        footer = "\n".join(f"- {line}" for line in _footer(answer))
        title = f"## {answer.name}: {answer.title}"
        parts.append("\n\n".join([title, answer.setting, *tables, footer]).rstrip())
    return "\n\n".join(parts) + "\n"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    header, *rows = table
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def stem(suite: str, machine: Mapping[str, Any]) -> str:
    """The name of a run's files, without suffix."""
    return f"{suite}-{machine['date'][:10]}"


def write(
    folder: Path, suite: str, quick: bool, machine: Mapping[str, Any], answers: Sequence[Answer], more: str = ""
) -> tuple[Path, Path]:
    """Write ``<suite>-<date>.json`` and ``.md`` into the folder, over those of the same day; returns their paths.

    ``more`` is Markdown that ends the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = [asdict(answer) for answer in answers]
    record = {"schema": SCHEMA, "suite": suite, "quick": quick, "machine": dict(machine), "questions": questions}
    data, page = (folder / f"{stem(suite, machine)}{suffix}" for suffix in (".json", ".md"))
    data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    title = f"# python -m bench {suite}{' --quick' if quick else ''}"
    page.write_text(f"{title}\n\n{as_markdown(machine, answers)}{more}", encoding="utf-8")
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


def _pivot(answer: Answer) -> list[tuple[str, ...]]:
    """Medians with a column for each of those measured and a row for each condition; nothing if no series has any."""
    series = [each for each in answer.series if each.of]
    columns = list(dict.fromkeys(each.of["who"] for each in series))
    rows: dict[str, dict[str, str]] = {}
    for each in series:
        conditions = [value for key, value in each.of.items() if key != "who"]
        rows.setdefault(", ".join(conditions), {})[each.of["who"]] = _median(each)
    if not rows:
        return []
    return [("median", *columns), *((row, *(cells.get(who, "") for who in columns)) for row, cells in rows.items())]


def _footer(answer: Answer) -> list[str]:
    medians = [f"{each.name} {_median(each)}" for each in answer.series if not each.of]
    lines = ["medians: " + "; ".join(medians)] if medians else []
    return lines + answer.notes + [f"skipped: {name}: {why}" for name, why in answer.skipped.items()]


def _median(series: Series) -> str:
    value = spread(series.values).median
    if series.unit != "s":
        return _number(value, series.unit)
    return _number(value * 1e3, "ms") if value >= 1e-3 else _number(value * 1e6, "us")


def _number(value: float, unit: str) -> str:
    return f"{_digits(value)}{unit if unit in ('x', '') else ' ' + unit}"


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"
