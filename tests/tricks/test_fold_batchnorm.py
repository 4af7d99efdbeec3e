import pytest
import torch
from nets import images, small_net
from torch import nn

from qat_tricks.graph import layers, trace
from qat_tricks.ptq import quantize
from qat_tricks.tricks import fold_batchnorm, prune


def test_function_stays_and_no_batchnorm_is_left():
    traced = trace(small_net())
    assert len(fold_batchnorm(traced)) == 4
    torch.testing.assert_close(traced(images()), small_net()(images()), rtol=1e-4, atol=1e-5)
    assert not [m for m in traced.modules() if isinstance(m, nn.BatchNorm2d)]


class BeforeAndTwice(nn.Module):
    """A BatchNorm before its conv, and one whose conv has another reader: neither can be folded."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2 = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv1(self.bn1(x))
        return self.bn2(x) + x


def test_what_cannot_be_folded_stays():
    net = BeforeAndTwice().eval()
    traced = trace(net)
    assert fold_batchnorm(traced) == []
    assert torch.equal(traced(images()), net(images()))


def test_masks_survive():
    traced = trace(small_net())
    prune(traced, 0.5)
    expected = traced(images())
    fold_batchnorm(traced)
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
    assert all((layer.masked_weight() == 0).float().mean() >= 0.5 for layer in layers(traced).values())


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
