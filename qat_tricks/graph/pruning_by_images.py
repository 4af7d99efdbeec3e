"""Prunes by what images tell: second-order scores, shares by sensitivity, and weights that follow.

What is measured is that of rank zero, in every process; so masks are the same on each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.graph.hessians import input_hessians
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.processes import from_rank_zero
from qat_tricks.graph.pruning import (
    NEED_IMAGES,
    SCOPES,
    check_settings,
    grow_masks,
    prunable,
    refit_layer,
    scores_of,
)
from qat_tricks.graph.sparsity_shares import sparsity_shares
from qat_tricks.numerics.optimal_brain import Curvature, curvature
from qat_tricks.numerics.sparsity import cubic_schedule
from qat_tricks.progress import track

ROUNDS = 8  # in which ``prune_and_refit`` reaches its sparsity


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What images have told of a network; small enough for a checkpoint."""

    curvatures: Mapping[str, Curvature]  # of each layer, for ``obs``
    shares: Mapping[str, float]  # of each layer, for ``sensitivity``

    def as_dict(self) -> dict[str, Any]:
        """Tensors and plain data; ``Measured.of`` is the way back."""
        curvatures = {
            name: {"inverse": each.inverse, "energy": each.energy}
            for name, each in self.curvatures.items()
        }
        return {"curvatures": curvatures, "shares": dict(self.shares)}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Measured":
        """What ``as_dict`` has returned."""
        curvatures = {name: Curvature(**each) for name, each in given["curvatures"].items()}
        return cls(curvatures=curvatures, shares=given["shares"])


@torch.no_grad()
def measure(
    traced: fx.GraphModule,
    pruned: Mapping[str, Layer],
    batches: Sequence[Inputs],
    *,
    sparsity: float,
    criterion: str,
    scope: str,
    granularity: str,
) -> Measured:
    """Measures what a criterion and a scope need, the same on every rank.

    Args:
        traced: the network, which stays as it is.
        pruned: its layers that are to be pruned.
        batches: the network's inputs, a batch each; none where neither needs any.
        sparsity: that is to be reached in the end.
        criterion, scope, granularity: as for ``tricks.prune``.

    Raises:
        QatTricksError: no batches where they are needed.
    """
    curvatures: dict[str, Curvature] = {}
    if criterion in NEED_IMAGES:
        curvatures = curvatures_of(pruned, input_hessians(traced, pruned, batches))
    shares: dict[str, float] = {}
    if scope in NEED_IMAGES:
        scores = scores_of(pruned, criterion, granularity, curvatures)
        shares = _shares(traced, pruned, scores, batches, sparsity, granularity)
    return Measured(curvatures=curvatures, shares=shares)


def curvatures_of(
    pruned: Mapping[str, Layer], hessians: Mapping[str, Tensor]
) -> dict[str, Curvature]:
    """The curvature of each layer that the images reach, the same on every rank."""
    return from_rank_zero(
        {name: curvature(pruned[name].deployed_weight(), hessians[name]) for name in hessians}
    )


def _shares(
    traced: fx.GraphModule,
    pruned: Mapping[str, Layer],
    scores: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    sparsity: float,
    granularity: str,
    hessians: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The share of each layer, the same on every rank."""
    if sparsity == 0:  # nothing to share out
        return dict.fromkeys(pruned, 1.0)
    settings = {"sparsity": sparsity, "granularity": granularity, "hessians": hessians}
    shares = sparsity_shares(traced, pruned, scores, batches, **settings)  # type: ignore[arg-type]
    return from_rank_zero(shares)


@torch.no_grad()
def prune_and_refit(
    traced: fx.GraphModule,
    sparsity: float,
    batches: Sequence[Inputs],
    *,
    scope: str = "layer",
    granularity: str = "weight",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> float:
    """Prunes by ``obs`` without training: the weights that stay follow the layer's output.

    The sparsity is reached in rounds, between which the weights that stay are fitted to what the
    layer's weights computed at first. So those that go next are chosen by what they do by then.

    Args:
        traced: as for ``prune``; its weights change too.
        sparsity: as for ``prune``.
        batches: the network's inputs, a batch each.
        scope, granularity, include, exclude: as for ``prune``.

    Raises:
        QatTricksError: see ``prune``.
    """
    check_settings(sparsity, criterion="obs", scope=scope, granularity=granularity)
    pruned = prunable(traced, granularity, include, exclude)
    first = {name: layer.masked_weight().clone() for name, layer in pruned.items()}
    # Inputs measured anew in each round, with the layers before pruned, gave no better network.
    hessians = input_hessians(traced, pruned, batches)
    curvatures = curvatures_of(pruned, hessians)
    shares: dict[str, float] = {}
    if scope in NEED_IMAGES:
        scores = scores_of(pruned, "obs", granularity, curvatures)
        given = (batches, sparsity, granularity, hessians)
        shares = _shares(traced, pruned, scores, *given)
    for done in track(range(1, ROUNDS + 1), "prune"):
        scores = scores_of(pruned, "obs", granularity, curvatures)
        now = cubic_schedule(done / ROUNDS, initial=0.0, final=sparsity, start=0.0, end=1.0)
        reached = grow_masks(pruned, scores, SCOPES[scope](list(scores), now, shares))
        for name, hessian in hessians.items():
            layer = pruned[name]
            assert layer.weight_mask is not None
            refit_layer(layer, first[name], layer.weight_mask, hessian)
    return reached
