"""Compares the jobs of a sweep: one row for each, as CSV, as a table, and as a picture."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison_plot import plot_comparison
from qat_tricks.evidence.report import read_report
from qat_tricks.evidence.show import show
from qat_tricks.files import read_json, write_text

COLUMNS = (
    "job",
    "recipe",
    "model",
    "data",
    "accuracy_fp32",
    "accuracy_onnx",
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

Row = dict[str, Any]


def write_comparison(sweep_folder: Path) -> Path:
    """Writes ``comparison.csv`` and ``comparison.png`` into a sweep's folder.

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
    plot_comparison(rows, sweep_folder / "comparison.png")
    return path


def comparison_rows(sweep_folder: Path) -> list[Row]:
    """Returns one row for each job, by ``COLUMNS``, in the order of the jobs' folders.

    A figure that was not measured is None.

    A job is a folder, one or two levels down, with a ``report.json`` or, where it failed, an
    ``error.json``.

    Raises:
        QatTricksError: there is no job.
    """
    sweep_folder = Path(sweep_folder)
    jobs = {
        path.parent
        for name in ("report.json", "error.json")
        for pattern in (f"*/{name}", f"*/*/{name}")
        for path in sweep_folder.glob(pattern)
    }
    if not jobs:
        raise QatTricksError(
            f'no job in "{sweep_folder}": expected folders, one or two levels down, with '
            "report.json or error.json"
        )
    # The relative path tells jobs of several sub-sweeps apart.
    names = {job.relative_to(sweep_folder).as_posix(): job for job in jobs}
    return [_row(name, names[name]) for name in sorted(names, key=_natural)]


def comparison_table(rows: list[Row]) -> Table:
    """Returns the rows as a rich table."""
    table = Table(title="comparison")
    table.add_column("job", no_wrap=True)
    for column in ("recipe", "model", "data"):
        table.add_column(column)
    figures = {
        "accuracy": ("accuracy_onnx", "percent"),
        "drop": ("drop_points", "drop"),
        "agreement": ("agreement", "percent"),
        "size": ("size_bytes_int8", "bytes"),
        "latency p50": ("latency_p50_ms_int8", "ms"),
        "sparsity": ("sparsity", "percent"),
        "coverage": ("int8_coverage", "percent"),
        "memory": ("memory_mib_int8", "mib"),
    }
    for title in figures:
        table.add_column(title, justify="right")
    # A column of empty cells would take the width of the others.
    failed = any(row["error"] for row in rows)
    if failed:
        table.add_column("error", style="red")
    for row in rows:
        texts = [row[key] or "" for key in ("job", "recipe", "model", "data")]
        cells = [show(row[key], unit, none="-") for key, unit in figures.values()]
        table.add_row(*texts, *cells, *([row["error"] or ""] if failed else []))
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
