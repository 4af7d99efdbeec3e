"""Fold each BatchNorm into the conv or linear before it.

``w' = w * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta`` (Jacob et
al. 2018, arXiv 1712.05877, section 3.2). Where this differs: nothing is folded during training; it
is done once, on the running statistics, so that a training step is the folded network's (about 0.7
of the unfolded one's on MobileNetV2). A BatchNorm before its conv, or whose conv has another
reader, becomes a depthwise conv of one weight a channel.
"""

from collections.abc import Sequence

from torch import fx

from qat_tricks.graph.finite import check_finite
from qat_tricks.graph.fold import batchnorms_to_convs, fold_batchnorm, needs_ranks
from qat_tricks.graph.nodes import calls_batchnorm
from qat_tricks.graph.ranks import note_ranks
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.trick import Trick

__all__ = ["FoldBatchnorm", "batchnorms_to_convs", "fold_batchnorm"]


class FoldBatchnorm(Trick):
    """Callback of ``fold_batchnorm``."""

    after = ("prune_channels",)

    def restructure(self, work: Workbench) -> None:
        """Folds: the structure does not depend on values."""
        self._fold(work)

    def apply(self, work: Workbench) -> None:
        """Folds each BatchNorm, or makes a depthwise conv of it."""
        # Here, so that the user's own number is named, and not the one that folding makes of it.
        check_finite(work.network)
        self._fold(work)

    def _fold(self, work: Workbench) -> None:
        if work.loader is not None and needs_ranks(work.network):
            note_ranks(work.network, work.batches(2)[0])
        work.keep_function("folded", _fold_all)
        if any(calls_batchnorm(node, work.network) for node in work.network.graph.nodes):
            work.keep_function("BatchNorms made convs", batchnorms_to_convs)


def _fold_all(traced: fx.GraphModule, skip: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for _, name in fold_batchnorm(traced, skip)))
