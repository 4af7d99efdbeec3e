"""The step between a simulated network and its file that export and forecast share."""

from torch import fx

from qat_tricks.graph.fold import fold_batchnorm


def prepare_for_export(traced: fx.GraphModule) -> None:
    """Does, in place, all that export does to a network of ours before it writes the quantizers
    out: a BatchNorm that training kept is folded into the conv or linear before it.
    """
    fold_batchnorm(traced)
