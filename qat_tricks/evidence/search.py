"""The result of a search over jobs: the objectives of each, and which are on the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import Row, labels
from qat_tricks.evidence.objectives import MAXIMIZE, OBJECTIVES, objective_values, undominated
from qat_tricks.evidence.report import read_report
from qat_tricks.evidence.show import show
from qat_tricks.files import write_json

RESULT = "search.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A job of a search."""

    job: str  # its folder, within that of the search
    name: str  # tells it from the others
    values: dict[str, float] | None  # by the names of the objectives; None: the job has failed
    on_front: bool


def trials(folder: Path, rows: Sequence[Row], objectives: Sequence[str]) -> list[Trial]:
    """Returns the jobs of a search, in the order of ``rows``.

    Args:
        folder: the search's.
        rows: of ``comparison_rows(folder)``.
        objectives: keys of ``OBJECTIVES``.
    """
    values = [_values(folder / row["job"], row, objectives) for row in rows]
    signs = [-1 if OBJECTIVES[name].direction == MAXIMIZE else 1 for name in objectives]
    costs = [
        own and [sign * value for sign, value in zip(signs, own, strict=True)] for own in values
    ]
    found = zip(rows, labels(rows), values, undominated(costs), strict=True)
    return [
        Trial(
            job=row["job"],
            name=name,
            values=None if own is None else dict(zip(objectives, own, strict=True)),
            on_front=on_front,
        )
        for row, name, own, on_front in found
    ]


def _values(job: Path, row: Row, objectives: Sequence[str]) -> list[float] | None:
    if row["error"]:
        return None
    try:
        return objective_values(read_report(job), objectives)
    except QatTricksError:  # a report that was damaged since
        return None


def write_search(folder: Path, found: Sequence[Trial], objectives: Sequence[str]) -> Path:
    """Writes ``search.json``: the objectives, and each job's.

    Returns:
        Its path.

    Raises:
        QatTricksError: the folder cannot be written.
    """
    path = folder / RESULT
    jobs = [vars(trial) for trial in found]
    directions = {name: OBJECTIVES[name].direction for name in objectives}
    write_json(path, {"objectives": directions, "jobs": jobs})
    return path


def search_text(found: Sequence[Trial], objectives: Sequence[str]) -> str:
    """Returns the Pareto front as text: a line that names the objectives, and one for each job."""
    front = [trial for trial in found if trial.on_front]
    failed = sum(trial.values is None for trial in found)
    meanings = ", ".join(
        f"{name} ({OBJECTIVES[name].direction}: {OBJECTIVES[name].meaning})" for name in objectives
    )
    title = f"Pareto front, {len(front)} of {len(found)} jobs"
    lines = [f"{title}{f' ({failed} failed)' if failed else ''}, by {meanings}"]
    for trial in front:
        figures = [show(value, OBJECTIVES[key].unit) for key, value in (trial.values or {}).items()]
        lines.append(f"  {trial.job}: {', '.join(figures)}: {trial.name}")
    return "\n".join(lines)
