"""Prunes the layers of a network: which weights go first, and which layers compete.

* criterion: magnitude (Han et al. 2015, arXiv 1506.02626), or second order (``optimal_brain``);
* scope: each layer alike, or global, where all weights compete. A magnitude is divided by its
  layer's root mean square; without that a layer's scale would decide instead of its use, for
  folding and equalization change scales freely. Or by sensitivity, see ``sparsity_shares``.

Layers that share a weight are pruned as one: they have the same mask.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.calls_beside import caller_of, is_inside
from qat_tricks.graph.layers import Layer, as_layer, is_layer
from qat_tricks.graph.patterns import check_patterns, matches
from qat_tricks.graph.spec import spec_of
from qat_tricks.numerics.optimal_brain import Curvature, refit, saliencies
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

    They are in the order of the calls. Of layers that share a weight, all are pruned if one is
    included and none is excluded.

    Raises:
        QatTricksError: a pattern matches no layer, or no layer is left.
    """
    # A conv that was a BatchNorm has one weight a channel: without it the channel is lost.
    factors = spec_of(traced).get("convs", [])
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    modules = {
        name: module
        for name, module in traced.named_modules()
        if is_layer(module) and is_inside(name, calls) and name not in factors
    }
    check_patterns([*include, *exclude], list(modules))
    fits = GRANULARITIES[granularity]
    sharing: dict[int, list[str]] = {}
    for name in sorted(modules, key=lambda name: calls.index(caller_of(name, calls))):
        sharing.setdefault(id(modules[name].weight), []).append(name)
    pruned = {
        name: as_layer(modules[name])
        for names in sharing.values()
        if any(matches(name, include) for name in names)
        and not any(matches(name, exclude) for name in names)
        and fits(modules[names[0]].weight.detach().abs()) is not None
        for name in names
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
    """The scores of each weight, by the name of the first layer that has it.

    They are infinite where a granularity lets a weight not go.
    """
    sums: dict[int, Tensor] = {}
    firsts: dict[str, Layer] = {}
    for name, layer in pruned.items():
        score, key = CRITERIA[criterion](layer, curvatures.get(name)), id(layer.weight)
        firsts |= {} if key in sums else {name: layer}
        sums[key] = sums[key] + score if key in sums else score
    scores = {}
    for name, layer in firsts.items():
        assert layer.weight_mask is not None
        # What is pruned goes first, whatever its score: it stays pruned, and so counts.
        score = sums[id(layer.weight)].masked_fill(layer.weight_mask == 0, -math.inf)
        fitting = GRANULARITIES[granularity](score)
        assert fitting is not None  # ``prunable`` leaves out layers that do not fit
        scores[name] = fitting
    return scores


@torch.no_grad()
def grow_masks(pruned: Mapping[str, Layer], scores: Mapping[str, Tensor], groups: Groups) -> float:
    """Prunes the smallest scores of each group, in place, and returns the sparsity reached.

    A pruned weight stays pruned: masks only grow, and pruned weights are set to exactly zero.

    Args:
        pruned: the layers, of those that share a weight all.
        scores: of each weight, as ``scores_of`` gives them.
        groups: of the names in ``scores``.
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
    masks = {id(pruned[name].weight): pruned[name].weight_mask for name in scores}
    for layer in pruned.values():
        mask = masks[id(layer.weight)]
        assert layer.weight_mask is not None
        assert mask is not None
        layer.weight_mask.copy_(mask)  # no one tensor for all: an average has copies of each
    return sparsity_of(pruned.values())


@torch.no_grad()
def refit_layer(layer: Layer, target: Tensor, keep: Tensor, hessian: Tensor) -> None:
    """Fits the weights that stay, where ``keep`` is 1, to the output of the weight ``target``."""
    found = refit(target, keep, hessian, layer.masked_weight())
    # Equalized layers hold a weight that is multiplied, and factors are never zero.
    layer.weight.copy_(found if layer.weight_factor is None else found / layer.weight_factor)


def count_of(share: float, weights: int) -> int:
    """The number of weights in a share, rounded up, less the error of the product in floats."""
    return min(math.ceil(share * weights - 1e-9), weights)


def sparsity_of(pruned: Iterable[Layer]) -> float:
    """The share of zeros in the masks of ``pruned``."""
    masks = [layer.weight_mask for layer in pruned if layer.weight_mask is not None]
    ones = sum(float(mask.sum()) for mask in masks)
    return 1 - ones / max(1, sum(mask.numel() for mask in masks))
