"""The tables of a report as rows of plain cells, for a logger that shows tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from qat_tricks.evidence.checklist import checklist

Rows = list[dict[str, Any]]


def report_tables(report: Mapping[str, Any]) -> dict[str, Rows]:
    """Returns the tables that the page has, by their names; none without rows.

    ``ledger`` has a row a stage, ``layers`` a weight or activation, ``classes`` a class, worst
    first, ``confusions`` a mistake that became more or less frequent, ``disagreements`` an image on
    which both networks disagree, and ``checklist`` a check. docs/logging.md lists them.

    Args:
        report: as in ``report.json``.
    """
    comparison = report.get("comparison") or {}
    tables = {
        "ledger": map(without_before, report["stages"]),
        "layers": (report.get("layers") or {}).get("tensors") or (),
        **{key: comparison.get(key) or () for key in ("classes", "confusions", "disagreements")},
        "checklist": checklist(report),
    }
    return {name: rows for name, found in tables.items() if (rows := _rows(found))}


def without_before(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage without the metrics before it, which are those of the stage before."""
    return {key: value for key, value in stage.items() if key != "before"}


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, the keys joined by ``/``."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= (
            flatten(value, f"{prefix}{key}/")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def _rows(found: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows that all have the same columns; a table asks one type of each, and lists differ."""
    rows = [
        {key: value for key, value in flatten(row).items() if not isinstance(value, (list, tuple))}
        for row in found
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))  # in order, each once
    return [{column: row.get(column) for column in columns} for row in rows]
