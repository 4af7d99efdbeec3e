import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.random_state import random_state
from qat_tricks.graph.sharpness import sharpness
from tests.helpers.nets import small_net
from tests.helpers.networks import Residual, images, quantized

IMAGES = [torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


class Linear(nn.Module):
    """Its loss's Hessian does not depend on the labels."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("bias", [1.0, 1e-2, 1e-6, 1e-8, 0.0])
def test_it_is_the_largest_eigenvalue_of_the_hessian(bias):
    torch.manual_seed(0)
    network = Linear()
    with torch.no_grad():
        network.linear.bias.mul_(bias)
    images = torch.randn(32, 6, 1, 1) * torch.tensor([5.0, 1, 1, 1, 1, 1]).view(6, 1, 1)

    def loss(weight, bias):
        logits = F.linear(images.flatten(1), weight, bias)
        return F.cross_entropy(logits, torch.zeros(32, dtype=torch.long))

    values = (network.linear.weight.detach(), network.linear.bias.detach())
    blocks = torch.autograd.functional.hessian(loss, values)
    sizes = [value.numel() for value in values]
    hessian = torch.cat(
        [
            torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
            for row, n in zip(blocks, sizes, strict=True)
        ]
    )
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert sharpness(trace(network), [images]) == pytest.approx(largest, rel=0.05)


def test_weights_before_a_batchnorm_that_are_smaller_are_as_much_steeper():
    network = trace(small_net(0).train())
    before = sharpness(network, IMAGES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 4 and "head" not in name:
                parameter.mul_(0.1)
    assert sharpness(network, IMAGES) > 5 * before


def test_a_loss_without_curvature_is_flat():
    network = Linear()
    with torch.no_grad():
        network.linear.weight.zero_()
        network.linear.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    assert sharpness(trace(network), [torch.randn(8, 6, 1, 1)]) == 0.0


class Recomputed(nn.Module):
    """It computes its activations again in a backward pass, which must be a whole one."""

    def __init__(self):
        super().__init__()
        self.linear, self.recomputed = Linear(), _Checkpoint(nn.Linear(3, 3))

    def forward(self, x):
        return self.recomputed(self.linear(x))


class _Checkpoint(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=True)


def test_what_autograd_refuses_ends_in_one_line():
    network = trace(Recomputed(), ["recomputed"])
    with pytest.raises(QatTricksError, match=r"lr=auto cannot differentiate the network \("):
        sharpness(network, [torch.randn(8, 6, 1, 1)])


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (lambda: trace(small_net(0).train()), IMAGES),
        (lambda: quantized(Residual, fold=False).train(), [images(8)]),
    ],
)
def test_the_network_and_the_random_numbers_are_left_as_they_were(make, images):
    network = make()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = random_state()
    first = sharpness(network, images)
    assert random_state()["torch"].equal(state["torch"])
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.training
    assert sharpness(network, images) == first  # of the same images the same, to the last bit


def test_a_classifier_of_zeros_has_one_too():
    network = small_net(0).train()
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    assert sharpness(trace(network), IMAGES) > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda network: network.requires_grad_(False), "lr=auto needs gradients"),
        (lambda network: network.linear.weight.data.fill_(float("nan")), "lr=auto finds no curv"),
    ],
)
def test_errors(change, told):
    network = Linear()
    change(network)
    with pytest.raises(QatTricksError, match=told):
        sharpness(trace(network), [torch.randn(8, 6, 1, 1)])
