"""Prepares a simulated network for its file; export and forecast share this step."""

from torch import fx

from qat_tricks.graph.fold import fold_batchnorm
from qat_tricks.graph.surgery import fold_restored
from qat_tricks.graph.two_modes import EVALUATION, acts_on_mode, graph_in


def prepare_for_export(traced: fx.GraphModule) -> None:
    """Makes the changes, in place, that export makes before it turns quantizers into operators.

    What only training computes is left out, and a BatchNorm that is still there is folded into the
    conv or linear before it.
    """
    if acts_on_mode(traced.graph):
        traced.graph = graph_in(traced.graph, EVALUATION)
    fold_restored(traced)
    fold_batchnorm(traced)
