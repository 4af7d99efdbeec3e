"""Draws a sweep: accuracy against size and against latency, with a labelled point a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qat_tricks.evidence.compared_networks import Network
from qat_tricks.files import replacing

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
_FLOAT_COLOUR = "#000000"
_LABEL_INCHES = 0.24  # height of one label
_LETTER_INCHES = 0.075  # width of one letter of a label


class _Point(NamedTuple):
    label: str
    x: float
    accuracy: float  # percent
    colour: str
    marker: str


def plot_comparison(jobs: Sequence[Network], floats: Sequence[Network], path: Path) -> None:
    """Draws the networks of a sweep as PNG; a panel leaves out those that lack its figure.

    Args:
        jobs: of ``job_networks``.
        floats: of ``float_networks``.
        path: of the picture.

    Raises:
        QatTricksError: the file cannot be written.
    """
    panels = [
        ("model file (MB)", _points(jobs, floats, "size_bytes", 1e-6)),
        ("latency, median of a batch (ms)", _points(jobs, floats, "latency_ms", 1.0)),
    ]
    labels = max(len(points) for _, points in panels)
    width = _LETTER_INCHES * max((len(own["name"]) for own in (*jobs, *floats)), default=0)
    # each panel has a column of labels at its right
    size = (10 + 2 * width, max(4.2, 1.2 + _LABEL_INCHES * labels))
    figure = Figure(figsize=size, layout="constrained")
    # Without pyplot, which would keep the figure and may need a display.
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(1, 2), panels, strict=True):
        _panel(axes, title, points)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=130)


def _points(
    jobs: Sequence[Network], floats: Sequence[Network], figure: str, scale: float
) -> list[_Point]:
    """Returns the networks that have the figure and an accuracy: those of the jobs, then floats."""
    coloured = [(own, _COLOURS[place % len(_COLOURS)], "o") for place, own in enumerate(jobs)]
    coloured += [(own, _FLOAT_COLOUR, "D") for own in floats]
    return [
        _Point(own["name"], own[figure] * scale, own["accuracy"] * 100, colour, marker)
        for own, colour, marker in coloured
        if own[figure] is not None and own["accuracy"] is not None
    ]


def _panel(axes: Axes, title: str, points: list[_Point]) -> None:
    axes.set_xlabel(title)
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.25)
    axes.margins(0.08, 0.12)
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
        return
    for point in points:
        face = "none" if point.marker == "D" else point.colour
        axes.plot(
            point.x,
            point.accuracy,
            point.marker,
            ms=8,
            mec=point.colour,
            mfc=face,
            mew=1.5,
            ls="none",
            clip_on=False,  # a network may be right on all images, at the edge
        )
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100.0))
    _label(axes, points)


def _label(axes: Axes, points: list[_Point]) -> None:
    """Writes the labels in a column to the right, in the order of the points, without overlaps."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: (-point.accuracy, -point.x))
    step = 1.0 / max(len(ordered), 12)
    heights = [(point.accuracy - low) / (high - low) for point in ordered]
    for index in range(1, len(heights)):  # push down a label too near the one above
        heights[index] = min(heights[index], heights[index - 1] - step)
    floor = step / 2
    for index in reversed(range(len(heights))):  # and up again a label below the panel
        heights[index] = max(heights[index], floor)
        floor = heights[index] + step
    for point, height in zip(ordered, heights, strict=True):
        axes.annotate(
            point.label,
            xy=(point.x, point.accuracy),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            color=point.colour,
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": point.colour,
                "alpha": 0.35,
                "lw": 0.8,
                "shrinkA": 0,
                "shrinkB": 5,
            },
        )
