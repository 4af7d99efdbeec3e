"""BatchNorms folded, or made depthwise convs: the network's function stays."""

import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph import layers, rebuild, spec_of, trace
from qat_tricks.graph.fold import batchnorms_to_convs, fold_batchnorm
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks import prune
from tests.helpers.nets import images, small_net


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
        self.linear, self.bn, self.head = (
            nn.Linear(8, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.linear(x.flatten(1, 2))
        return self.head(self.bn(x.flatten(0, 1)).reshape_as(x).mean(1))


def with_statistics(net):
    """The network in evaluation mode, its BatchNorms with statistics and gains that are not
    trivial.
    """
    torch.manual_seed(0)
    for batch in range(20):
        net(images(seed=batch))
    for module in net.modules():
        if isinstance(module, BATCHNORMS) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return net.eval()


@pytest.mark.parametrize(
    ("network", "pairs"),
    [(Concatenated, [("small", "bn"), ("large", "bn")]), (Rows, [("linear", "bn")])],
)
def test_a_batchnorm_behind_what_moves_channels_together_is_folded(network, pairs):
    net = with_statistics(network())
    expected = net(images())
    traced = trace(net)
    assert fold_batchnorm(traced) == pairs
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
    spec = spec_of(quantize(net, [images()]))
    again = rebuild(network(), spec)
    assert isinstance(again.bn, nn.Identity)
    assert {name for name, _ in again.named_parameters() if name.endswith("bias")} >= {
        f"{layer}.bias" for layer, _ in pairs
    }


class PreActivation(nn.Module):
    """BatchNorm, ReLU, conv, beside a branch that is a BatchNorm alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.conv = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.alone, self.first = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(1)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(self.first(x))
        x = self.conv(torch.relu(self.bn(x))) + x
        return self.head(torch.relu(x + self.alone(x)).mean((2, 3)))


def test_a_batchnorm_on_integers_becomes_a_depthwise_conv():
    net = with_statistics(PreActivation())
    expected = net(images())
    traced = trace(copy.deepcopy(net))
    assert fold_batchnorm(traced) == []
    assert batchnorms_to_convs(traced) == ["bn", "alone"]  # the image itself is on no grid yet
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(traced.first, nn.BatchNorm2d)
    prune(traced, 0.5)
    # which carry masks; a weight less would be a channel less
    assert layers(traced).keys() == {"stem", "conv", "head"}

    quantized = quantize(net, [images()])
    for name in ("bn", "alone"):
        layer = layers(quantized)[name]
        assert layer.input_quantizer
        weight = layer.weight.flatten()
        # one weight a channel fits
        torch.testing.assert_close(layer.effective_weight().flatten(), weight, rtol=1e-6, atol=0)
    again = rebuild(PreActivation(), spec_of(quantized))
    again.load_state_dict(quantized.state_dict(), strict=True)
    assert torch.equal(again.eval()(images()), quantized(images()))


def test_a_batchnorm_that_became_a_conv_is_trained_with_its_own_parameters():
    net = with_statistics(PreActivation())
    trained = dict(net.named_parameters())
    traced = trace(net)
    batchnorms_to_convs(traced)
    assert {name for name, p in traced.named_parameters() if p.requires_grad} == trained.keys()
    assert traced.bn.weight is trained["bn.weight"]
    assert traced.bn.bias is trained["bn.bias"]


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
