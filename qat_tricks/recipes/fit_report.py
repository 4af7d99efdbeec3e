"""The answer at the end of a fit: what the recipe has done to the network, in one table.

The user's own validation runs twice before the training, on the float network and on the quantized
one; the figures at the end are those of the fit's last validation. The first process prints the
table, also where there are no progress bars, and logs its figures to the trainer's loggers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import fx, nn

from qat_tricks.deploy.cost.forecast import Placement, grouped, named, placement
from qat_tricks.graph.layers import Layer, is_layer
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.proof import proof_lines
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import console
from qat_tricks.trainer.validation import Validated, Validation, epoch_metrics

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

PREFIX = "qat_tricks/"  # of the figures in a logger
MOMENTS = ("float", "after PTQ", "at the end")
_KEYS = ("before", "after_ptq", "end")  # of the moments, in a logger
RESUMED = "the run was resumed"
QUANTIZED = "the network was quantized already"


@dataclass
class _Moment:
    """The network at one moment."""

    validated: Validated
    zeros: float | None = None  # share of the weights of convs and linears, 0..1


class FitReport:
    """Measures a fit of a recipe, and tells the result at its end; the run's ``Session`` calls it.

    Args:
        name: of the recipe.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.begin(resumed=False)

    def begin(self, *, resumed: bool) -> None:
        """A fit begins; a resumed one has been measured when it began first."""
        self._resumed = resumed
        self._validation: Validation | None = None
        self._placed = Placement(quantized=0, layers=0, in_float=[])
        unknown = Validated(reason=RESUMED if resumed else QUANTIZED)
        self._before, self._prepared = _Moment(unknown), _Moment(unknown)
        self._end = Validated(reason="the fit has not validated")
        self._end_step = 0

    def measure_float(
        self, trainer: "Trainer", pl_module: "LightningModule", network: nn.Module
    ) -> None:
        """Validates the float network, before the recipe; every process has to call this."""
        self._resumed = False  # from a float checkpoint at most
        self._validation = Validation(trainer, pl_module)
        validated = self._validation.run("the float network")
        self._before = _Moment(validated, zeros(network))

    def measure_prepared(
        self, trainer: "Trainer", pl_module: "LightningModule", network: fx.GraphModule
    ) -> None:
        """Validates the network before the training; every process has to call this."""
        if not self._resumed:
            validation = self._validation or Validation(trainer, pl_module)
            validated = validation.run("the quantized network")
            self._prepared = _Moment(validated, zeros(network))
        self._validation = None  # with its loaders
        # Now and not at the end, for a fault of ours is not to come after a long training, which
        # changes values alone.
        self._placed = placement(network)

    def validated(self, trainer: "Trainer") -> None:
        """The fit has validated the network as it is now."""
        if not trainer.sanity_checking:
            self._end = Validated(epoch_metrics(trainer))
            self._end_step = trainer.global_step

    def finish(self, trainer: "Trainer", work: Workbench) -> None:
        """Prints the table and logs its figures, on the first process."""
        if not trainer.is_global_zero:
            return
        moments = [self._before, self._prepared, _Moment(self._end, zeros(work.network))]
        proofs = spec_of(work.network).get("proofs", [])
        table = self._table(moments, work.images, trainer.global_step, proof_lines(proofs))
        console().print(table)
        figures = _figures(moments, self._placed, work.images)
        for proof in proofs:
            if proof["kl_kept"] is not None:
                for key in ("kl_before", "kl_kept"):
                    figures[f"{PREFIX}proofs/{proof['trick']}/{key}"] = proof[key]
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def _table(
        self, moments: list[_Moment], images: int, steps: int, proofs: Sequence[str]
    ) -> Table:
        table = Table(title=self.name, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", overflow="fold")
        for title in MOMENTS:
            table.add_column(title, justify="right")
        for name in dict.fromkeys(name for m in moments for name in m.validated.metrics):
            values = [moment.validated.metrics.get(name) for moment in moments]
            table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
        shares = [moment.zeros for moment in moments]
        table.add_row("zeros", *("-" if share is None else f"{share:.1%}" for share in shares))
        placed = self._placed
        lines = [f"{placed.quantized} of {placed.layers} convs and linears in integers"]
        for group in grouped(placed.in_float):
            first = group[0]
            lines.append(
                f"in float: {len(group)} {first.operation} ({named(group)}): {first.reason}"
            )
        if not placed.in_float:
            lines.append("nothing stays in float")
        lines.append(f"{images} images used for calibration" if images else "no calibration")
        lines += proofs
        for title, moment in zip(MOMENTS, moments, strict=True):
            if moment.validated.reason is not None:
                lines.append(f"{title}: not measured, {moment.validated.reason}")
        if self._end.metrics and self._end_step < steps:
            lines.append(f"at the end: the last validation, of step {self._end_step} of {steps}")
        table.caption, table.caption_justify = "\n".join(lines), "left"
        return table


@torch.no_grad()
def zeros(network: nn.Module) -> float | None:
    """The share, 0..1, of exact zeros among the weights of convs and linears, as they compute.

    Returns:
        None of a network without such weights.
    """
    count = total = 0
    with evaluating(network):
        for module in network.modules():
            if not is_layer(module):
                continue
            weight: Any = module.effective_weight() if isinstance(module, Layer) else module.weight
            if not nn.parameter.is_lazy(weight):
                count += int((weight == 0).sum())
                total += weight.numel()
    return count / total if total else None


def _figures(moments: list[_Moment], placed: Placement, images: int) -> dict[str, float]:
    """The figures of the table by the names that they have in a logger; none that is unknown."""
    figures: dict[str, float | None] = {
        "layers_quantized": placed.quantized,
        "layers": placed.layers,
        "float_operations": len(placed.in_float),
        "calibration_images": images,
    }
    for key, moment in zip(_KEYS, moments, strict=True):
        figures[f"{key}/zeros"] = moment.zeros
        figures |= {f"{key}/{name}": value for name, value in moment.validated.metrics.items()}
    return {
        f"{PREFIX}{key}": float(value)
        for key, value in figures.items()
        if value is not None and math.isfinite(value)
    }
