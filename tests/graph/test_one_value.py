"""In evaluation a quantized network has one value, whether gradients are enabled or not."""

import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph.integer_ops import Kernel
from qat_tricks.graph.layers import Layer, activation_quantizers
from qat_tricks.recipes.ptq import quantize
from tests.helpers.nets import images, small_net
from tests.helpers.networks import Concatenated, Residual, SqueezeExcite, Tokens, seeded
from tests.helpers.networks import images as large_images
from tests.helpers.structures import STRUCTURES, built, inputs

NETWORKS = {
    "small_net": lambda: (small_net(), images(64)),
    **{
        kind.__name__: lambda kind=kind: (seeded(kind), large_images(16))
        for kind in (Residual, SqueezeExcite, Concatenated, Tokens)
    },
    **{
        name: lambda name=name: (built(STRUCTURES[name][0]), inputs(STRUCTURES[name][1], 64))
        for name in ("conv_called_twice", "zero_pad", "residual_before_relu", "mean_keepdim",
                     "avg_pool_ceil", "linear_bn1d", "layer_scale")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_with_gradients_as_without(name):
    net, x = NETWORKS[name]()
    traced = quantize(net, [x])
    with torch.no_grad():
        expected = traced(x)
    with_weights = traced(x)
    assert with_weights.requires_grad
    assert torch.equal(with_weights.detach(), expected)
    x.requires_grad_()
    assert torch.equal(traced(x).detach(), expected)
    # a network whose parameters are frozen has no gradient, and pays for none
    for parameter in traced.parameters():
        parameter.requires_grad_(False)
    frozen = traced(x.detach())
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


def in_floats(traced):
    """A copy whose layers and kernels compute on fake-quantized values, as in training."""
    traced = copy.deepcopy(traced)
    for module in traced.modules():
        if isinstance(module, Layer):
            module.forward = lambda input, call=0, m=module: m._compute(
                input, m.effective_weight(), m.effective_bias(m.calls[call][0])
            )
        elif isinstance(module, Kernel):
            module.__class__ = type("InFloat", (type(module),), {"is_exact": False})
    return traced


def gradients(traced, x):
    traced(x).log_softmax(1)[:, 0].sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in traced.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_fake_quantized_values(name):
    net, x = NETWORKS[name]()
    traced = quantize(net, [x])
    for quantizer in activation_quantizers(traced).values():
        quantizer.scale.requires_grad_()
    simulated = in_floats(traced)
    expected, found = gradients(simulated, x), gradients(traced, x)
    assert found.keys() == expected.keys()
    # A value at a rounding boundary that moves by a step adds a step to the gradient of a scale.
    same = torch.allclose(simulated(x), traced(x), atol=1e-5)
    for key, gradient in found.items():
        if same or not key.endswith("scale"):
            error = (gradient - expected[key]).norm() / expected[key].norm().clamp_min(1e-6)
            assert error < 0.05, key


def test_under_autocast_and_as_a_copy():
    traced = quantize(small_net(), [images(64)])
    for network in (traced, copy.deepcopy(traced)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                expected = network(images())
            found = network(images())
            assert torch.equal(found.detach(), expected)
            found.sum().backward()
        stem = network.get_submodule("stem.0")
        assert stem.weight.grad.abs().sum() > 0


def test_compiled():
    traced = quantize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
                      [images(64)])  # fmt: skip
    expected = gradients(copy.deepcopy(traced), images())
    compiled = copy.deepcopy(traced)
    found = torch.compile(compiled, backend="aot_eager")(images())
    with torch.no_grad():
        assert torch.equal(found.detach(), traced(images()))
    found.log_softmax(1)[:, 0].sum().backward()
    for name, parameter in compiled.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])
