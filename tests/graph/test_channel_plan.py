"""A plan meets its budget, with the channels that are missed least."""

import copy
from functools import partial

import numpy as np
import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.channel_groups import ChannelGroup, find_channels
from qat_tricks.graph.channel_plan import (
    ChannelCosts,
    Steps,
    largest_share,
    plan_alike,
    plan_by_errors,
)
from qat_tricks.graph.channel_removal import remove_channels
from qat_tricks.graph.macs import macs_of_calls
from tests.helpers.nets import images, small_net
from tests.helpers.structures import STRUCTURES, built, inputs

STEPS = Steps(multiple=1, least=0.0)


def _group(name, count, channels=1):
    return ChannelGroup(name=name, units=tuple(range(count)), channels=channels)


@pytest.mark.parametrize(
    "name", ["squeeze_excite", "layer_scale", "conv_flatten_relu_linear", "shuffled_channels"]
)
def test_costs_are_those_of_the_network_that_is_left(name):
    build, shape = STRUCTURES[name]
    _check_costs(trace(built(build)), inputs(shape))


def test_costs_of_a_network_with_residuals_and_a_depthwise_conv():
    _check_costs(trace(small_net(width=16)), images())


def _check_costs(traced, x):
    channels = find_channels(traced, x)
    costs = ChannelCosts(traced, channels, x)
    kept = np.array([max(1, len(group.units) // 3) for group in channels.groups])
    for counts in (costs.all, kept):
        left = copy.deepcopy(traced)
        removed = {
            unit
            for group, count in zip(channels.groups, counts, strict=True)
            for unit in group.units[count:]
        }
        remove_channels(left, channels, removed)
        assert costs.parameters(counts) == sum(p.numel() for p in left.parameters())
        assert costs.macs(counts) == sum(call.macs for call in macs_of_calls(left, x))


def test_steps_are_multiples_of_channels():
    assert Steps(multiple=8, least=0.1).of(_group("a", 64)) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert Steps(multiple=8, least=0.5).of(_group("a", 20)) == [16, 20]
    assert Steps(multiple=8, least=0.0).of(_group("a", 12, channels=4)) == [2, 4, 6, 8, 10, 12]
    assert Steps(multiple=1, least=0.0).of(_group("a", 960)) == list(range(15, 961, 15))
    # A narrow group takes half of the multiple, and so on.
    assert Steps(multiple=16, least=0.1).of(_group("a", 24)) == [8, 16, 24]
    assert Steps(multiple=16, least=0.1).of(_group("a", 6)) == [2, 4, 6]


def test_the_least_error_for_what_is_spared_goes_first():
    groups = [_group("dear", 4), _group("cheap", 4)]
    errors = [[40.0, 30.0, 20.0, 10.0, 0.0], [4.0, 3.0, 2.0, 1.0, 0.0]]
    kept = plan_by_errors(groups, errors, STEPS, lambda n: float(n.sum()), 5.0)
    assert kept.tolist() == [4, 1]
    # Where the dear group spares a hundred times as much, it goes.
    kept = plan_by_errors(groups, errors, STEPS, lambda n: float(100 * n[0] + n[1]), 303.5)
    assert kept.tolist() == [3, 3]


def test_a_dear_step_with_cheap_ones_behind_it_is_taken_together():
    groups = [_group("cliff", 4), _group("slope", 4)]
    errors = [[3.3, 3.2, 3.1, 3.0, 0.0], [8.0, 6.0, 4.0, 2.0, 0.0]]
    kept = plan_by_errors(groups, errors, STEPS, lambda n: float(n.sum()), 5.0)
    assert kept.tolist() == [1, 4]


def test_what_a_large_last_step_spared_too_much_is_given_back():
    groups = [_group("small", 4), _group("large", 2)]
    errors = [[4.0, 3.0, 2.0, 1.0, 0.0], [9.0, 4.1, 0.0]]
    cost = lambda n: float(n[0] + 10 * n[1])  # noqa: E731
    kept = plan_by_errors(groups, errors, STEPS, cost, 14.0)
    assert kept.tolist() == [4, 1]


def test_alike_keeps_the_largest_share_that_meets_the_budget():
    groups = [_group("a", 10), _group("b", 20)]
    kept = plan_alike(groups, STEPS, lambda n: float(n[0] * n[1]), 50.0)
    assert kept.tolist() == [5, 10]


@pytest.mark.parametrize("alike", [True, False])
def test_a_budget_that_cannot_be_met_is_told(alike):
    groups, steps = [_group("a", 16)], Steps(multiple=8)

    def cost(kept):
        return float(kept.sum())

    plan = plan_alike if alike else partial(plan_by_errors, errors=[[0.0] * 17])
    with pytest.raises(QatTricksError, match=r"share=0.25 is not allowed: .* cost 0.5 of the"):
        plan(groups, steps=steps, cost=cost, budget=4.0)


def test_trials_come_near_from_below():
    tried = []

    def excess(share):
        tried.append(share)
        return (0.3 + 0.7 * share) / 0.6

    share = largest_share(excess, start=0.6, trials=6, near=0.03)
    assert share is not None
    assert 0.97 <= excess(share) <= 1
    assert len(tried) <= 6


def test_trials_without_success_and_with_too_few_channels():
    assert largest_share(lambda share: 2.0, start=0.5, trials=4, near=0.03) is None

    def refuse(share):
        raise QatTricksError("too few")

    with pytest.raises(QatTricksError, match="too few"):
        largest_share(refuse, start=0.5, trials=4, near=0.03)

    def floor(share):
        if share < 0.4:
            raise QatTricksError("too few")
        return share / 0.42

    share = largest_share(floor, start=0.9, trials=8, near=0.03)
    assert share is not None
    assert 0.4 <= share <= 0.42
