import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.tricks import equalize, fold_batchnorm
from qat_tricks.tricks.equalize import find_pairs
from tests.helpers.nets import images, small_net


class Chain(nn.Sequential):
    """Pointwise, depthwise, grouped and linear layers with channels of very different ranges
    between them.
    """

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 8, 1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(12 * 9, 5),
        )  # fmt: skip
        with torch.no_grad():
            for layer in (self[0], self[2], self[5]):
                layer.weight.mul_(torch.logspace(-2, 2, len(layer.weight)).view(-1, 1, 1, 1))


def _ranges(first, second):
    return first.weight.abs().flatten(1).amax(1), second.weight.abs().flatten(1).amax(1)


def test_function_stays():
    traced = trace(Chain().eval())
    pairs = equalize(traced)
    assert [(p.first, p.second, p.flat) for p in pairs] == [
        ("0", "2", 1),
        ("2", "5", 1),
        ("5", "8", 9),
    ]
    torch.testing.assert_close(traced(images()), Chain()(images()), rtol=1e-4, atol=1e-4)


def test_ranges_on_both_sides_become_equal():
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 2, 8).view(-1, 1, 1, 1))
    equalize(trace(net))
    torch.testing.assert_close(*_ranges(net[0], net[2]), rtol=1e-2, atol=1e-4)


def test_relu6_is_left_alone_unless_uncapped():
    net = small_net()
    traced = trace(net)
    fold_batchnorm(traced)
    assert not [pair for pair in find_pairs(traced) if pair.first == "depthwise.0"]
    chain = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    assert find_pairs(trace(chain)) == []
    assert len(equalize(trace(chain), uncap=True)) == 1


def test_absorbed_bias_leaves_the_function_where_inputs_exceed_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[1].bias.fill_(20.0)  # twenty standard deviations above the ReLU's kink
    x = 0.3 * images()
    expected = net(x)
    traced = trace(net)
    fold_batchnorm(traced)
    bias = net[0].bias.clone()
    equalize(traced)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
    assert net[0].bias.sum() < 0.5 * bias.sum()


def test_iterations_below_one_are_refused():
    with pytest.raises(QatTricksError, match="iterations=0"):
        equalize(trace(Chain()), iterations=0)


def test_channels_before_a_depthwise_conv_are_scaled_up_to_the_cap():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8))
    with torch.no_grad():
        net[0].weight.copy_(torch.logspace(-1, 1.5, 8).view(-1, 1, 1, 1))
        net[0].bias.fill_(0.05)
    expected, before = net(images(64)), net[1](net[0](images(64))).amax((0, 2, 3))
    equalize(trace(net), [images(64)])
    after = net[1](net[0](images(64))).amax((0, 2, 3))
    torch.testing.assert_close(net(images(64)), expected, rtol=1e-4, atol=1e-5)
    assert (after >= before - 1e-5).all()
    assert after.min() > 2.5  # every channel now uses much of the grid
    assert before.min() < 1


def test_a_channel_that_few_images_excite_is_given_room():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU6(), nn.Conv2d(2, 2, 3, groups=2))
    with torch.no_grad():
        net[0].weight.fill_(0.1)
        # the second channel sees little more than outliers
        net[0].bias.copy_(torch.tensor([0.0, -0.1]))
    few, many = images(64), images(512, seed=7)
    expected = net(many)
    equalize(trace(net), [few])
    torch.testing.assert_close(net(many), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "last",
    [nn.Linear(8, 5), nn.Sequential(nn.Flatten(), nn.Linear(64, 5))],
    ids=["tokens", "flattened"],
)
def test_channels_of_linears_on_tokens_are_the_last_dimension(last):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), last).eval()
    # as many tokens as channels: to mistake one for the other would go unseen
    tokens = torch.randn(16, 8, 6)
    expected, before = net(tokens).detach(), torch.relu(net[0](tokens)).amax((0, 1)).detach()
    pairs = equalize(trace(net), [tokens])
    torch.testing.assert_close(net(tokens), expected, rtol=1e-4, atol=1e-5)
    assert [(pair.first, pair.second) for pair in pairs] == (
        [("0", "2")] if isinstance(last, nn.Linear) else []
    )
    if pairs:
        after = torch.relu(net[0](tokens)).amax((0, 1)).detach()
        by_input = net[2].weight.abs() / net[2].weight.abs().amax(1, keepdim=True)
        torch.testing.assert_close(after / after.max(), by_input.amax(0), rtol=1e-2, atol=1e-2)
        assert float(before.max() / before.min()) > float(after.max() / after.min())


class Pooled(nn.Module):
    """Two layers with a pool between them that is called as a function or as a module."""

    def __init__(self, pool):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.pool, self.second = pool, nn.Conv2d(4, 3, 1)
        nn.init.constant_(self.norm.bias, 5.0)  # far above the ReLU's zero: it is absorbed

    def forward(self, x):
        return self.second(self.pool(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        lambda x: F.max_pool2d(x, 2, padding=1),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.adaptive_avg_pool2d(x, 2),
    ],
)
def test_pools_are_passed_however_they_are_called(pool):
    net = Pooled(pool).eval()
    expected = net(images())
    traced = trace(net)
    fold_batchnorm(traced)
    before = net.first.bias.clone()
    assert len(equalize(traced)) == 1
    assert not torch.equal(net.first.bias, before)
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)])
def test_a_pool_that_averages_zeros_of_the_border_is_not_passed(pool):
    """Through it a bias cannot be absorbed: at the border less of it arrives."""
    net = Pooled(pool).eval()
    expected = net(images())
    traced = trace(net)
    fold_batchnorm(traced)
    assert equalize(traced) == []
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-4)


def far_above(*between):
    """Two layers, a BatchNorm far above the ReLU's zero, and what a test puts between.

    Returns:
        The network, the same traced and folded, and the first layer of that.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), *between, nn.Conv2d(4, 3, 1)
    ).eval()
    nn.init.constant_(net[1].bias, 4.0)
    traced = trace(copy.deepcopy(net))
    fold_batchnorm(traced)
    return net, traced, traced.get_submodule("0")


def test_with_images_no_value_is_lost_below_an_absorbed_bias():
    net, traced, _ = far_above()
    many = 3 * images(64)  # some values lie below mean - 3 * std
    expected = net(many)
    equalize(traced, [many])
    torch.testing.assert_close(traced(many), expected, rtol=1e-4, atol=1e-4)
    _, traced, _ = far_above()
    equalize(traced)
    assert not torch.allclose(traced(many), expected, rtol=1e-4, atol=1e-4)
    _, traced, first = far_above()
    ratio = first.bias / first.weight.flatten()
    equalize(traced, [0.1 * images(64)])
    assert (first.bias / first.weight.flatten() / ratio).min() < 0.9


def test_a_bias_is_not_absorbed_through_dropout():
    """In training its zeros would lack the shift."""
    _, traced, first = far_above(nn.Dropout(0.5))
    before = first.bias / first.weight.flatten()
    assert len(equalize(traced)) == 1
    torch.testing.assert_close(first.bias / first.weight.flatten(), before)


def test_a_shared_weight_before_a_relu6_is_not_scaled_up():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), conv, nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=4), conv, nn.ReLU6(),
        nn.Conv2d(4, 4, 3, groups=4),
    ).eval()  # fmt: skip
    expected = net(images())
    traced = trace(net)
    equalize(traced, [images()])
    torch.testing.assert_close(traced(images()), expected, rtol=1e-4, atol=1e-5)
