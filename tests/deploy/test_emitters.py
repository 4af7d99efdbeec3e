"""Modules that stand for QuantizeLinear and DequantizeLinear hold the simulation's integers."""

import pytest
import torch

from qat_tricks.deploy.emitters import EmitActivation, EmitLayer
from qat_tricks.deploy.layouts import LAYOUTS
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.numerics import ActivationQuantizer, Scheme
from tests.helpers import networks

PLAIN, TENSORRT = LAYOUTS["onnxruntime"], LAYOUTS["tensorrt"]


def grid(activation=None, **scheme):
    quantizer = ActivationQuantizer(Scheme(**scheme), activation=activation)
    quantizer.set_range(-1.0, 2.0)
    return quantizer


@pytest.mark.parametrize(
    ("quantizer", "clips"),
    [
        (grid(), False),  # saturating gives 0..255
        (grid("relu"), False),  # whose grid begins at 0.0
        (grid(bits=4), True),
        (grid("relu", signed=True, symmetric=True), True),  # whose grid reaches below 0.0
        (grid(signed=True, symmetric=True), False),
    ],
    ids=["8 bits", "relu", "4 bits", "symmetric relu", "symmetric"],
)
def test_a_range_is_clipped_where_saturating_does_not_give_it(quantizer, clips):
    emitter = EmitActivation("q", quantizer, PLAIN)
    assert emitter.clips is clips
    assert (int(emitter.qmin), int(emitter.qmax)) == quantizer.integers
    assert emitter.zero_point.dtype == (torch.int8 if quantizer.scheme.signed else torch.uint8)
    assert not EmitActivation("q", quantizer, TENSORRT).clips


def test_what_cannot_be_quantized_is_named():
    with pytest.raises(QatTricksError, match='quantizer "q" has no range yet'):
        EmitActivation("q", ActivationQuantizer(Scheme()), PLAIN)
    with pytest.raises(QatTricksError, match=r'"q" is given torch\.int64'):
        EmitActivation("q", grid(), PLAIN)(torch.arange(3))


@pytest.mark.parametrize("kind", [networks.Flat, networks.SqueezeExcite])
def test_a_layers_integers_times_their_scales_are_what_it_computes_with(kind):
    for name, layer in layers(networks.quantized(kind)).items():
        before = EmitActivation(name, layer.input_quantizer[0], PLAIN)
        integers, floats = EmitLayer(layer, before, PLAIN), EmitLayer(layer, before, TENSORRT)
        scale = integers.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1))
        assert integers.weight.dtype == torch.int8
        torch.testing.assert_close(integers.weight * scale, layer.effective_weight())
        assert integers.bias.dtype == torch.int32
        bias = integers.bias * integers.bias_scale
        torch.testing.assert_close(bias, layer.effective_bias())
        torch.testing.assert_close(floats.bias, bias)
        assert floats.bias.is_floating_point()
