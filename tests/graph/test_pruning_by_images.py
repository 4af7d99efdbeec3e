import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.pruning import prunable
from qat_tricks.graph.pruning_by_images import Measured, measure, prune_and_refit
from qat_tricks.tricks import prune
from tests.helpers.nets import images, small_net

BATCHES = [images(64)]


@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
def test_weights_that_follow_make_a_better_network(scope):
    x, errors = images(64, seed=4), []
    for refits in (True, False):
        traced = trace(small_net())
        if refits:
            reached = prune_and_refit(traced, 0.6, BATCHES, scope=scope)
        else:
            reached = prune(traced, 0.6, criterion="obs", scope=scope, batches=BATCHES)
        count = sum(layer.weight.numel() for layer in layers(traced).values())
        assert 0.6 <= reached <= 0.6 + len(layers(traced)) / count
        for layer in layers(traced).values():
            assert (layer.weight[layer.weight_mask == 0] == 0).all()
        with torch.no_grad():
            errors.append(output_error(small_net()(x), traced.eval()(x)).kl)
    assert errors[0] < 0.5 * errors[1]


def test_two_of_four_stays_two_of_four():
    traced = trace(small_net())
    prune_and_refit(traced, 0.5, BATCHES, granularity="2:4", include=["left", "right"])
    for name in ("left", "right"):
        mask = traced.get_submodule(name).weight_mask
        assert (mask.transpose(1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_the_same_images_give_the_same_network():
    first, second = trace(small_net()), trace(small_net())
    for traced in (first, second):
        prune_and_refit(traced, 0.5, BATCHES, scope="sensitivity", include=["left", "head"])
    assert all(torch.equal(a, second.state_dict()[k]) for k, a in first.state_dict().items())


def test_what_was_measured_survives_a_checkpoint(tmp_path):
    traced = trace(small_net())
    found = prunable(traced, "weight", ["*"], [])
    settings = {"criterion": "obs", "scope": "sensitivity", "granularity": "weight"}
    measured = measure(traced, found, BATCHES, sparsity=0.5, **settings)
    assert set(measured.shares) == set(measured.curvatures) == set(layers(traced))
    assert measured.curvatures["depthwise.0"].inverse.shape == (8, 9)
    torch.save(measured.as_dict(), tmp_path / "measured.pt")
    again = Measured.of(torch.load(tmp_path / "measured.pt", weights_only=True))
    reached = {
        prune(trace(small_net()), 0.5, criterion="obs", scope="sensitivity", measured=each)
        for each in (measured, again)
    }
    assert len(reached) == 1


def test_only_what_is_needed_is_measured():
    traced = trace(small_net())
    found = prunable(traced, "weight", ["*"], [])
    settings = {"sparsity": 0.0, "criterion": "magnitude", "granularity": "weight"}
    assert measure(traced, found, [], scope="global", **settings) == Measured(
        curvatures={}, shares={}
    )
    shares = measure(traced, found, BATCHES, scope="sensitivity", **settings).shares
    assert shares == dict.fromkeys(found, 1.0)
    with pytest.raises(QatTricksError, match="no images"):
        prune_and_refit(traced, 0.5, [])
