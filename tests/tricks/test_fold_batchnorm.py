import pytest
import torch

from qat_tricks.graph import layers, trace
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks import fold_batchnorm, prune
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
