"""The published networks, and the shortcut of the weights in circulation."""

import pytest
import torch
from torch import nn

from qat_tricks.models.build import build_model


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_cifar_resnets_have_the_published_size_and_trace(name, parameters):
    net = build_model(name, num_classes=10).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    traced = torch.fx.symbolic_trace(net)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(traced(images), net(images))
    assert net(images).shape == (2, 10)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(calls) == len(set(calls)), "a module is used twice"


def test_cifar_shortcut_takes_every_second_pixel_and_pads_both_sides():
    block = build_model("resnet20", num_classes=10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    images = torch.rand(1, 16, 8, 8) + 0.1
    out = block(images)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0
    assert out[:, 24:].abs().sum() == 0
