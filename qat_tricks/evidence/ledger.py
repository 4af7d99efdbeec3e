"""The ledger: the network's figures before and after each stage of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import Metrics
from qat_tricks.evidence.show import show
from qat_tricks.files import write_json
from qat_tricks.graph.equivalence import summary
from qat_tricks.graph.proof import proof_lines

# They fit a terminal of 80 columns with a stage's name of up to 12 letters; report.md has every
# metric.
_COLUMNS = ("top-1", "drop", "F1", "size", "latency", "zeros", "time")


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One stage. A figure that was not measured is None."""

    name: str
    before: Metrics | None  # None for the first stage
    after: Metrics
    seconds: float  # of the stage, evaluation included
    size_bytes: int | None = None  # of the ONNX file
    latency_ms: dict[str, Any] | None = None  # as of ``measure_latency``
    sparsity: float | None = None  # 0..1
    # What each step of the stage has left of the float function, as a network's spec has it.
    equivalence: Sequence[dict[str, Any]] = ()
    # What each trick of the stage did to the network's output, likewise.
    proofs: Sequence[dict[str, Any]] = ()
    # The learning rate, with the sharpness of the loss, where it was measured.
    rates: Sequence[dict[str, Any]] = ()


@dataclass
class Ledger:
    """All stages in order; the first, in float, is the reference for later accuracies."""

    stages: list[LedgerRow] = field(default_factory=list)

    def add(self, row: LedgerRow) -> None:
        """Appends a stage."""
        self.stages.append(row)

    def drop(self, row: LedgerRow) -> float:
        """Returns the points of accuracy, 0..100, that a stage lost against the first.

        A gain is negative.
        """
        return (self.stages[0].after.accuracy - row.after.accuracy) * 100

    def rows(self) -> list[dict[str, Any]]:
        """Returns the ledger as plain data: for each stage metrics, metrics before it, costs."""
        return [
            {
                "name": row.name,
                **row.after.as_dict(),
                "seconds": row.seconds,
                "drop_points": self.drop(row),
                "before": row.before.as_dict() if row.before else None,
                "size_bytes": row.size_bytes,
                "latency_ms": row.latency_ms,
                "sparsity": row.sparsity,
                "equivalence": list(row.equivalence),
                "proofs": {proof["trick"]: dict(proof) for proof in row.proofs},
                "rates": list(row.rates),
            }
            for row in self.stages
        ]

    def line(self, row: LedgerRow) -> str:
        """Returns one stage as a line of text, without what was not measured."""
        figures = [f"top-1 {show(row.after.accuracy, 'percent')}"]
        if row is not self.stages[0]:
            figures.append(show(self.drop(row), "change"))
        if row.size_bytes is not None:
            figures.append(show(row.size_bytes, "bytes"))
        if row.latency_ms:
            figures.append(show(row.latency_ms["p50"], "ms"))
        if row.sparsity is not None:
            figures.append(f"zeros {show(row.sparsity, 'percent')}")
        figures += [f"measured lr {show(rate['lr'], 'error')}" for rate in row.rates]
        return f"{row.name}: {', '.join(figures)}, after {show(row.seconds, 'seconds')}"

    def as_table(self) -> Table:
        """Returns the ledger as a rich table, one row a stage; the latency is the median."""
        table = Table(
            title="ledger", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        table.add_column("stage", no_wrap=True)
        for column in _COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.stages:
            metrics = row.after
            p50 = row.latency_ms["p50"] if row.latency_ms else None
            cells = [
                show(metrics.accuracy, "percent"),
                show(self.drop(row), "drop") if row is not self.stages[0] else "",
                show(metrics.f1, "percent"),
                *(
                    show(value, unit, none="-")
                    for value, unit in [(row.size_bytes, "bytes"), (p50, "ms")]
                ),
                show(row.sparsity, "percent", none="-"),
                show(row.seconds, "seconds"),
            ]
            table.add_row(row.name, *cells)
        steps = [step for row in self.stages for step in row.equivalence]
        lines = [summary(steps)] if steps else []
        lines += proof_lines([proof for row in self.stages for proof in row.proofs])
        if lines:
            table.caption = "\n".join(lines)
            table.caption_justify = "left"
        return table

    def write(self, path: Path) -> None:
        """Writes ``rows()`` as JSON, atomically.

        Raises:
            QatTricksError: the folder cannot be written.
        """
        write_json(Path(path), self.rows())


def steps_of(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each step of all stages has left of the float function; of ``Ledger.rows``."""
    return [step for stage in stages for step in stage.get("equivalence") or ()]


def proofs_of(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each trick of all stages did to the output; of ``Ledger.rows``."""
    return [proof for stage in stages for proof in (stage.get("proofs") or {}).values()]


def rates_of(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The learning rates that were measured, with their stages; of ``Ledger.rows``."""
    return [{"stage": s["name"], **rate} for s in stages for rate in s.get("rates") or ()]


def check_drop(
    name: str,
    before: float,
    after: float,
    max_drop: float | None,
    *,
    ledger_path: Path | None = None,
) -> None:
    """Stops a recipe whose stage lost more accuracy than it may.

    Args:
        name: of the stage.
        before: accuracy before it, 0..1.
        after: accuracy after it, 0..1.
        max_drop: the points of accuracy, 0..100, that it may lose; None allows any loss.
        ledger_path: where the ledger was written, for the message.

    Raises:
        QatTricksError: the stage lost more, or its accuracy is NaN.
    """
    drop = (before - after) * 100
    # a drop of exactly the limit may lie a rounding error above it
    if max_drop is None or drop <= max_drop + 1e-9:
        return
    written = f'; the ledger is in "{ledger_path}"' if ledger_path else ""
    raise QatTricksError(
        f'stage "{name}" lost {drop:.2f} points of accuracy ({before:.2%} before, {after:.2%} '
        f"after), allowed: {max_drop:g}{written}; mend it with more epochs, more bits or less "
        "sparsity, or raise the stage's max_drop"
    )
