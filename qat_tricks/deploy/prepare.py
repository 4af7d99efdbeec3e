"""Prepares a simulated network for its file; export and forecast share this step."""

from torch import fx

from qat_tricks.graph.fold import fold_batchnorm


def prepare_for_export(traced: fx.GraphModule) -> None:
    """Makes the changes, in place, that export makes before it turns quantizers into operators.

    A BatchNorm that is still there is folded into the conv or linear before it.
    """
    fold_batchnorm(traced)
