"""Estimate the BatchNorm statistics of an unfolded network anew, with its quantizers on.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086),
section 5.1: oscillating weights leave running statistics that fit none of the networks they
averaged over.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, batch_size, call_network, check_batches
from qat_tricks.graph.layers import BATCHNORMS, Layer
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.trace import module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.trick import Trick, check_num_images

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


@torch.no_grad()
def reestimate_batchnorm(traced: fx.GraphModule, batches: Sequence[Inputs]) -> fx.GraphModule:
    """Replaces running means and variances, in place, by their plain average over ``batches``.

    A BatchNorm that is held in evaluation mode while the network trains, or that tracks no running
    statistics, keeps its own.

    Args:
        traced: a network with BatchNorms, with or without quantizers.
        batches: the network's inputs; those that are smaller than the first are left out.

    Raises:
        QatTricksError: no batches, or no BatchNorm is left unfolded.
    """
    # Of BatchNorms that the graph does not call, no batch would give statistics.
    called = {module_of(node, traced) for node in traced.graph.nodes}
    # Those that layers have of their own are called by the layers.
    called |= {module.batchnorm for module in called if isinstance(module, Layer)}
    norms = [m for m in called if isinstance(m, BATCHNORMS) and m.running_mean is not None]
    if not norms:
        raise QatTricksError(
            "no BatchNorm is left to re-estimate: leave out fold_batchnorm, or leave out this trick"
        )
    check_batches(batches, "to re-estimate BatchNorm on")
    # All batches count alike, so a rest of a few images would spoil the average.
    size = batch_size(batches[0])
    batches = [batch for batch in batches if batch_size(batch) >= size]
    norms = [
        norm
        for norm in norms
        if norm.track_running_stats and (norm.training or not traced.training)
    ]
    momenta = [norm.momentum for norm in norms]
    try:
        # Only the BatchNorms run as in training; dropout does not.
        with evaluating(traced):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in track(batches, "re-estimate BatchNorm"):
                call_network(traced, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return traced


class ReestimateBatchnorm(Trick):
    """Callback of ``reestimate_batchnorm``.

    It acts at once where nothing is trained, else at the end of the last epoch, before its
    checkpoint is written.
    """

    after = ("quantize", "calibrate", "correct_weights", "correct_bias")

    def __init__(self, num_images: int = 512) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Re-estimates at once where nothing is trained."""
        # Before training there is nothing to re-estimate: the weights are about to change.
        if not work.trains:
            reestimate_batchnorm(work.network, work.batches(self.num_images))

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule", *_: Any) -> None:
        """Re-estimates at the end of the last epoch."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            work = workbench_of(pl_module)
            reestimate_batchnorm(work.network, work.batches(self.num_images))
