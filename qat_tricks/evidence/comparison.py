"""Compares the jobs of a sweep: one row for each, as CSV, as a table, and as a picture."""

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence import page_plots as plots
from qat_tricks.evidence.compared_networks import float_networks, job_networks
from qat_tricks.evidence.comparison_plot import plot_comparison
from qat_tricks.evidence.language import ENGLISH
from qat_tricks.evidence.objectives import undominated
from qat_tricks.evidence.page import PAGE, printable
from qat_tricks.evidence.report import read_report
from qat_tricks.evidence.show import show
from qat_tricks.evidence.templates import fill_in
from qat_tricks.files import read_json, write_text

COLUMNS = (
    "job",
    "recipe",
    "model",
    "data",
    "settings",
    "accuracy_fp32",
    "accuracy_onnx",
    "accuracy_validation",
    "drop_points",
    "agreement",
    "size_bytes_fp32",
    "size_bytes_int8",
    "latency_p50_ms_fp32",
    "latency_p50_ms_int8",
    "sparsity",
    "int8_coverage",
    "memory_mib_fp32",
    "memory_mib_int8",
    "error",
)

_RESULTS = ("report.json", "error.json")
_OF_A_RUN = (".hydra", "config.yaml")  # in the folder of a run, and of no evaluation

Row = dict[str, Any]


def write_comparison(sweep_folder: Path) -> Path:
    """Writes ``comparison.csv``, ``comparison.html`` and ``comparison.png`` into a sweep's folder.

    Returns:
        The path of the CSV file.

    Raises:
        QatTricksError: the folder holds no job, or cannot be written.
    """
    sweep_folder = Path(sweep_folder)
    rows = comparison_rows(sweep_folder)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = sweep_folder / "comparison.csv"
    write_text(path, text.getvalue())
    names = labels(rows)
    jobs, floats = job_networks(rows, names), float_networks(rows)
    plot_comparison(jobs, floats, sweep_folder / "comparison.png")
    reports = {row["job"] for row in rows if (sweep_folder / row["job"] / PAGE).is_file()}
    write_text(sweep_folder / "comparison.html", render_comparison(rows, names, reports))
    return path


def render_comparison(rows: Sequence[Row], names: Sequence[str], reports: Collection[str]) -> str:
    """Returns the page of a sweep as HTML: a picture, and a table that sorts.

    Args:
        rows: of ``comparison_rows``.
        names: a label for each row.
        reports: the jobs that have a page of their own.
    """
    rows, names = printable(rows), printable(names)
    best = front(rows)
    jobs = [
        {"name": name, "best": job_is_best, "has_page": row["job"] in reports, **row}
        for row, name, job_is_best in zip(rows, names, best, strict=True)
    ]
    known = {
        "jobs": jobs,
        "figures": _FIGURES,
        "figure": plots.sweep_plot(job_networks(rows, names), float_networks(rows)),
        "validated": _validated(rows),
        "several_data": len({row["data"] for row in rows if row["data"]}) > 1,
    }
    return fill_in("comparison.html.j2", known, ENGLISH)


def front(rows: Sequence[Row]) -> list[bool]:
    """Whether each job is on the front of accuracy, size and latency of its data.

    No other job on the same data is as good in all three and better in one: accuracies on different
    data cannot be compared. A job without one of them is not.

    The accuracy is that of the validation images in a search, which measures it, so that the test
    images choose nothing there.
    """
    accuracy = "accuracy_validation" if _validated(rows) else "accuracy_onnx"
    keys = (accuracy, "size_bytes_int8", "latency_p50_ms_int8")
    figures: list[list[Any]] = [[row.get(key) for key in keys] for row in rows]
    costs = [None if None in own else (-own[0], *own[1:]) for own in figures]
    best = [False] * len(rows)
    for data in {row["data"] for row in rows}:
        places = [place for place, row in enumerate(rows) if row["data"] == data]
        for place, is_best in zip(places, undominated([costs[i] for i in places]), strict=True):
            best[place] = is_best
    return best


def _validated(rows: Sequence[Row]) -> bool:
    """Whether validation images were measured, as a search does."""
    return any(row.get("accuracy_validation") is not None for row in rows)


def comparison_rows(sweep_folder: Path) -> list[Row]:
    """Returns one row for each job, by ``COLUMNS``, in the order of the jobs' folders.

    A figure that was not measured is None.

    A job is a folder, one or two levels down, with a ``report.json`` or, where it failed, an
    ``error.json``. What else is in a job's folder is none: its evaluations, and the results of an
    earlier run.

    Raises:
        QatTricksError: there is no job.
    """
    sweep_folder = Path(sweep_folder)
    found = {
        path.parent
        for name in _RESULTS
        for pattern in (f"*/{name}", f"*/*/{name}")
        for path in sweep_folder.glob(pattern)
    }
    jobs = {folder for folder in found if _has(folder, _OF_A_RUN) or not _in_a_job(folder)}
    if not jobs:
        raise QatTricksError(
            f'no job in "{sweep_folder}": expected folders, one or two levels down, with '
            "report.json or error.json"
        )
    # The relative path tells jobs of several sub-sweeps apart.
    names = {job.relative_to(sweep_folder).as_posix(): job for job in jobs}
    ordered = sorted(names, key=_natural)
    rows = [_row(name, names[name]) for name in ordered]
    given = [_overrides(names[name]) for name in ordered]
    for row, settings, own in zip(rows, _swept(given), given, strict=True):
        row["settings"] = settings
        row["recipe"] = row["recipe"] or own.get("recipe")  # of a job that failed
    return rows


def _has(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _in_a_job(folder: Path) -> bool:
    # A run that was interrupted has no result, but may keep those of an earlier one.
    return _has(folder.parent, (*_RESULTS, *_OF_A_RUN))


def _swept(given: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings of each job that another job does not have, as text.

    The recipe, model and data have columns of their own.

    Args:
        given: the overrides of each job by their keys.
    """
    keys = dict.fromkeys(key for settings in given for key in settings)
    differing = [key for key in keys if len({settings.get(key) for settings in given}) > 1]
    differing = [key for key in differing if key not in ("recipe", "model", "data")]
    short = {key: key.rpartition(".")[2] for key in differing}
    # The last part of a key says enough where no other ends alike.
    names = [*short.values()]
    shown = {key: name if names.count(name) == 1 else key for key, name in short.items()}
    return [
        ", ".join(f"{shown[key]}={settings[key]}" for key in differing if key in settings)
        for settings in given
    ]


def _overrides(job: Path) -> dict[str, str]:
    """The overrides of a job by their keys, as Hydra keeps them; none where it has not."""
    path = job / ".hydra" / "overrides.yaml"
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):  # of a report that was put there otherwise
        return {}
    pairs = (str(line).lstrip("+").partition("=") for line in lines or ())
    return {key: value for key, _, value in pairs}


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each job that tells it from the others: its recipe, and whatever differs."""
    several = [key for key in ("model", "data") if len({r[key] for r in rows if r[key]}) > 1]
    keys = ["recipe", *several, "settings"]
    found = [" · ".join(str(row[key]) for key in keys if row.get(key)) for row in rows]
    return [
        name if name and found.count(name) == 1 else " · ".join(filter(None, (name, f"job {job}")))
        for name, job in zip(found, (row["job"] for row in rows), strict=True)
    ]


# The figures of the table, the most important first.
_FIGURES = {
    "accuracy": ("accuracy_onnx", "percent"),
    "drop": ("drop_points", "drop"),
    "size": ("size_bytes_int8", "bytes"),
    "latency": ("latency_p50_ms_int8", "ms"),
    "agreement": ("agreement", "percent"),
    "zeros": ("sparsity", "percent"),
    "coverage": ("int8_coverage", "percent"),
    "memory": ("memory_mib_int8", "mib"),
}
_LEAST_NAME = 25  # columns for the jobs' names, which may take several lines


def comparison_table(rows: Sequence[Row], width: int | None = None) -> Table:
    """Returns the rows as a rich table.

    Args:
        rows: of ``comparison_rows``.
        width: columns of the terminal. The figures for which there is no room are left out, and the
            table says which; None: there is room for all.
    """
    columns = {
        title: [title, *(show(row[key], unit, none="-") for row in rows)]
        for title, (key, unit) in _FIGURES.items()
    }
    names = labels(rows)
    name_width = max(_LEAST_NAME, max(map(len, names), default=0))
    room = None if width is None else width - min(name_width, _LEAST_NAME)
    shown: list[str] = []
    left_out: list[str] = []
    for title, cells in columns.items():
        needed = max(map(len, cells)) + 1
        if room is None or (not left_out and needed <= room):
            shown.append(title)
            room = None if room is None else room - needed
        else:
            left_out.append(title)
    # The box itself leaves one column between two.
    table = Table(title="comparison", box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("job", overflow="fold")
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for index, name in enumerate(names, 1):
        table.add_row(name, *(columns[title][index] for title in shown))
    below = [
        f"{name}: {row['error']}" for name, row in zip(names, rows, strict=True) if row["error"]
    ]
    if left_out:
        below.append(f"comparison.csv has {', '.join(left_out)} too")
    table.caption, table.caption_justify = "\n".join(below) or None, "left"
    return table


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts job 10 after job 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _row(name: str, job: Path) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    row["job"] = name
    try:
        if (job / "report.json").exists():
            row |= _figures(read_report(job / "report.json"))
        if (job / "error.json").exists():
            row["error"] = str(read_json(job / "error.json")["error"])
    except QatTricksError as error:
        row["error"] = str(error)
    # One damaged job must not spoil the comparison of the others.
    except (KeyError, TypeError):
        row["error"] = "failed, and its error.json names no error"
    return row


def _figures(report: dict[str, Any]) -> Row:
    stages = {stage["name"]: stage["accuracy"] for stage in report["stages"]}
    # A run that was interrupted has fewer stages.
    fp32, onnx = stages.get("fp32"), stages.get("onnx")
    size, memory, latency = (
        report[key] or {} for key in ("size_bytes", "memory_mib", "latency_ms")
    )
    return {
        "recipe": report["recipe"],
        "model": report["model"],
        "data": report["data"],
        "accuracy_fp32": fp32,
        "accuracy_onnx": onnx,
        "accuracy_validation": (report.get("validation") or {}).get("accuracy"),
        "drop_points": None if fp32 is None or onnx is None else (fp32 - onnx) * 100,
        "agreement": report["agreement"],
        "size_bytes_fp32": size.get("fp32"),
        "size_bytes_int8": size.get("int8"),
        "latency_p50_ms_fp32": (latency.get("fp32") or {}).get("p50"),
        "latency_p50_ms_int8": (latency.get("int8") or {}).get("p50"),
        "sparsity": report["sparsity"],
        "int8_coverage": report["int8_coverage"],
        "memory_mib_fp32": memory.get("fp32"),
        "memory_mib_int8": memory.get("int8"),
    }
