"""The figures of ``report.html``: drawn by matplotlib as SVG that takes its colours from the page.

So one figure serves light and dark, screen and print. The two colours that carry meaning, float and
int8, are told apart by the colour-blind (Okabe and Ito 2008, "Color Universal Design"), and by
their markers.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unicodedata import east_asian_width

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from qat_tricks.evidence.language import ENGLISH, Language
from qat_tricks.evidence.paired import SIGNIFICANT
from qat_tricks.evidence.show import show

# Stand-ins, which become variables of the page's style sheet. No other colour is drawn.
INK, MUTED, GRID, FLOAT, INT8 = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FLOAT: "float", INT8: "int8"}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a class may be called $5
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH = 5.4  # inches, so that letters keep their size on a phone
_MOST = 16  # rows of a figure; the tables have all
_NAMES = {"fp32": "float", "int8": "int8"}
_COLOURS = {"fp32": FLOAT, "int8": INT8}
_TITLE = "title-"  # of ids, which become titles
_MARKERS = {"fp32": "D", "int8": "o"}


def stages_plot(stages: Sequence[Mapping[str, Any]], say: Language) -> Markup:
    """Accuracy after each stage, in percent."""

    def draw(axes: Axes) -> None:
        values = [stage["accuracy"] * 100 for stage in stages]
        places = range(len(stages))
        axes.plot(places, values, "-", color=MUTED, lw=1)
        axes.plot(0, values[0], _MARKERS["fp32"], color=FLOAT, ms=7)
        axes.plot(places[1:], values[1:], _MARKERS["int8"], color=INT8, ms=7, ls="none")
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}", (place, value), (0, 8), textcoords="offset points", ha="center"
            )
        axes.set_xticks(places, [_short(stage["name"], 14) for stage in stages])
        axes.margins(x=0.1)
        _accuracy_axis(axes, values, say)

    return _figure("stages", draw, height=2.6)


def tradeoff_plot(stages: Sequence[Mapping[str, Any]], say: Language) -> Markup | None:
    """Accuracy against the size of the file and against latency, of each stage that has them."""
    known = [s for s in stages if s.get("size_bytes") and s.get("latency_ms")]
    if len(known) < 2:
        return None
    sizes = [stage["size_bytes"] / 1e6 for stage in known]
    times = [stage["latency_ms"]["p50"] for stage in known]

    def panel(axes: Axes, values: list[float], label: str) -> None:
        for index, (stage, value) in enumerate(zip(known, values, strict=True)):
            kind = "int8" if index else "fp32"
            y = stage["accuracy"] * 100
            axes.plot(value, y, _MARKERS[kind], color=_COLOURS[kind], ms=7)
            # by turns above and below, for stages often lie close
            axes.annotate(
                _short(stage["name"], 14),
                (value, y),
                (0, 8 if index % 2 else -15),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xlim(0, max(values) * 1.25)
        _accuracy_axis(axes, [stage["accuracy"] * 100 for stage in known], say)
        axes.set_xlabel(label)

    def draw(left: Axes, right: Axes) -> None:
        panel(left, sizes, say("file, MB"))
        panel(right, times, say("latency, ms a batch"))
        right.set_ylabel("")

    return _figure("tradeoff", draw, height=2.6, panels=2)


def classes_plot(classes: Sequence[Mapping[str, Any]], say: Language) -> Markup:
    """The change of each class in points, with its interval, the worst first."""
    # Those that lost most and those that gained most.
    few = [*classes[: _MOST - 4], *classes[-4:]] if len(classes) > _MOST else list(classes)

    def draw(axes: Axes) -> None:
        for place, row in enumerate(few):
            colour = INT8 if row["q"] < SIGNIFICANT else MUTED
            axes.plot([row["low"], row["high"]], [place, place], "-", color=colour, lw=2)
            axes.plot(row["points"], place, "o", color=colour, ms=6)
        axes.axvline(0, color=INK, lw=1)
        _name_rows(axes, [_short(row["name"]) for row in few])
        axes.set_xlabel(say("change of the class's accuracy, points (95 %% interval)"))

    return _figure("classes", draw, height=0.9 + 0.24 * len(few))


def confusions_plot(confusions: Sequence[Mapping[str, Any]], say: Language) -> Markup:
    """How many more, or fewer, images of one class are taken for another."""
    few = confusions[:_MOST]

    def draw(axes: Axes) -> None:
        changes = [row["int8"] - row["fp32"] for row in few]
        colours = [INT8 if change > 0 else FLOAT for change in changes]
        axes.barh(range(len(few)), changes, color=colours, height=0.6)
        axes.axvline(0, color=INK, lw=1)
        names = [
            say(
                "%(label)s taken for %(predicted)s",
                **{key: _short(row[key]) for key in ("label", "predicted")},
            )
            for row in few
        ]
        _name_rows(axes, names)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(say("images more (right) or fewer (left) than in float"))

    return _figure("confusions", draw, height=0.9 + 0.24 * len(few))


def reliability_plot(
    reliability: Mapping[str, Sequence[Mapping[str, float]]], say: Language
) -> Markup:
    """How often each network is right where it is so sure."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color=MUTED, lw=1, label=say("as sure as right"))
        for kind, rows in reliability.items():
            sure, right = ([row[key] for row in rows] for key in ("confidence", "share"))
            bounds = [
                [row["share"] - row["low"] for row in rows],
                [row["high"] - row["share"] for row in rows],
            ]
            axes.errorbar(
                sure,
                right,
                bounds,
                fmt=f"-{_MARKERS[kind]}",
                color=_COLOURS[kind],
                lw=1.5,
                elinewidth=0.8,
                ms=5,
                label=_NAMES[kind],
            )
        axes.set_xlabel(say("confidence"))
        axes.set_ylabel(say("share that is right (95 %% interval)"))
        axes.legend(frameon=False)

    return _figure("reliability", draw, height=3.2)


def latency_plot(latency: Mapping[str, Mapping[str, Any] | None], say: Language) -> Markup | None:
    """The share of runs that took no longer than so many milliseconds, of both networks.

    Args:
        latency: ``quantiles`` of each, evenly spaced, with ``p50``, ``p95`` and ``p99``.
        say: the language of the axes.
    """
    known = {kind: latency.get(kind) or {} for kind in ("fp32", "int8")}
    if not all("quantiles" in values for values in known.values()):
        return None

    def draw(axes: Axes) -> None:
        for kind, values in known.items():
            times = values["quantiles"]
            shares = [100 * place / (len(times) - 1) for place in range(len(times))]
            axes.plot(times, shares, color=_COLOURS[kind], label=_NAMES[kind])
            for percent in (50, 95, 99):
                axes.plot(values[f"p{percent}"], percent, "o", color=_COLOURS[kind], markersize=4)
            text = f" {show(values['p50'], 'ms')}"
            axes.annotate(text, (values["p50"], 50), (4, -4), textcoords="offset points")
        # The slowest runs, of which one may be many times as long, would squeeze all others.
        axes.set_xlim(0, 1.5 * max(values["p99"] for values in known.values()))
        axes.set_xlabel(say("ms a batch"))
        axes.set_ylabel(say("%% of the runs took no longer"))
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return _figure("latency", draw, height=2.6)


def steps_plot(steps: Sequence[Mapping[str, Any]], say: Language) -> Markup | None:
    """Signal to error of each step against the user's own network, in dB."""
    known = [step for step in steps if step.get("evaluation_db") is not None]
    if not known:
        return None

    def draw(axes: Axes) -> None:
        values = [step["evaluation_db"] for step in known]
        colours = [MUTED if step.get("by_design") else INT8 for step in known]
        axes.barh(range(len(known)), values, color=colours, height=0.6)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.0f} dB", (value, place), (4, 0), textcoords="offset points", va="center"
            )
        _name_rows(axes, [_short(say.word(step["name"]), 34) for step in known])
        axes.margins(x=0.15)
        axes.set_xlabel(say("signal to error, dB; grey: changes the function by design"))

    return _figure("steps", draw, height=0.9 + 0.26 * len(known))


def proofs_plot(proofs: Sequence[Mapping[str, Any]], say: Language) -> Markup | None:
    """The divergence from the float network before and after each trick, in nats."""
    known = [p for p in proofs if p.get("kl_before") and p.get("kl_after")]
    if not known:
        return None

    def draw(axes: Axes) -> None:
        for place, proof in enumerate(known):
            kept = not proof.get("undone") and "rolled back" not in proof["verdict"]
            colour = INT8 if kept else MUTED
            axes.plot([proof["kl_before"], proof["kl_after"]], [place] * 2, color=colour, lw=1.5)
            axes.plot(proof["kl_before"], place, "|", color=INK, ms=10)
            axes.plot(proof["kl_after"], place, "o", color=colour, ms=6)
        axes.set_xscale("log")
        # Not as powers of ten, whose exponents would be math; a narrow range has none between.
        ends = [proof[key] for proof in known for key in ("kl_before", "kl_after")]
        is_narrow = max(ends) < 20 * min(ends)
        axes.xaxis.set_major_locator(MaxNLocator(5) if is_narrow else LogLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.3g}")
        _name_rows(axes, [_short(proof["trick"]) for proof in known])
        axes.set_xlabel(
            say("KL divergence from float, nats: | before, dot after; grey: rolled back")
        )

    return _figure("proofs", draw, height=0.9 + 0.3 * len(known))


def operators_plot(profile: Mapping[str, Any], say: Language) -> Markup | None:
    """The operators that take longest, of both files."""
    rows = [
        (kind, found["name"], found["ms"])
        for kind in ("fp32", "int8")
        for found in (profile.get(kind) or [])[: _MOST // 2]
    ]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        times = [time for *_, time in rows]
        axes.barh(range(len(rows)), times, color=[_COLOURS[kind] for kind, *_ in rows], height=0.6)
        names = [f"{_NAMES[kind]}: {_short(name, 34)}" for kind, name, _ in rows]
        _name_rows(axes, names)
        axes.set_xlabel(say("ms a batch"))

    return _figure("operators", draw, height=0.9 + 0.22 * len(rows))


def layers_plot(layers: Sequence[Mapping[str, Any]], say: Language) -> Markup | None:
    """Signal to error of each quantized tensor alone, in the order of the network, in dB."""
    if all(row["sqnr_db"] is None for row in layers):
        return None

    def draw(axes: Axes) -> None:
        for kind, colour, marker in (("weight", FLOAT, "s"), ("activation", INT8, "o")):
            own = [(i, row["sqnr_db"]) for i, row in enumerate(layers) if row["kind"] == kind]
            known = [(place, value) for place, value in own if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker, color=colour, ms=4, ls="none",
                          label=say.word(f"{kind}s"))  # fmt: skip
        axes.set_xlabel(say("quantized tensor, in the order of the network"))
        axes.set_ylabel(say("signal to rounding error, dB"))
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return _figure("layers", draw, height=2.8)


def sweep_plot(points: Sequence[Mapping[str, Any]], floats: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy against the size of the file and against latency, with the front of each data set.

    Args:
        points: of ``job_networks``. A name shows under the reader's pointer.
        floats: of ``float_networks``.
    """

    def panel(axes: Axes, key: str, scale: float, label: str) -> None:
        # Accuracies on different data cannot be compared.
        found: dict[str | None, list[tuple[float, float]]] = {}
        for kind, rows in (("fp32", floats), ("int8", points)):
            for row in rows:
                if row[key] is None or row["accuracy"] is None:
                    continue
                x, y = row[key] * scale, row["accuracy"] * 100
                # Hollow, for points of a sweep may lie on each other.
                (drawn,) = axes.plot(
                    x, y, _MARKERS[kind], ms=8, mec=_COLOURS[kind], mfc="none", mew=1.5
                )
                drawn.set_gid(f"{_TITLE}{len(titles)}-")
                titles.append(f"{row['name']}: {y:.2f} %, {x:.3g} {label.rpartition(' ')[2]}")
                found.setdefault(row["data"], []).append((x, y))
        for data, own in found.items():
            (line,) = axes.step(*zip(*_front(own), strict=True), where="post", color=MUTED, lw=1)
            if len(found) > 1:
                line.set_gid(f"{_TITLE}{len(titles)}-")
                titles.append(f"front of {data}")
        if found:
            shown = [point for own in found.values() for point in own]
            axes.set_xlim(0, 1.15 * max(x for x, _ in shown))
            _accuracy_axis(axes, [y for _, y in shown], ENGLISH)
        axes.set_xlabel(label)

    def draw(left: Axes, right: Axes) -> None:
        panel(left, "size_bytes", 1e-6, "file, MB")
        panel(right, "latency_ms", 1.0, "latency of a batch, ms")
        right.set_ylabel("")

    titles: list[str] = []
    svg = _figure("sweep", draw, height=3.0, panels=2)
    for place, title in enumerate(titles):
        svg = svg.replace(
            Markup(f'<g id="{_TITLE}{place}-">'), Markup("<g><title>{}</title>").format(title)
        )
    return svg


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which none costs less and is as good, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of a figure, from the top; each is as high as any other."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _accuracy_axis(axes: Axes, percents: Sequence[float], say: Language) -> None:
    """An axis of accuracy that shows a tenth of a point, and no more than 100 %."""
    low, high = min(percents), max(percents)
    room = max(0.35 * (high - low), 0.5)
    axes.set_ylim(max(low - room, -1), min(high + room, 100.6))
    axes.set_ylabel(say("accuracy, %%"))


def _figure(name: str, draw: Callable[..., None], height: float, panels: int = 1) -> Markup:
    """Draws on the axes of a new figure and returns it as SVG.

    Args:
        name: of the figure, which makes its ids other than those of the page's other figures.
        draw: gets the axes.
        height: inches.
        panels: axes beside each other.
    """
    # With a salt the same report gives the same file.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)  # without pyplot, which would keep the figure
        found = figure.subplots(1, panels, squeeze=False)[0]
        for axes in found:
            axes.grid(alpha=0.6)
            axes.set_axisbelow(True)
        draw(*found)
        file = io.StringIO()
        with warnings.catch_warnings():
            # Of letters that only the reader's browser has, whose width is guessed.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(file.getvalue()))  # matplotlib escapes the text


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: it fits its column and has the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Numbered by matplotlib in each figure anew; a page has each id once.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    # The page's own font: the browser picks one that has the letters.
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", '<svg role="img" aria-hidden="true"', 1)


def _short(text: str, most: int = 22) -> str:
    """``text`` on one line, as wide as so many letters; a Chinese one is as wide as two."""
    text = " ".join(text.split())
    widths = [2 if east_asian_width(letter) in "WF" else 1 for letter in text]
    if sum(widths) <= most:
        return text
    room = most - 1
    for place, width in enumerate(widths):
        room -= width
        if room < 0:
            return f"{text[:place]}…"
    return text
