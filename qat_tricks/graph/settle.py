"""Settles the grids of a network: the last word after ranges were found, searched or learned."""

from torch import fx

from qat_tricks.graph.hard_sigmoids import align_hard_sigmoids
from qat_tricks.graph.near_ties import avoid_rounding_ties


def settle_grids(traced: fx.GraphModule) -> None:
    """Moves ranges, in place, so that hardsigmoids only clip and no runtime rounds otherwise."""
    align_hard_sigmoids(traced)
    avoid_rounding_ties(traced)
