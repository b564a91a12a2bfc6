"""The loss curve beside a map of words."""

from __future__ import annotations

from itertools import product
from typing import IO, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox
from sklearn.manifold import TSNE

from gpurms.demo.corpus import Corpus
from gpurms.demo.neighbours import FloatArray, Group
from gpurms.demo.train import LOSS_EVERY, Run

Points = dict[int, tuple[float, float]]
"""Where words stand on the map, in its own coordinates."""


class Place(NamedTuple):
    """Where a label stands: its direction from the dot, and the part of it that is nearest to the dot."""

    x: float
    y: float
    horizontal: Literal["left", "center", "right"]
    vertical: Literal["bottom", "center", "top"]


PLACES = (
    Place(1.2, 0, "left", "center"), Place(-1.2, 0, "right", "center"),
    Place(0, 1, "center", "bottom"), Place(0, -1, "center", "top"),
    Place(1, 0.7, "left", "bottom"), Place(-1, 0.7, "right", "bottom"),
    Place(1, -0.7, "left", "top"), Place(-1, -0.7, "right", "top"),
)  # fmt: skip
"""In order of preference."""
DISTANCES = (4, 6, 9, 13, 18, 24)
"""From dot to label, in points of 1/72 inch; the last ones are for probes only, which must not go unnamed."""
COLORS = (
    "#4269d0", "#c77700", "#d6336c", "#2b8a9e", "#2f8f4e", "#8d5a3b", "#8a4bd0", "#5f6b7a",
)  # fmt: skip
"""Dark enough for text on white."""
INK = "#222222"
SMOOTH = 0.03
"""Share of the curve over which the loss is averaged."""


def draw(file: IO[bytes], corpus: Corpus, vectors: FloatArray, groups: list[Group], run: Run, title: str) -> None:
    """Write the picture, a PNG of 1680 x 840 pixels."""
    figure = Figure(figsize=(14, 7), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, color=INK, parse_math=False, wrap=True)
    loss_axes, map_axes = figure.subplots(1, 2, width_ratios=(1, 2.1))
    _draw_loss(loss_axes, run)
    points, colors = _draw_dots(map_axes, vectors, groups)
    figure.draw_without_rendering()  # lays out the axes, so that the labels' room is known
    figure.set_layout_engine("none")
    _draw_labels(map_axes, corpus, groups, points, colors)
    figure.savefig(file, format="png")


def smooth(values: FloatArray) -> FloatArray:
    """Mean over a window around each value, which is cut off at the ends.

    >>> smooth(np.arange(100, dtype=np.float32))[[0, 1, 50, 99]].tolist()
    [0.5, 1.0, 50.0, 98.5]
    """
    half = int(len(values) * SMOOTH / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first), np.float32)


def _draw_loss(axes: Axes, run: Run) -> None:
    steps, losses = (np.array(column) for column in zip(*run.losses, strict=True))
    axes.plot(steps, losses, color=COLORS[0], alpha=0.3, linewidth=1, label=f"mean of {LOSS_EVERY} steps")
    axes.plot(steps, smooth(losses), color=COLORS[0], linewidth=2, label="smoothed")
    axes.set(xlabel="step of the optimizer", ylabel="loss of a pair of words (nats)", xlim=(0, None))
    axes.set_title("Training loss", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_dots(axes: Axes, vectors: FloatArray, groups: list[Group]) -> tuple[Points, dict[int, str]]:
    """Draw a dot for each word, tied to its probe; returns where they are, and the colour of each probe."""
    owners = _owners(groups)
    shown = list(owners)
    points = {word: (float(x), float(y)) for word, (x, y) in zip(shown, _project(vectors[shown]))}
    colors = _group_colors(groups, points)
    for word, probe in owners.items():
        color = colors[probe]
        axes.plot(*zip(points[probe], points[word]), color=color, alpha=0.25, linewidth=1, zorder=1)
        axes.plot(*points[word], "o", color=color, markersize=6 if word == probe else 3.5, zorder=2)
    axes.set_title("Words and their nearest neighbours", color=INK)
    axes.set(xlabel="t-SNE of cosine distances, axis 1", ylabel="axis 2", xticks=[], yticks=[])
    axes.margins(0.07)
    axes.spines[:].set_color("#bbbbbb")
    return points, colors


def _draw_labels(axes: Axes, corpus: Corpus, groups: list[Group], points: Points, colors: dict[int, str]) -> None:
    """Label dots, none over another label or dot: the probes first, and no word for which there is no room."""
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axes.transData.transform(list(points.values()))]
    room = axes.bbox.padded(-8)
    owners = _owners(groups)
    for word in sorted(owners, key=lambda word: word != owners[word]):
        bold = word == owners[word]
        for distance, place in product(DISTANCES if bold else DISTANCES[:-2], PLACES):
            label = axes.annotate(
                corpus.vocabulary[word],
                points[word],
                (place.x * distance, place.y * distance),
                textcoords="offset points",
                ha=place.horizontal,
                va=place.vertical,
                color=colors[owners[word]],
                fontsize=11.5 if bold else 8.5,
                fontweight="bold" if bold else "normal",
            )
            box = label.get_window_extent()
            if room.count_contains([box.min, box.max]) == 2 and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def _owners(groups: list[Group]) -> dict[int, int]:
    """For each word to show, the probe that it is nearest to."""
    best = {group.probe: (1.0, group.probe) for group in groups}
    for group in groups:
        for word, cosine in zip(group.near.tolist(), group.cosines.tolist()):
            if group.probe != word and best.get(word, (-2.0, 0))[0] < cosine:
                best[word] = (cosine, group.probe)
    return {word: probe for word, (_, probe) in best.items()}


def _project(vectors: FloatArray) -> FloatArray:
    """Two coordinates for each vector."""
    perplexity = min(12.0, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", method="exact", random_state=0)
    return np.asarray(tsne.fit_transform(vectors), np.float32)


def _group_colors(groups: list[Group], points: Points) -> dict[int, str]:
    """Colours in turn around the middle of the map, so that groups side by side differ."""
    probes = [group.probe for group in groups]
    x, y = np.array([points[probe] for probe in probes]).T
    around = np.argsort(np.arctan2(y - y.mean(), x - x.mean()))
    return {probes[position]: COLORS[i % len(COLORS)] for i, position in enumerate(around)}
