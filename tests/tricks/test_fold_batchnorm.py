import pytest
import torch
from nets import images, small_net
from torch import nn

from qat_tricks.graph import layers, rebuild, spec_of, trace
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


class Concatenated(nn.Module):
    """A BatchNorm behind a concat of convs, as in mixed depthwise convs."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 5, 3, padding=1, bias=False)
        self.bn, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.cat([self.small(x), self.large(x)], dim=1)
        return self.head(torch.relu(self.bn(x)).mean((2, 3)))


class Rows(nn.Module):
    """A BatchNorm of a linear's rows made one matrix, as LeViT has it."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.linear(x.flatten(1, 2))
        return self.head(self.bn(x.flatten(0, 1)).reshape_as(x).mean(1))


@pytest.mark.parametrize(
    ("network", "pairs"),
    [(Concatenated, [("small", "bn"), ("large", "bn")]), (Rows, [("linear", "bn")])],
)
def test_a_batchnorm_behind_what_moves_channels_together_is_folded(network, pairs):
    torch.manual_seed(0)
    net = network()
    for batch in range(20):  # statistics that are not those of no images
        net(images(seed=batch))
    net.eval()
    with torch.no_grad():
        net.bn.weight.uniform_(0.5, 2)
        net.bn.bias.uniform_(-1, 1)
    expected = net(images())
    traced = trace(net)
    assert fold_batchnorm(traced) == pairs
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
    spec = spec_of(quantize(net, [images()]))
    again = rebuild(network(), spec)
    assert not hasattr(again, "bn")
    assert {name for name, _ in again.named_parameters() if name.endswith("bias")} >= {f"{layer}.bias" for layer, _ in pairs}


def test_a_batchnorm_of_other_channels_stays():
    class Positions(nn.Module):  # its channels are the rows
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(8, 6), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.bn(self.linear(x.flatten(1, 2)))

    net = Positions().eval()
    traced = trace(net)
    assert fold_batchnorm(traced) == []
    assert torch.equal(traced(images()), net(images()))
