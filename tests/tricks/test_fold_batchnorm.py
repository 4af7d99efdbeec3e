import pytest
import torch
from torch import nn

from qat_tricks.graph import layers, spec_of, trace
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks import FoldBatchnorm, fold_batchnorm, prune
from tests.helpers.nets import images, small_net


def test_masks_survive():
    traced = trace(small_net())
    prune(traced, 0.5)
    expected = traced(images())
    fold_batchnorm(traced)
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
    assert all(
        (layer.masked_weight() == 0).float().mean() >= 0.5 for layer in layers(traced).values()
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_folding_a_quantized_layer_keeps_its_integers(bits):
    net = small_net()
    with torch.no_grad():
        net.stem[1].weight[::2] *= -1  # a negative gain turns signs, not magnitudes
    overrides = [f"stages.ptq.tricks.quantize.weight_bits={bits}"]
    overrides += ["~stages.ptq.tricks.fold_batchnorm", "~stages.ptq.tricks.equalize"]
    quantized = quantize(net, [images()], overrides=overrides)
    expected = quantized(images(seed=3))
    assert len(fold_batchnorm(quantized)) == 4
    torch.testing.assert_close(quantized(images(seed=3)), expected, rtol=1e-3, atol=1e-3)


def test_the_trick_leaves_no_batchnorm_behind_a_layer():
    """Folded where that is possible, and a depthwise conv behind the ReLU."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    for seed in range(5):
        net(images(seed=seed))
    expected = net.eval()(images())
    work = Workbench(net)
    FoldBatchnorm().apply_once(work)
    torch.testing.assert_close(work.network(images()), expected, rtol=1e-4, atol=1e-5)
    assert not [m for m in work.network.modules() if isinstance(m, BATCHNORMS)]
    spec = spec_of(work.network)
    assert (spec["folded"], spec["convs"], spec["applied"]) == (
        [["0", "1"]],
        ["3"],
        ["fold_batchnorm"],
    )
