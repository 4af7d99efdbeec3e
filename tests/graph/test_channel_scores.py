"""Channels that matter less have lower scores."""

import copy

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.channel_groups import find_channels
from qat_tricks.graph.channel_removal import mask_channels
from qat_tricks.graph.channel_scores import CRITERIA, score_channels
from qat_tricks.graph.hessians import input_hessians
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.submodules import layer_at
from tests.helpers.nets import images, small_net


def _scores(traced, criterion, batches=None):
    batches = [images(64)] if batches is None else batches
    channels = find_channels(traced, batches[0])
    names = {name: layer_at(traced, name) for name in channels.columns}

    def hessians():
        return input_hessians(traced, names, batches)

    return channels, score_channels(traced, channels, criterion, batches, hessians)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_channel_without_effect_goes_first(criterion):
    traced = trace(small_net())
    with torch.no_grad():  # nobody hears channel 3 of the block's first conv
        traced.get_submodule("block.conv1").weight[3] = 0
        for tensor in ("weight", "bias"):
            getattr(traced.get_submodule("block.bn1"), tensor)[3] = 0
        traced.get_submodule("block.conv2").weight[:, 3] = 0
    channels, scores = _scores(traced, criterion)
    group = next(group for group in channels.groups if group.name == "block.conv1")
    assert scores[group.units[3]] == pytest.approx(0, abs=1e-12)
    assert scores[group.units[3]] <= min(scores[unit] for unit in group.units)


def test_taylor_is_near_the_divergence_that_losing_a_channel_costs():
    traced = trace(small_net())
    x = images(2048)
    channels, scores = _scores(traced, "taylor", list(x.split(256)))
    reference = traced(x).detach()
    costs = {}
    for group in channels.groups:
        for unit in group.units:
            without = copy.deepcopy(traced)
            mask_channels(without, channels, {unit})
            costs[unit] = output_error(reference, without(x).detach()).kl
    # A channel whose ReLU never opens costs nothing, and has no logarithm.
    pairs = torch.tensor([[scores[unit], costs[unit]] for unit in costs if scores[unit] > 0]).log()
    assert len(pairs) > 20
    assert torch.corrcoef(pairs.T)[0, 1] > 0.8
    # It is no more than a second order: a third to three times as much.
    assert (pairs[:, 0] - pairs[:, 1]).abs().median() < 1.1


def test_output_error_is_the_error_of_the_layer_that_reads():
    traced = trace(small_net())
    x = images(64)
    channels, scores = _scores(traced, "output_error", [x])
    group = next(group for group in channels.groups if group.name == "block.conv1")
    conv = traced.get_submodule("block.conv2")
    read = []
    handle = conv.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    traced(x)
    handle.remove()
    with torch.no_grad():
        expected = nn.functional.conv2d(read[0], conv.weight, padding=1)
        conv.weight[:, 5] = 0
        lost = expected - nn.functional.conv2d(read[0], conv.weight, padding=1)
    share = float(lost.square().sum() / expected.square().sum())
    assert scores[group.units[5]] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_the_same_again_and_the_network_stays(criterion):
    traced = trace(small_net())
    before = copy.deepcopy(traced.state_dict())
    first, second = (_scores(traced, criterion)[1] for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    assert all(parameter.grad is None for parameter in traced.parameters())
    with torch.inference_mode():  # in which Lightning validates
        assert _scores(traced, criterion)[1] == pytest.approx(first, rel=1e-4)


def test_an_unknown_criterion_is_told():
    with pytest.raises(QatTricksError, match=r'criterion="tailor" is not allowed: .*taylor'):
        _scores(trace(small_net()), "tailor")
    traced = trace(small_net())
    channels = find_channels(traced, images())
    with pytest.raises(QatTricksError, match="batch"):
        score_channels(traced, channels, "taylor", [], dict)
