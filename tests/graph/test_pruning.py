import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, pruning, spec_of, trace
from qat_tricks.graph.hessians import input_hessians
from qat_tricks.graph.pruning import check_settings, grow_masks, magnitude, obs, prunable
from qat_tricks.numerics import sparsity
from qat_tricks.numerics.optimal_brain import curvature
from qat_tricks.tricks import prune
from qat_tricks.tricks.prune import Prune
from tests.helpers.nets import images, small_net


def test_a_new_criterion_and_a_new_granularity_are_one_function_each(monkeypatch):
    def position(layer, curvature):
        return torch.arange(layer.weight.numel(), dtype=torch.float32).view_as(layer.weight)

    def whole_filters(score):
        return score.flatten(1).mean(1).view(-1, *[1] * (score.dim() - 1)).expand_as(score)

    monkeypatch.setitem(pruning.CRITERIA, "position", position)
    monkeypatch.setitem(sparsity.GRANULARITIES, "filter", whole_filters)
    traced = trace(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert Prune(criterion="position", granularity="filter").choices["criterion"] == "position"
    assert prune(traced, 0.25, criterion="position", granularity="filter") == 0.25
    mask = traced.get_submodule("0").weight_mask
    assert mask[:2].sum() == 0  # the first two filters, whole
    assert mask[2:].all()


@pytest.mark.parametrize("criterion", [magnitude, obs])
def test_scores_are_of_the_weight_that_is_deployed_and_know_no_scale(criterion):
    traced = trace(small_net())
    pruned = prunable(traced, "weight", ["*"], ["head"])
    assert "head" not in pruned
    assert spec_of(traced)["layers"]["left"] == {"mask": True}
    layer, hessian = pruned["left"], input_hessians(traced, pruned, [images()])["left"]
    scores = criterion(layer, curvature(layer.deployed_weight(), hessian))
    with torch.no_grad():
        layer.weight.mul_(7)
    again = criterion(layer, curvature(layer.deployed_weight(), hessian))
    assert torch.allclose(scores, again)
    layer.weight_mask[0] = 0
    masked = criterion(layer, curvature(layer.deployed_weight(), hessian))
    assert (masked[0] == 0).all()
    assert (masked[1:] > 0).all()


def test_groups_have_shares_of_their_own():
    traced = trace(small_net())
    pruned = prunable(traced, "weight", ["left", "right"], [])
    scores = {name: magnitude(layer, None) for name, layer in pruned.items()}
    reached = grow_masks(pruned, scores, [(["left"], 0.25), (["right"], 0.75)])
    zeros = {name: int((layer.weight_mask == 0).sum()) for name, layer in layers(traced).items()}
    assert zeros == {"left": 16, "right": 432}
    assert reached == pytest.approx(448 / 640)


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(QatTricksError, match=r"sparsity=2 .*unknown criterion.*unknown scope"):
        check_settings(2, criterion="x", scope="y")


def test_a_layer_that_evaluation_does_not_reach_costs_nothing():
    layer = prunable(trace(nn.Sequential(nn.Linear(3, 4))), "weight", ["*"], [])["0"]
    assert (obs(layer, None) == 0).all()
