"""Prunes the layers of a network: which weights go first, and which layers compete.

* criterion: magnitude (Han et al. 2015, arXiv 1506.02626), or second order (``optimal_brain``);
* scope: each layer alike, or global, where all weights compete. A magnitude is divided by its
  layer's root mean square; without that a layer's scale would decide instead of its use, for
  folding and equalization change scales freely. Or by sensitivity, see ``sparsity_shares``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.calls_beside import is_inside
from qat_tricks.graph.layers import Layer, as_layer, is_layer
from qat_tricks.graph.patterns import check_patterns, matches
from qat_tricks.graph.spec import spec_of
from qat_tricks.numerics.optimal_brain import Curvature, saliencies
from qat_tricks.numerics.sparsity import (
    GRANULARITIES,
    SCHEDULES,
    largest_sparsity,
    without_smallest,
)


def magnitude(layer: Layer, of_layer: Curvature | None) -> Tensor:
    """The absolute value of each weight, in units of the layer's root mean square; 0 if pruned.

    A layer's own BatchNorm counts: what is compared is the weight that is deployed.
    """
    weight = layer.deployed_weight().detach().float()
    return weight.abs() / weight.square().mean().sqrt().clamp_min(1e-12)


def obs(layer: Layer, of_layer: Curvature | None) -> Tensor:
    """What each weight's loss costs if all others follow, of the energy of the layer's output."""
    if of_layer is None:  # evaluation does not reach the layer, so its weights cost nothing
        return torch.zeros_like(layer.weight, dtype=torch.float64)
    return saliencies(layer.deployed_weight(), of_layer)


Groups = list[tuple[list[str], float]]
"""Layers that rank together, with the share of zeros among their weights."""


def each_layer(names: Sequence[str], sparsity: float, shares: Mapping[str, float]) -> Groups:
    """Lets each layer rank its own weights, so that all reach the same sparsity."""
    return [([name], sparsity) for name in names]


def all_layers(names: Sequence[str], sparsity: float, shares: Mapping[str, float]) -> Groups:
    """Ranks the weights of all layers together."""
    return [(list(names), sparsity)]


def own_shares(names: Sequence[str], sparsity: float, shares: Mapping[str, float]) -> Groups:
    """Gives each layer a sparsity of its own, in proportion to ``shares``."""
    return [([name], sparsity * shares[name]) for name in names]


# A criterion gives a layer's scores, of the weight's shape; the smallest go first. It is given the
# layer's curvature where it is one of NEED_IMAGES. A scope gives the groups of layers that rank
# together; only ``sensitivity`` heeds the layers' shares, of which the mean over weights is 1.
CRITERIA: Mapping[str, Callable[[Layer, Curvature | None], Tensor]] = {
    "magnitude": magnitude,
    "obs": obs,
}
SCOPES: Mapping[str, Callable[[Sequence[str], float, Mapping[str, float]], Groups]] = {
    "layer": each_layer,
    "global": all_layers,
    "sensitivity": own_shares,
}
NEED_IMAGES = ("obs", "sensitivity")


def prunable(
    traced: fx.GraphModule, granularity: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Layer]:
    """The convs and linears that ``prune`` prunes, by name, made ready to carry a mask.

    Raises:
        QatTricksError: a pattern matches no layer, or no layer is left.
    """
    # A conv that was a BatchNorm has one weight a channel: without it the channel is lost.
    factors = spec_of(traced).get("convs", [])
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    modules = {
        name: module
        for name, module in traced.named_modules()
        if is_layer(module) and is_inside(name, called) and name not in factors
    }
    check_patterns([*include, *exclude], list(modules))
    fits = GRANULARITIES[granularity]
    pruned = {
        name: as_layer(module)
        for name, module in modules.items()
        if matches(name, include)
        and not matches(name, exclude)
        and fits(module.weight.detach().abs()) is not None
    }
    if not pruned:
        raise QatTricksError(
            f"no layer is left to prune (granularity {granularity}): widen include or narrow "
            "exclude"
        )
    for name, layer in pruned.items():
        if layer.weight_mask is None:
            layer.weight_mask = torch.ones_like(layer.weight)
        spec_of(traced).setdefault("layers", {}).setdefault(name, {})["mask"] = True
    return pruned


def check_settings(sparsity: float, **choices: str) -> None:
    """Raises QatTricksError for settings that are not allowed, all of them at once.

    Args:
        sparsity: the share of zeros.
        choices: names of ``schedule``, ``criterion``, ``granularity`` and ``scope``, if they are
            to be checked.
    """
    problems = []
    if not 0 <= sparsity < 1:
        problems.append(f"sparsity={sparsity} is not allowed: give a share from 0 to below 1")
    tables: dict[str, Mapping[str, Any]] = {
        "schedule": SCHEDULES,
        "criterion": CRITERIA,
        "granularity": GRANULARITIES,
        "scope": SCOPES,
    }
    for choice, name in choices.items():
        if name not in tables[choice]:
            problems.append(f'unknown {choice} "{name}": {did_you_mean(name, tables[choice])}')
    granularity = choices.get("granularity", "weight")
    if not problems and sparsity > (most := largest_sparsity(granularity)):
        problems.append(
            f"sparsity={sparsity} is not possible with {granularity}: give {most:g} or less, or "
            "granularity=weight"
        )
    if problems:
        raise QatTricksError("; ".join(problems))


@torch.no_grad()
def scores_of(
    pruned: Mapping[str, Layer],
    criterion: str,
    granularity: str,
    curvatures: Mapping[str, Curvature],
) -> dict[str, Tensor]:
    """The scores of each layer's weights; infinite where a granularity lets a weight not go."""
    scores = {}
    for name, layer in pruned.items():
        score = GRANULARITIES[granularity](CRITERIA[criterion](layer, curvatures.get(name)))
        assert score is not None  # ``prunable`` leaves out layers that do not fit
        scores[name] = score
    return scores


@torch.no_grad()
def grow_masks(pruned: Mapping[str, Layer], scores: Mapping[str, Tensor], groups: Groups) -> float:
    """Prunes the smallest scores of each group, in place, and returns the sparsity reached.

    A pruned weight stays pruned: masks only grow, and pruned weights are set to exactly zero.
    """
    for names, share in groups:
        flat = torch.cat([scores[name].flatten() for name in names])
        keep = without_smallest(flat, count_of(share, flat.numel()))
        sizes = [scores[name].numel() for name in names]
        for name, part in zip(names, keep.split(sizes), strict=True):
            layer = pruned[name]
            assert layer.weight_mask is not None
            # Masks are multiplied, so a pruned weight stays pruned.
            layer.weight_mask.mul_(part.view_as(layer.weight_mask))
            layer.weight.mul_(layer.weight_mask)
    return sparsity_of(pruned.values())


def count_of(share: float, weights: int) -> int:
    """The number of weights in a share, rounded up, less the error of the product in floats."""
    return min(math.ceil(share * weights - 1e-9), weights)


def sparsity_of(pruned: Iterable[Layer]) -> float:
    """The share of zeros in the masks of ``pruned``."""
    masks = [layer.weight_mask for layer in pruned if layer.weight_mask is not None]
    ones = sum(float(mask.sum()) for mask in masks)
    return 1 - ones / max(1, sum(mask.numel() for mask in masks))
