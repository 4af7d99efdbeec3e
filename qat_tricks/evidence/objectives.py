"""The objectives of a search: figures of a job's report, each of which is to be high or low.

The accuracy is that of the validation images. Test images say how good the job is that was chosen,
and would no longer do so had they chosen it.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat_tricks.errors import QatTricksError, did_you_mean

MAXIMIZE, MINIMIZE = "maximize", "minimize"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A figure of ``report.json``."""

    path: tuple[str, ...]  # of keys
    direction: str  # MAXIMIZE or MINIMIZE
    unit: str  # as ``show`` knows it
    meaning: str


OBJECTIVES = {
    "accuracy": Objective(
        path=("validation", "accuracy"),
        direction=MAXIMIZE,
        unit="percent",
        meaning="top-1 of model.onnx on the validation images",
    ),
    "latency": Objective(
        path=("latency_ms", "int8", "p50"),
        direction=MINIMIZE,
        unit="ms",
        meaning="median latency of model.onnx",
    ),
    "size": Objective(
        path=("size_bytes", "int8"), direction=MINIMIZE, unit="bytes", meaning="of model.onnx"
    ),
    "memory": Objective(
        path=("memory_mib", "int8"),
        direction=MINIMIZE,
        unit="mib",
        meaning="peak memory of a process that runs model.onnx",
    ),
}


def check_objectives(names: Any) -> None:
    """Checks the setting ``objectives``.

    Raises:
        QatTricksError: it is no list of names in ``OBJECTIVES``, or has one of them twice.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise QatTricksError(
            f"objectives={names!r} is not allowed: give a list of {', '.join(OBJECTIVES)}, such as "
            "[accuracy,latency]"
        )
    unknown = [
        f'unknown objective "{name}": {did_you_mean(name, OBJECTIVES)}'
        for name in names
        if name not in OBJECTIVES
    ]
    if unknown:
        raise QatTricksError("; ".join(unknown))
    if len({*names}) < len(names):
        raise QatTricksError(f"objectives={list(names)} has one of them twice: leave it out once")


def objective_values(report: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Returns the objectives of a job, in the order of ``names``.

    Args:
        report: of ``report.json``.
        names: keys of ``OBJECTIVES``.

    Raises:
        QatTricksError: the report lacks one of them.
    """
    return [_value(report, name) for name in names]


def _value(report: Mapping[str, Any], name: str) -> float:
    value: Any = report
    for key in OBJECTIVES[name].path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise QatTricksError(
            f"the report has no {'.'.join(OBJECTIVES[name].path)}, and so no objective {name}"
        )
    return float(value)


def undominated(costs: Sequence[Sequence[float] | None]) -> list[bool]:
    """Whether each is on the Pareto front: no other is as low in all figures and lower in one.

    Args:
        costs: of each, as many figures as the others; None is never on the front.
    """
    found = [None if own is None else tuple(own) for own in costs]
    return [
        own is not None
        and not any(
            other is not None and other != own and all(map(operator.le, other, own))
            for other in found
        )
        for own in found
    ]
