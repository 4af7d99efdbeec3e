"""The report of a run: ``report.json`` for programs, ``report.md`` and a page for people."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat_tricks.deploy.targets import TARGETS, Target
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.checklist import checklist
from qat_tricks.evidence.language import language_named
from qat_tricks.evidence.ledger import proofs_of, rates_of, steps_of
from qat_tricks.evidence.page import title, write_page
from qat_tricks.evidence.show import ratio
from qat_tricks.evidence.templates import fill_in
from qat_tricks.files import finite, read_json, write_json, write_text
from qat_tricks.graph.equivalence import summary

REQUIRED_KEYS = (
    "recipe",
    "model",
    "data",
    "stages",
    "agreement",
    "parity",
    "size_bytes",
    "sparsity",
    "int8_coverage",
    "latency_ms",
    "batch_size",
    "threads",
    "memory_mib",
    "preprocessing",
)
"""Keys that every report has; None is the value of a figure that was not measured."""

SCHEMA = 2
"""Version of the keys of ``report.json``, which ``docs/report.md`` lists."""

_STAGE_KEYS = ("name", "accuracy", "top5", "f1", "ece", "nll", "seconds")
_PACKAGES = ("qat_tricks", "torch", "onnx", "onnxruntime", "numpy")


def write_report(
    folder: Path, report: dict[str, Any], pictures: Mapping[int, str] | None = None
) -> None:
    """Writes ``report.json``, ``report.md`` and ``report.html`` into a folder.

    Each of them is written whole or not at all.

    Args:
        folder: the run's folder, made when it is missing.
        report: plain data with at least ``REQUIRED_KEYS``. ``packed_bytes`` is the size that the
            int8 file would have at its weights' own bits. ``compressed_bytes``, ``load_ms``,
            ``conversions``, ``profile``, ``throughput``, ``runtimes``, ``normalization``,
            ``target``, ``sensitivity``, ``channels``, ``mixed_precision``, ``comparison``,
            ``command`` and ``preprocessing_change`` fill their sections. ``environment`` defaults
            to ``environment()``, and ``language``, which is that of the other two, to ``en``.
        pictures: of test images, for the page; see ``write_page``.

    Raises:
        QatTricksError: a key is missing, or the folder cannot be written.
    """
    _check(report, "report")
    # The report's own environment wins: it may be of another machine.
    report = finite({"schema": SCHEMA, "language": "en", "environment": environment(), **report})
    report["checklist"] = checklist(report)
    folder = Path(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render(report))
    write_page(folder, report, pictures or {})


def read_report(path: Path) -> dict[str, Any]:
    """Reads a ``report.json``, or the one in a run's folder.

    Raises:
        QatTricksError: it is missing, no JSON, or lacks keys.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    report = read_json(path)
    _check(report, f'"{path}"')
    return report


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown, in the language that ``report["language"]`` names."""
    say = language_named(report.get("language", "en"))
    preprocessing, target = report["preprocessing"], report.get("target")
    # a report may come from a file that somebody else wrote: other types are shown as missing
    known = TARGETS.get(target) if isinstance(target, str) else None
    # a report without a target was measured in ONNX Runtime
    brings = say.word((known or Target(about="")).sparsity)
    preprocessing_hash = preprocessing.get("hash") if isinstance(preprocessing, dict) else None
    steps = steps_of(report["stages"])
    # the template is strict: keys that a report may lack get a value here
    fields = {
        "size_bytes": report["size_bytes"] or {},
        "latency_ms": report["latency_ms"] or {},
        "memory_mib": report["memory_mib"] or {},
        "parity": report["parity"] or {},
        "load_ms": report.get("load_ms") or {},
        "conversions": report.get("conversions") or {},
        "profile": report.get("profile"),
        "throughput": report.get("throughput") or [],
        "runtimes": report.get("runtimes") or {},
        "preprocessing_change": report.get("preprocessing_change"),
        "sensitivity": report.get("sensitivity"),
        "channels": report.get("channels"),
        "guideline": report.get("guideline"),
        "mixed_precision": report.get("mixed_precision"),
        "normalization": report.get("normalization"),
        "target": target,
        "target_needs": say.word(known.about) if known else None,
        "sparsity_brings": brings[0].upper() + brings[1:],
        "packed_bytes": report.get("packed_bytes"),
        "compressed_bytes": report.get("compressed_bytes") or {},
        "preprocessing_hash": preprocessing_hash,
        "steps": steps,
        "proofs": proofs_of(report["stages"]),
        "rates": rates_of(report["stages"]),
        "steps_summary": summary(steps, say.word) if steps else None,
        "title": title(report, say),
    }
    fields |= {"ratio": ratio, "report": report}
    return fill_in("report.md.j2", report | fields, say, cell=_cell, pretty=_pretty)


def environment() -> dict[str, Any]:
    """Returns the machine's facts: versions of Python and packages, system, processor, cores."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": os.cpu_count(),
    }


def _check(report: Any, where: str) -> None:
    if not isinstance(report, dict):
        raise QatTricksError(
            f"{where} holds a {type(report).__name__}, expected a report: an object with keys"
        )
    missing = [key for key in REQUIRED_KEYS if key not in report]
    stages = report.get("stages")
    # Stages are looked into only if they are there.
    if not missing and (not isinstance(stages, list) or not stages):
        missing = ["stages[0]"]
    if not missing:
        missing = [
            f"stages[{i}].{key}"
            for i, stage in enumerate(stages or ())
            for key in _STAGE_KEYS
            if key not in stage
        ]
    if missing:
        raise QatTricksError(
            f"{where} lacks {', '.join(missing)}: a report has all its keys, with null for what "
            "was not measured"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # Linux has a line for each core; all are alike.
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _cell(text: object) -> str:
    # A line break or a bar would end the cell of a Markdown table.
    return " ".join(str(text).split()).replace("|", "\\|")


def _pretty(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)
