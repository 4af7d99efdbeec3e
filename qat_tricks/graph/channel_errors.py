"""The errors of groups of channels, for each number of channels that may stay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, fx

from qat_tricks.graph.bit_options import LARGEST_ERROR
from qat_tricks.graph.channel_groups import ChannelGroup, Channels
from qat_tricks.graph.channel_plan import Errors
from qat_tricks.graph.channel_removal import mask_weights, read_masks
from qat_tricks.graph.channel_scores import Scores
from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.sensitivity import Change, errors_alone
from qat_tricks.graph.submodules import layer_at

LEVELS = (0.25, 0.5, 0.75, 0.9)  # shares of a group's channels that are removed for a trial


def lowest_first(group: ChannelGroup, scores: Scores) -> list[int]:
    """The units of a group in the order in which they go."""
    return sorted(group.units, key=lambda unit: scores[unit])


def summed_errors(groups: Sequence[ChannelGroup], scores: Scores) -> Errors:
    """Takes the scores of channels that go for the error that they make together."""
    found = []
    for group in groups:
        order = lowest_first(group, scores)
        sums = np.concatenate([[0.0], np.cumsum([scores[unit] for unit in order])])
        found.append(sums[::-1].tolist())
    return found


@torch.no_grad()
def measured_errors(
    traced: fx.GraphModule,
    channels: Channels,
    scores: Scores,
    batches: Sequence[Inputs],
    hessians: Mapping[str, Tensor] | None = None,
) -> Errors:
    """Measures the divergence of the network's output with each group alone at each of ``LEVELS``.

    Args:
        traced: the network, which stays as it is.
        channels: of it.
        scores: of its units, which go from the lowest on.
        batches: of the network's inputs.
        hessians: of the layers' inputs; given, the weights that stay are fitted anew.
    """
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    changes = []
    for group in channels.groups:
        order = lowest_first(group, scores)
        for level in LEVELS:
            removed = set(order[: round(level * len(order))])
            masks = read_masks(traced, channels, removed)
            first = min(masks or [calls[0]], key=calls.index)
            changes.append(Change(module=first, applied=_without(traced, masks, hessians or {})))
    _, measured = errors_alone(traced, batches, changes, "measure channels")
    kl = [min(error.kl, LARGEST_ERROR) for error in measured]
    found = []
    for index, group in enumerate(channels.groups):
        count = len(group.units)
        of_group = kl[index * len(LEVELS) : (index + 1) * len(LEVELS)]
        gone = [0, *(round(level * count) for level in LEVELS), count]
        # An error that falls is noise; beyond the last level it goes on rising.
        errors = np.maximum.accumulate([0.0, *of_group, 2 * of_group[-1]])
        curve = np.interp(np.arange(count + 1), gone, errors)
        found.append(curve[::-1].tolist())
    return found


def _without(
    traced: fx.GraphModule, masks: Mapping[str, Tensor], hessians: Mapping[str, Tensor]
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def applied() -> Iterator[None]:
        before = {name: layer_at(traced, name).weight.clone() for name in masks}
        mask_weights(traced, masks, hessians)
        try:
            yield
        finally:
            for name, weight in before.items():
                layer_at(traced, name).weight.copy_(weight)

    return applied
