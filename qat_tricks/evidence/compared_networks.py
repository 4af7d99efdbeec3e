"""The networks of a sweep, as its page and its picture show them: the jobs' own, and float ones.

Several jobs may begin from the same float network, and jobs whose model has the same name may begin
from different ones: of another factory, seed or number of epochs.
"""

from collections.abc import Sequence
from math import isclose
from typing import Any

Network = dict[str, Any]
"""``name``, ``data``, and ``accuracy``, ``size_bytes``, ``latency_ms``, None if not measured."""

# The recipe's name is in the file, so that the same network has some bytes more or less.
_SIZE_TOLERANCE = 0.01


def job_networks(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Network]:
    """Returns the network of each job.

    Args:
        rows: of ``comparison_rows``.
        names: a label for each row.
    """
    return [_network(row, name, "onnx", "int8") for row, name in zip(rows, names, strict=True)]


def float_networks(rows: Sequence[dict[str, Any]]) -> list[Network]:
    """Returns each float network that jobs began from once.

    Args:
        rows: of ``comparison_rows``.
    """
    groups = _by_float_network(rows)
    several = [key for key in ("model", "data") if len({r[key] for r in rows if r[key]}) > 1]
    names = [" · ".join(["float", *(str(group[0][key]) for key in several)]) for group in groups]
    return [
        _network(
            group[0], name if names.count(name) == 1 else _of_jobs(name, group), "fp32", "fp32"
        )
        for group, name in zip(groups, names, strict=True)
    ]


def _by_float_network(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows with a float network, those of the same one together, the most complete first."""
    groups: list[list[dict[str, Any]]] = []
    measured = [row for row in rows if row["accuracy_fp32"] is not None]
    for row in sorted(measured, key=_lacking):
        same = next((group for group in groups if _same_float(group[0], row)), None)
        if same is None:
            groups.append([row])
        else:
            same.append(row)
    return groups


def _lacking(row: dict[str, Any]) -> int:
    return [row["size_bytes_fp32"], row["latency_p50_ms_fp32"]].count(None)


def _same_float(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows have the same float network, as far as their figures tell.

    The latency tells nothing: it is another each time it is measured.
    """
    if any(one[key] != other[key] for key in ("model", "data")):
        return False
    if not isclose(one["accuracy_fp32"], other["accuracy_fp32"], abs_tol=1e-6):
        return False
    sizes = (one["size_bytes_fp32"], other["size_bytes_fp32"])
    return None in sizes or isclose(*sizes, rel_tol=_SIZE_TOLERANCE)


def _of_jobs(name: str, group: Sequence[dict[str, Any]]) -> str:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{name} · job {group[0]['job']}{more}"


def _network(row: dict[str, Any], name: str, stage: str, file: str) -> Network:
    return {
        "name": name,
        "data": row["data"],
        "accuracy": row[f"accuracy_{stage}"],
        "size_bytes": row[f"size_bytes_{file}"],
        "latency_ms": row[f"latency_p50_ms_{file}"],
    }
