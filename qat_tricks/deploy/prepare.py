"""Prepares a simulated network for its file; export and forecast share this step."""

from torch import fx

from qat_tricks.graph.fold import fold_batchnorm
from qat_tricks.graph.two_modes import EVALUATION, acts_on_mode, graph_in


def prepare_for_export(traced: fx.GraphModule) -> None:
    """Makes the changes, in place, that export makes before it turns quantizers into operators.

    What only training computes is left out, and BatchNorms that are still there are folded.
    """
    if acts_on_mode(traced.graph):
        traced.graph = graph_in(traced.graph, EVALUATION)
    fold_batchnorm(traced)
