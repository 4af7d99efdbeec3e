"""Tries which channels can be removed without a change of what the network computes.

Labels follow values. They do not follow sizes: a network may multiply by its number of channels, or
give one tensor the shape of another. So some units of each group are masked in a copy, and then
removed, which must not change the output.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.channel_groups import ChannelGroup, Channels
from qat_tricks.graph.channel_removal import mask_channels, remove_channels
from qat_tricks.graph.equivalence import exact_products, sqnr, tensors_in
from qat_tricks.graph.inputs import Inputs, as_tensors, first_images, map_tensors
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.two_modes import EvaluationInterpreter

TRIALS = 3  # of all groups together
LEAST_DB = 100.0  # right removals were measured at 125 dB and more in float32
DEPENDS = "what the network computes depends on the number of these channels"


@torch.no_grad()
def sound_channels(traced: fx.GraphModule, channels: Channels, inputs: Inputs) -> Channels:
    """``channels`` with those groups that a trial has shown to be removable.

    Args:
        traced: the network, which stays as it is.
        channels: of it.
        inputs: of one image or more.

    Raises:
        QatTricksError: groups that are removable one by one are not so together.
    """
    two = first_images(inputs, 2)

    def together(groups: Sequence[ChannelGroup]) -> bool:
        return all(_is_exact(traced, channels, groups, two, seed) for seed in range(TRIALS))

    if together(channels.groups):
        return channels
    sound = [group for group in channels.groups if _is_exact(traced, channels, [group], two, 0)]
    if not together(sound):
        raise QatTricksError(
            "channels of this network can be removed layer by layer and not together: leave "
            "prune_channels out, and please report this network"
        )
    fixed = {group.name: DEPENDS for group in channels.groups if group not in sound}
    return replace(channels, groups=sound, fixed={**channels.fixed, **fixed})


def _is_exact(
    traced: fx.GraphModule,
    channels: Channels,
    groups: Sequence[ChannelGroup],
    inputs: Inputs,
    seed: int,
) -> bool:
    """Whether removing some units of ``groups`` leaves what masking them leaves.

    How many of a group is drawn: two groups that have to be of one width would fit by chance if
    each lost its half.
    """
    trial = copy.deepcopy(traced)
    draw = random.Random(seed)
    removed = {
        unit
        for group in groups
        for unit in draw.sample(group.units, draw.randint(1, len(group.units) - 1))
    }
    mask_channels(trial, channels, removed)
    masked = _outputs(trial, inputs)
    # Whatever the user's code raises where a shape no longer fits.
    try:
        remove_channels(trial, channels, removed)
        left = _outputs(trial, inputs)
    except Exception:
        return False
    return sqnr(masked, left) >= LEAST_DB


def _outputs(network: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    with evaluating(network), kept_random_state(), exact_products():
        seed_all(0)
        tensors = as_tensors(map_tensors(inputs, Tensor.clone))
        # Node by node, for a call of the graph prints the traceback of what it raises.
        return tensors_in(EvaluationInterpreter(network).run(*tensors))
