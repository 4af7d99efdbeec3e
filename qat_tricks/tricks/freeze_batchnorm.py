"""Freeze the BatchNorm statistics, of an unfolded network or restored, for the last part of QAT.

Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference" (arXiv
1806.08342), section 4.2.2: once the statistics hold still, training sees the normalization that
will be folded for inference. ``restore_batchnorm`` leaves statistics that were frozen as they are.
"""

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.schedule import check_fraction, fit_progress
from qat_tricks.trainer.trick import Trick

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def freeze_batchnorm(traced: fx.GraphModule) -> int:
    """Puts every BatchNorm of ``traced`` into evaluation mode; ``traced.train()`` thaws them again.

    Returns:
        The number of BatchNorms.

    Raises:
        QatTricksError: no BatchNorm is left unfolded.
    """
    norms = _batchnorms(traced)
    for norm in norms:
        norm.eval()
    return len(norms)


def _batchnorms(traced: fx.GraphModule) -> list[nn.Module]:
    """The BatchNorms of ``traced``; raises QatTricksError if there is none."""
    norms: list[nn.Module] = [
        module for module in traced.modules() if isinstance(module, BATCHNORMS)
    ]
    if not norms:
        raise QatTricksError(
            "no BatchNorm is left to freeze: leave out fold_batchnorm, or leave out this trick"
        )
    return norms


class FreezeBatchnorm(Trick):
    """Callback of ``freeze_batchnorm``: freezes from the fraction ``start`` of the fit on."""

    after = ("fold_batchnorm",)

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.start = check_fraction("start", start)

    def apply(self, work: Workbench) -> None:
        """Checks that there is a BatchNorm to freeze."""
        # The modes stay: the user may hold some of them in evaluation mode.
        _batchnorms(work.network)

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Freezes once the fit has come to ``start``."""
        # At each batch: Lightning puts the module into training mode at each epoch.
        if fit_progress(trainer) >= self.start:
            freeze_batchnorm(workbench_of(pl_module).network)
