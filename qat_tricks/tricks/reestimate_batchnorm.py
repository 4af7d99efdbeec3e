"""Estimate the BatchNorm statistics of an unfolded network anew, with its quantizers on.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086),
section 5.1: oscillating weights leave running statistics that fit none of the networks they
averaged over.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, batch_size, call_network, check_batches, split
from qat_tricks.graph.layers import BATCHNORMS, Layer
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.processes import from_rank_zero
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.schedule import is_last_batch
from qat_tricks.trainer.trick import Trick, check_num_images

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

ERRORS = 2  # standard errors by which an average has to differ from what is kept
FEWEST_BATCHES = 4  # that tell what chance is


@torch.no_grad()
def reestimate_batchnorm(
    traced: fx.GraphModule, batches: Sequence[Inputs], *, keep_certain: bool = False
) -> fx.GraphModule:
    """Replaces running means and variances, in place, by their plain average over ``batches``.

    A BatchNorm that is held in evaluation mode while the network trains, or that tracks no running
    statistics, keeps its own.

    Args:
        traced: a network with BatchNorms, with or without quantizers.
        batches: the network's inputs; those that are smaller than the first are left out.
        keep_certain: moves the statistics only as far as the average differs from them by more
            than chance. Training saw many more images, so where its running statistics do not
            lag, they are the better estimate. Of several processes, those of the first count; all
            have to call this.

    Raises:
        QatTricksError: no batches, one image alone, or no BatchNorm is left unfolded.
    """
    norms = _batchnorms(traced)
    batches = [batch for batch in batches if batch_size(batch) > 0]
    check_batches(batches, "to re-estimate BatchNorm on")
    if sum(map(batch_size, batches)) < 2:
        raise QatTricksError(
            "one image is too few to re-estimate BatchNorm on: give 2 at least (num_images=2)"
        )
    # All batches count alike, so a rest of a few images would spoil the average.
    size = batch_size(batches[0])
    batches = [batch for batch in batches if batch_size(batch) >= size]
    before = [_statistics(norm) for norm in norms]
    if keep_certain:
        before = from_rank_zero(before)
        if len(batches) < FEWEST_BATCHES:
            parts = min(math.ceil(FEWEST_BATCHES / len(batches)), max(1, size // 2))
            batches = [part for batch in batches for part in split(batch, size // parts)]
    by_batch = _statistics_by_batch(traced, norms, batches)
    for norm, old, new in zip(norms, before, by_batch, strict=True):
        mean, variance = _beyond_chance(old, new, norm.eps) if keep_certain else new.mean(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.fill_(len(new))
    return traced


def _batchnorms(traced: fx.GraphModule) -> list[Any]:
    """The BatchNorms to estimate; raises QatTricksError if none is left unfolded."""
    # Of BatchNorms that the graph does not call, no batch would give statistics.
    called = [module_of(node, traced) for node in traced.graph.nodes]
    # Those that layers have of their own are called by the layers.
    called += [module.batchnorm for module in called if isinstance(module, Layer)]
    norms = [
        module
        for module in dict.fromkeys(called)  # in the same order in every process
        if isinstance(module, BATCHNORMS) and module.running_mean is not None
    ]
    if not norms:
        raise QatTricksError(
            "no BatchNorm is left to re-estimate: leave out fold_batchnorm, or leave out this trick"
        )
    return [
        norm
        for norm in norms
        if norm.track_running_stats and (norm.training or not traced.training)
    ]


def _statistics_by_batch(
    traced: fx.GraphModule, norms: Sequence[Any], batches: Sequence[Inputs]
) -> list[Tensor]:
    """The statistics of each batch, float64 ``[batches, 2, C]`` for each BatchNorm."""
    found: list[list[Tensor]] = [[] for _ in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        # Only the BatchNorms run as in training; dropout does not.
        with evaluating(traced):
            for norm in norms:
                norm.momentum = None  # the average over all calls since the reset
                norm.train()
            for batch in track(batches, "re-estimate BatchNorm"):
                for norm in norms:
                    norm.reset_running_stats()
                _call(traced, batch)
                for norm, statistics in zip(norms, found, strict=True):
                    statistics.append(_statistics(norm))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return [torch.stack(statistics) for statistics in found]


def _call(traced: fx.GraphModule, batch: Inputs) -> None:
    try:
        call_network(traced, batch)
    except ValueError as error:  # PyTorch's, of a channel with one value
        if "more than 1 value per channel" not in str(error):
            raise
        raise QatTricksError(
            f"BatchNorm has one value a channel in a batch of {batch_size(batch)} image(s), and "
            "needs more to re-estimate its statistics: give larger batches"
        ) from error


def _statistics(norm: Any) -> Tensor:
    """The running mean and variance of a BatchNorm, float64 ``[2, C]``, on the CPU."""
    return torch.stack([norm.running_mean, norm.running_var]).cpu().double()


def _beyond_chance(old: Tensor, by_batch: Tensor, eps: float) -> Tensor:
    """``old``, moved towards the mean of ``by_batch`` as far as that is more than chance.

    The mean of few batches has a standard error ``se``. Taken is ``old + (new - old) * (1 -
    (ERRORS * se / distance)^2)`` in each channel whose distance is larger than that, as James and
    Stein (1961) shrink. Few batches may be alike by chance, so no channel counts as more certain
    than half of the others are.

    Args:
        old: means and variances, float64 ``[2, C]``.
        by_batch: those of each batch, float64 ``[batches, 2, C]``.
        eps: what the BatchNorm adds to a variance.
    """
    new = by_batch.mean(0)
    if len(by_batch) < 2:  # two or three images: nothing tells what chance is
        return old
    # A batch that overflowed, as under mixed precision, has spoiled a channel for good.
    old = torch.where(old.isfinite(), old, new)
    # In the units by which the BatchNorm divides, so that channels can be compared.
    unit = torch.stack([(new[1] + eps).sqrt(), new[1] + eps])
    chance = by_batch.var(0) / len(by_batch) / unit.square()
    chance = torch.maximum(chance, chance.median(1, keepdim=True).values)
    distance = ((new - old) / unit).square()
    share = (
        1 - ERRORS**2 * chance / distance.clamp_min(torch.finfo(torch.float64).tiny)
    ).clamp_min(0)
    return old + share * (new - old)


def last_batches(work: Workbench, num_images: int) -> list[Inputs]:
    """The images for statistics after the last step; none, with a warning, if there are no more."""
    try:
        return work.training_batches(num_images)
    except QatTricksError as error:
        # A loader that can be gone through only once: what was trained must not be lost.
        rank_zero_warn(f"BatchNorm keeps its running statistics as they are: {error}")
        return []


class ReestimateBatchnorm(Trick):
    """Callback of ``reestimate_batchnorm``.

    It acts at once where nothing is trained, else after the last step, before the last validation
    and checkpoint; after a fit that is stopped early, when it has ended.
    """

    after = ("quantize", "calibrate", "correct_weights", "correct_bias")

    def __init__(self, num_images: int = 512) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)
        self._is_due = False

    def apply(self, work: Workbench) -> None:
        """Re-estimates at once where nothing is trained."""
        # Before training there is nothing to re-estimate: the weights are about to change.
        if not work.trains:
            reestimate_batchnorm(work.network, work.training_batches(self.num_images))

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """A fit begins, after which the statistics are to be estimated."""
        self._is_due = True

    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *_: Any) -> None:
        """Re-estimates after the last step."""
        if self._is_due and is_last_batch(trainer):
            self._reestimate(pl_module)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Re-estimates after a fit that was stopped before what could be foreseen."""
        if self._is_due:
            self._reestimate(pl_module)

    def _reestimate(self, pl_module: "LightningModule") -> None:
        self._is_due = False
        work = workbench_of(pl_module)
        batches = last_batches(work, self.num_images)
        if batches:
            reestimate_batchnorm(work.network, batches)
