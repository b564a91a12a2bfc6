"""A picture of a run, where matplotlib is installed and there is something to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.answer import Answer, Series
from bench.measure import spread


class Drawn(NamedTuple):
    """Markdown that shows the picture or says why there is none, and the files."""

    markdown: str
    paths: list[Path]


def draw(stem: Path, answers: Sequence[Answer]) -> Drawn | None:
    """Write ``stem``.svg; None if the run has nothing to draw."""
    panels = {"sizes": _sizes, "dense": _dense, "many": _many}
    series = {each.name: [one for one in each.series if one.of] for each in answers if each.name in panels}
    drawable = {name: found for name, found in series.items() if found}
    if not drawable:
        return None
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # an installation can be broken in as many ways as there are libraries below it
        return Drawn(f"\nchart: skipped: {type(error).__name__}: {error}\n", [])
    figure = Figure(figsize=(9, 4.2 * len(drawable)), layout="constrained")
    axes = figure.subplots(len(drawable), squeeze=False)[:, 0]
    for place, (name, found) in zip(axes, drawable.items(), strict=True):
        panels[name](place, found)
        place.spines[["top", "right"]].set_visible(False)
    path = stem.with_suffix(".svg")
    figure.savefig(path)
    return Drawn(f"\n![chart]({path.name})\n", [path])


def _sizes(axes: Any, series: list[Series]) -> None:
    """Wall time per step over the number of elements."""
    wall = [each for each in series if each.of["time"] == "wall"]
    ticks = list(dict.fromkeys(each.of["size"] for each in wall))
    for who in dict.fromkeys(each.of["who"] for each in wall):
        points = [(ticks.index(each.of["size"]), _micro(each)) for each in wall if each.of["who"] == who]
        axes.plot(*zip(*points), marker="o", markersize=4, label=who, linewidth=2.5 if who == "gpurms" else 1.2)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(yscale="log", xlabel="elements of one float32 variable", ylabel="us per step, host included")
    axes.set_title("One step, plain rule", loc="left")
    axes.legend(frameon=False)


def _dense(axes: Any, series: list[Series]) -> None:
    """Fractions of the copy bandwidth."""
    found = [each for each in series if each.unit == "%"]
    kinds = list(dict.fromkeys((each.of["size"], each.of["layout"]) for each in found))
    rows = list(dict.fromkeys((each.of["dtype"], each.of["rule"]) for each in found))
    for nth, kind in enumerate(kinds):
        chosen = [each for each in found if (each.of["size"], each.of["layout"]) == kind]
        where = [rows.index((each.of["dtype"], each.of["rule"])) + 0.8 * nth / len(kinds) for each in chosen]
        heights = [spread(each.values).median for each in chosen]
        axes.bar(where, heights, 0.8 / len(kinds), align="edge", label=", ".join(kind))
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xticks([row + 0.4 for row in range(len(rows))], [" ".join(row) for row in rows], rotation=45, ha="right")
    axes.set(ylabel="% of the copy bandwidth")
    axes.set_title("Dense steps of gpurms", loc="left")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _many(axes: Any, series: list[Series]) -> None:
    """Host and device time of a step with many variables."""
    clocks = ("host", "both", "device")
    names = list(dict.fromkeys(each.of["who"] for each in series))
    for nth, clock in enumerate(clocks):
        chosen = [each for each in series if each.of["time"] == clock]
        where = [names.index(each.of["who"]) + 0.27 * nth for each in chosen]
        axes.bar(where, [_micro(each) for each in chosen], 0.25, align="edge", label=clock)
    axes.set_xticks([at + 0.4 for at in range(len(names))], names)
    axes.set(yscale="log", ylabel="us per step")
    axes.set_title("Many small variables", loc="left")
    axes.legend(frameon=False)


def _micro(series: Series) -> float:
    return spread(series.values).median * 1e6
