"""A learning rate of the network's own: a share of the largest that its loss can be trained at."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from qat_tricks.graph.sharpness import sharpness
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.resume import resumes

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

NUM_IMAGES = 256
SHARE = 0.3
"""Of ``1 / sharpness``. Descent diverges beyond 2 (1.9 times that with momentum 0.9): a network
that is fine-tuned is to stay near what it has learned, and its loss grows steeper on the way."""
HIGHEST = 0.1
"""What a network is trained at from the beginning."""


class MeasuredRate:
    """Sets ``module.lr`` for one fit of SGD, from the sharpness of the network's loss.

    Args:
        own: the rate that the module came with, which an optimizer other than SGD keeps: it scales
            each step by gradients that it has seen, and curvature alone does not bound its rate.

    Attributes:
        rate: the measured one; None before.
    """

    def __init__(self, own: float) -> None:
        self.own = own
        self.rate: float | None = None

    def measure(self, trainer: "Trainer", pl_module: "LightningModule", work: Workbench) -> None:
        """Measures the rate before the fit makes its optimizers; a resumed fit has it already.

        Raises:
            QatTricksError: the network has no gradients, or none that are finite.
        """
        if resumes(trainer):
            return
        curvature = sharpness(work.network, work.training_batches(NUM_IMAGES))
        # Sums on GPUs differ in their last bits between ranks.
        self._set(pl_module, trainer.strategy.broadcast(min(HIGHEST, SHARE / curvature)))
        rank_zero_info(f"lr=auto: {self.rate:.2g}, for the loss has a sharpness of {curvature:.3g}")

    def restore(self, pl_module: "LightningModule", state: Mapping[str, Any]) -> None:
        """Takes over the rate of the run that goes on; its optimizers are not made yet."""
        if state.get("rate") is not None:
            self._set(pl_module, state["rate"])

    def check(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the optimizers again at the module's own rate unless all of them are SGD."""
        others = [o for o in trainer.optimizers if not isinstance(o, torch.optim.SGD)]
        if self.rate is None or not others:
            return
        rank_zero_warn(
            f"lr=auto measures a rate for SGD, and {type(pl_module).__name__} trains with "
            f"{type(others[0]).__name__}: its own lr={self.own:g} stays"
        )
        pl_module.lr = self.own  # type: ignore[assignment]
        trainer.strategy.setup_optimizers(trainer)

    def _set(self, pl_module: "LightningModule", rate: float) -> None:
        self.rate = rate
        pl_module.lr = rate  # type: ignore[assignment]
