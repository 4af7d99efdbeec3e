"""A network's values and spec, put back."""

from dataclasses import replace

import torch

from qat_tricks.graph import trace
from qat_tricks.graph.layers import layers
from qat_tricks.graph.snapshot import Snapshot, owner_of
from qat_tricks.graph.spec import spec_of
from qat_tricks.tricks import calibrate, fold_batchnorm, quantize
from tests.helpers.nets import images, small_net


def _calibrated():
    traced = trace(small_net())
    fold_batchnorm(traced)
    return calibrate(quantize(traced), [images(16)])


def test_values_ranges_new_scales_and_the_spec_are_put_back():
    traced = _calibrated()
    x = images(8, seed=2)
    with torch.no_grad():
        expected = traced.eval()(x)
        snapshot = Snapshot(traced)
        calibrate(traced, [images(16) * 9])
        name, layer = next(iter(layers(traced).items()))
        layer.weight_quantizer.own_scale(layer.weight)
        spec_of(traced)["layers"][name]["scale"] = True
        layer.weight.mul_(2)
        assert not torch.equal(traced(x), expected)
        assert name in snapshot.changed()
        snapshot.restore()
        assert torch.equal(traced(x), expected)
    assert layer.weight_quantizer.scale is None
    assert not spec_of(traced)["layers"][name].get("scale")
    assert snapshot.changed() == []


def test_a_scale_that_was_taken_away_comes_back():
    traced = quantize(trace(small_net()), weight_bits=4, first_last_bits=None)
    calibrate(traced, [images(16)])
    snapshot = Snapshot(traced)
    quantizer = next(iter(layers(traced).values())).weight_quantizer
    before = quantizer.scale.clone()
    quantizer.scale = None
    snapshot.restore()
    assert torch.equal(quantizer.scale, before)


def test_bits_masks_and_what_trains_are_put_back():
    traced = _calibrated()
    snapshot = Snapshot(traced)
    layer = next(iter(layers(traced).values()))
    scheme = layer.weight_quantizer.scheme
    layer.weight_quantizer.scheme = replace(scheme, bits=2)
    layer.weight_mask = torch.zeros_like(layer.weight)
    layer.weight.requires_grad_(False)
    snapshot.restore()
    assert layer.weight_quantizer.scheme == scheme
    assert layer.weight_mask is None
    assert layer.weight.requires_grad


def test_only_the_layers_named_are_put_back():
    traced = _calibrated()
    snapshot = Snapshot(traced)
    first, *_, last = layers(traced).values()
    names = list(layers(traced))
    with torch.no_grad():
        first.bias.add_(1)
        last.bias.add_(1)
    snapshot.restore([names[0]])
    assert snapshot.changed() == [names[-1]]


def test_owners_are_layers_and_quantizers():
    assert owner_of("a.conv.weight") == owner_of("a.conv.batchnorm.bias") == "a.conv"
    assert owner_of("a.conv.weight_quantizer.scale") == "a.conv"
    assert owner_of("activation_quantizers.relu.zero_point") == "activation_quantizers.relu"
