import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.pruning import grow_masks, own_shares, prunable, scores_of
from qat_tricks.graph.sparsity_shares import sparsity_shares
from tests.helpers.nets import images, small_net

BATCHES = [images(32)]


def parts(granularity="weight"):
    traced = trace(small_net())
    pruned = prunable(traced, granularity, ["*"], [])
    return traced, pruned, scores_of(pruned, "magnitude", granularity, {})


def test_shares_are_of_the_whole_sparsity_and_the_network_stays():
    traced, pruned, scores = parts()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    shares = sparsity_shares(traced, pruned, scores, BATCHES, sparsity=0.5, granularity="weight")
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    sizes = {name: layer.weight.numel() for name, layer in pruned.items()}
    mean = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(1)
    assert all(0 <= share * 0.5 <= 1 for share in shares.values())
    assert len(set(shares.values())) > 1


def test_shares_by_sensitivity_harm_the_output_less_than_equal_ones():
    x, errors = images(64, seed=4), []
    for equal in (False, True):
        traced, pruned, scores = parts()
        shares = sparsity_shares(
            traced, pruned, scores, BATCHES, sparsity=0.6, granularity="weight"
        )
        if equal:
            shares = dict.fromkeys(shares, 1.0)
        assert grow_masks(pruned, scores, own_shares(list(pruned), 0.6, shares)) >= 0.6
        with torch.no_grad():
            errors.append(output_error(small_net()(x), traced.eval()(x)).kl)
    assert errors[0] < 0.8 * errors[1]


def test_a_granularity_limits_each_layer():
    traced, pruned, scores = parts("2:4")
    for sparsity, low in ((0.5, 1.0), (0.3, 0.0)):
        shares = sparsity_shares(
            traced, pruned, scores, BATCHES, sparsity=sparsity, granularity="2:4"
        )
        assert all(low <= share <= 0.5 / sparsity + 1e-9 for share in shares.values())


def test_without_images_nothing_is_shared_out():
    traced, pruned, scores = parts()
    with pytest.raises(QatTricksError, match="to share out sparsity by"):
        sparsity_shares(traced, pruned, scores, [], sparsity=0.5, granularity="weight")
