"""What users do to a BatchNorm by its name is done to the one that the layer has now."""

import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph import as_layer, layers, rebuild, spec_of, trace
from qat_tricks.tricks import fold_batchnorm, quantize, restore_batchnorm
from tests.helpers.nets import images, small_net


def restored():
    traced = trace(small_net())
    fold_batchnorm(traced)
    for name in ("stem.0", "block.conv1", "block.conv2", "depthwise.0"):
        as_layer(traced.get_submodule(name))
    restore_batchnorm(traced, [images(32)])
    return traced.train()


def kept():
    return quantize(trace(small_net())).train()


@pytest.mark.parametrize("make", [restored, kept, lambda: copy.deepcopy(restored())])
def test_it_hands_on_what_is_done_to_it(make):
    network = make()
    by_name, own = network.block.bn1, network.block.conv1.batchnorm
    assert by_name.weight is own.weight
    assert by_name.running_mean is own.running_mean
    by_name.momentum = 0.3
    by_name.eval()
    by_name.requires_grad_(False)
    assert own.momentum == 0.3
    assert not own.training
    assert not own.weight.requires_grad
    assert network.train().block.conv1.batchnorm.training


def test_it_is_no_second_batchnorm():
    network = restored()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert not any(key.startswith("block.bn1") for key in network.state_dict())


def test_without_a_batchnorm_it_is_an_identity():
    traced = trace(small_net())
    fold_batchnorm(traced)
    assert isinstance(traced.block.bn1, nn.Identity)
    traced.block.bn1.eval()
    assert not hasattr(traced.block.bn1, "running_mean")


def test_a_rebuilt_network_has_it_too():
    network = restored()
    again = rebuild(small_net(seed=4), spec_of(network))
    assert again.block.bn1.weight is layers(again)["block.conv1"].batchnorm.weight


def test_the_users_own_batchnorm_is_given_back():
    net = small_net()
    gains = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    traced = trace(net)
    fold_batchnorm(traced)
    for name in ("stem.0", "block.conv1", "block.conv2", "depthwise.0"):
        as_layer(traced.get_submodule(name))
    restore_batchnorm(traced, [images(32)])
    now = {id(p) for p in traced.parameters()}
    assert all(id(gain) in now for gain in gains)
    traced.train()(images(32)).square().sum().backward()
    assert all(torch.count_nonzero(gain.grad) for gain in gains)
