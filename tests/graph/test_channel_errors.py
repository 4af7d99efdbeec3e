"""What groups of channels cost the output, and weights that follow."""

import copy

import pytest
import torch

from qat_tricks.graph import trace
from qat_tricks.graph.channel_errors import (
    lowest_first,
    measured_errors,
    summed_errors,
)
from qat_tricks.graph.channel_groups import find_channels
from qat_tricks.graph.channel_removal import mask_weights, read_masks
from qat_tricks.graph.hessians import input_hessians
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.submodules import layer_at
from tests.helpers.nets import images, small_net


def _hessians(traced, channels, x):
    return input_hessians(traced, {name: layer_at(traced, name) for name in channels.columns}, [x])


def test_sums_begin_with_all_channels_at_nothing():
    channels = find_channels(trace(small_net()), images())
    group = channels.groups[0]
    scores = {unit: float(i) for i, unit in enumerate(group.units)}
    assert lowest_first(group, scores) == list(group.units)
    (errors,) = summed_errors([group], scores)
    assert errors[::-1] == [0.0, 0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0]


@torch.no_grad()
@pytest.mark.parametrize("fitted", [False, True])
def test_errors_are_measured_for_each_group_alone(fitted):
    traced, x = trace(small_net()), images(64)
    before = copy.deepcopy(traced.state_dict())
    channels = find_channels(traced, x)
    scores = {unit: float(i) for group in channels.groups for i, unit in enumerate(group.units)}
    hessians = _hessians(traced, channels, x) if fitted else {}
    errors = measured_errors(traced, channels, scores, [x], hessians)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    for group, of_group in zip(channels.groups, errors, strict=True):
        assert len(of_group) == len(group.units) + 1
        assert of_group[-1] == 0
        assert of_group == sorted(of_group, reverse=True)
    # Half of the second group's channels alone.
    group = channels.groups[1]
    half = copy.deepcopy(traced)
    mask_weights(half, read_masks(half, channels, set(group.units[:4])), hessians)
    assert errors[1][4] >= output_error(traced(x), half(x)).kl - 1e-9


@torch.no_grad()
def test_weights_that_stay_follow_the_output():
    traced, x = trace(small_net()), images(256)
    channels = find_channels(traced, x)
    removed = {unit for group in channels.groups for unit in group.units[::4]}
    errors = []
    for hessians in ({}, _hessians(traced, channels, x)):
        left = copy.deepcopy(traced)
        mask_weights(left, read_masks(left, channels, removed), hessians)
        errors.append(output_error(traced(x), left(x)).kl)
        for name, mask in read_masks(left, channels, removed).items():
            assert not (layer_at(left, name).weight * (1 - mask)).any()
    assert errors[1] < 0.5 * errors[0]
