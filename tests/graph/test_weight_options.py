import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph import layers, trace
from qat_tricks.graph import weight_options as module
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.weight_options import weight_on_grid, weight_options
from qat_tricks.tricks import calibrate, fold_batchnorm, prune, quantize
from tests.helpers.nets import images, small_net

BITS = (2, 4, 8)


def quantized(net=None, *, folds=True):
    traced = trace(net or small_net())
    if folds:
        fold_batchnorm(traced)
    return calibrate(quantize(traced), [images(32)]).eval()


def options_of(traced, batches=None):
    names = [name for name, layer in layers(traced).items() if layer.weight_quantizer is not None]
    return weight_options(traced, batches or [images(64)], dict.fromkeys(names, BITS))


def outputs_of(traced, name, x):
    """What the layer ``name`` yields in a run of the network."""
    found = []
    hook = layers(traced)[name].register_forward_hook(lambda *args: found.append(args[2].clone()))
    traced(x)
    hook.remove()
    return found[0]


def by_channel(values, layer):
    return values.movedim(layer.output_axis, -1).reshape(-1, values.shape[layer.output_axis])


@pytest.mark.parametrize("folds", [True, False])
@torch.no_grad()
def test_an_option_errs_least_and_keeps_the_mean(folds):
    traced, x = quantized(folds=folds), images(64)
    options = options_of(traced, [x])
    assert options.keys() == {(name, bits) for name in layers(traced) for bits in BITS}
    with float_mode(traced):
        for (name, bits), option in options.items():
            layer = layers(traced)[name]
            assert option.bits == bits
            limit = 2 ** (bits - 1) - 1
            assert option.integers.abs().max() <= limit
            expected = by_channel(outputs_of(traced, name, x), layer)
            steps = (layer.deployed_weight() / option.scale).round().clamp(-limit, limit)
            nearest = layer.weight_to_deploy(steps * option.scale)
            with weight_on_grid(traced, name, option).applied():
                found = by_channel(outputs_of(traced, name, x), layer)
                layer.weight = nn.Parameter(nearest, requires_grad=False)
                plain = by_channel(outputs_of(traced, name, x), layer)
            assert ((found - expected).mean(0).abs() < 0.02 * expected.std(0) + 1e-5).all()
            error, of_plain = (
                (values - expected - (values - expected).mean(0)).square().mean()
                for values in (found, plain)
            )
            assert error <= 1.01 * of_plain + 1e-10


@torch.no_grad()
def test_a_weight_is_on_its_grid_in_the_block_only():
    traced, x = quantized(), images(4)
    option = options_of(traced)["right", 2]
    layer = layers(traced)["right"]
    weight, bias = layer.weight, layer.bias.clone()
    values = weight.clone()
    with float_mode(traced):
        before = traced(x)
        with weight_on_grid(traced, "right", option).applied():
            assert len(layer.effective_weight()[0].unique()) <= 3
            assert not torch.equal(layer.bias, bias)
            assert not torch.equal(traced(x), before)
        assert layer.weight is weight
        assert torch.equal(weight, values)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(traced(x), before)


def test_the_network_stays_as_it_is():
    traced = quantized()
    before = copy.deepcopy(traced.state_dict())
    options_of(traced)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())


def test_pruned_weights_stay_zero():
    traced = quantized()
    prune(traced, 0.5)
    for (name, _), option in options_of(traced).items():
        mask = layers(traced)[name].weight_mask
        assert (option.integers[mask == 0] == 0).all()
        assert option.integers.any()


@torch.no_grad()
def test_weights_with_too_many_inputs_are_rounded_to_the_nearest(monkeypatch):
    monkeypatch.setattr(module, "MOST_INPUTS", 1)
    traced = quantized()
    for (name, bits), option in options_of(traced).items():
        weight, limit = layers(traced)[name].deployed_weight(), 2 ** (bits - 1) - 1
        steps = (weight / option.scale).clamp(-limit, limit)
        assert (option.integers - steps).abs().max() <= 0.5001
        assert option.shift is not None


class Tied(nn.Module):
    """A linear called twice, without a bias, whose weight something else reads as well."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.shared(x.flatten(1)))
        return self.head(torch.relu(self.shared(x))) + self.shared.weight.mean()


@torch.no_grad()
def test_what_else_reads_the_weight_keeps_its_values():
    traced = quantized(Tied().eval())
    option = options_of(traced)["shared", 2]
    assert option.shift is None
    own = layers(traced)["shared"].weight
    values = own.clone()
    with weight_on_grid(traced, "shared", option).applied():
        assert torch.equal(own, values)
