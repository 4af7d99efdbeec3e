"""Shows the sensitivity of each part of a quantized network: a table, and a picture of bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qat_tricks.evidence.show import show
from qat_tricks.files import replacing

_COLOURS = {"weights": "#0072b2", "activations": "#d55e00"}
_BAR_INCHES = 0.2  # height of one bar with its label
_SMALLEST = 1e-9  # nats; the axis is logarithmic, and a part may change nothing


def sensitivity_table(sensitivity: dict[str, Any]) -> Table:
    """Returns a rich table, one row a part, the worst first.

    Args:
        sensitivity: plain data of ``Sensitivities.as_dict``.
    """
    table = Table(
        title="each part alone on its grid, all others in float", box=SIMPLE_HEAD, show_edge=False
    )
    table.add_column("part", overflow="fold")
    table.add_column("of")
    for column in ("bits", "KL (nats)", "SQNR", "agreement"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in sensitivity["parts"]:
        kind = part["kind"] + (", rounded already" if part.get("is_rounded") else "")
        table.add_row(part["name"], kind, str(part["bits"]), *_cells(part))
    together = sensitivity["together"]
    table.add_section()
    table.add_row("all together", "", "", *_cells(together))
    table.caption = f"against the float network, on {sensitivity['images']} training images"
    table.caption_justify = "left"
    return table


def _cells(error: dict[str, Any]) -> list[str]:
    if error.get("is_rounded"):  # what its rounding costs cannot be seen any more
        return ["-", "-", "-"]
    figures = (("kl", "error"), ("sqnr_db", "db"), ("agreement", "percent"))
    return [show(error[key], unit) for key, unit in figures]


def plot_sensitivity(sensitivity: dict[str, Any], path: Path) -> None:
    """Draws the divergence of each part as PNG, a bar a part, the worst at the top.

    Args:
        sensitivity: plain data of ``Sensitivities.as_dict``.
        path: of the picture.

    Raises:
        QatTricksError: the file cannot be written.
    """
    parts: Sequence[dict[str, Any]] = sensitivity["parts"]
    figure = Figure(figsize=(9, 1.4 + _BAR_INCHES * len(parts)), layout="constrained")
    # Without pyplot, which would keep the figure and may need a display.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [max(part["kl"], _SMALLEST) for part in parts]
    axes.barh(range(len(parts)), values, color=[_COLOURS[part["kind"]] for part in parts])
    axes.set_yticks(range(len(parts)), [f"{p['name']} ({p['bits']} bits)" for p in parts])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()  # the first part at the top
    axes.margins(y=0.01)
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence of the class probabilities, this part alone (nats)")
    axes.grid(axis="x", alpha=0.25)
    together = max(sensitivity["together"]["kl"], _SMALLEST)
    line = axes.axvline(together, color="black", lw=1, ls="--", label="all together")
    kinds = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    axes.legend(handles=[*kinds, line], loc="lower right", fontsize=8)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=130)
