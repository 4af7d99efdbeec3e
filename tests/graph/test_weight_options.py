import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph import layers, trace
from qat_tricks.graph import weight_options as module
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.surgery import give_factors
from qat_tricks.graph.weight_options import weight_on_grid, weight_options
from qat_tricks.tricks import calibrate, fold_batchnorm, gptq, prune, quantize
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
    """A linear that is called twice, and whose weight and bias something else reads as well."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.other = nn.Linear(64, 64)
        self.other.weight, self.other.bias = self.shared.weight, self.shared.bias
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.shared(x.flatten(1)))
        return self.head(torch.relu(self.shared(self.other(x)))) + self.shared.weight.mean()


@torch.no_grad()
def test_what_else_reads_the_parameters_keeps_their_values():
    traced = quantized(Tied().eval())
    option = options_of(traced)["shared", 2]
    layer, other = layers(traced)["shared"], layers(traced)["other"]
    weight, bias = (parameter.clone() for parameter in (other.weight, other.bias))
    with weight_on_grid(traced, "shared", option).applied():
        assert not torch.equal(layer.weight, weight)
        assert not torch.equal(layer.bias, bias)
        assert torch.equal(other.weight, weight)
        assert torch.equal(other.bias, bias)
    assert layer.weight is other.weight
    assert layer.bias is other.bias


@pytest.mark.parametrize("folds", [True, False])
@torch.no_grad()
def test_factors_that_stand_beside_the_parameters_are_kept(folds):
    traced, x = quantized(folds=folds), images(16)
    layer = layers(traced)["block.conv1"]
    with float_mode(traced):
        before = traced(x)
        give_factors(layer)
        layer.weight_factor.fill_(4)
        layer.output_factor.fill_(3)
        owner = layer if layer.batchnorm is None else layer.batchnorm
        for parameter in (layer.bias,) if owner is layer else owner.parameters():
            parameter.div_(3)
        # A BatchNorm's gain has taken the factor of the outputs; its statistics are of the input.
        layer.weight.div_(4)
        torch.testing.assert_close(traced(x), before)
        option = options_of(traced)["block.conv1", 8]
        with weight_on_grid(traced, "block.conv1", option).applied():
            torch.testing.assert_close(traced(x), before, rtol=0.02, atol=0.02)
            torch.testing.assert_close(layer.deployed_weight(), option.integers * option.scale)


class Averaged(nn.Module):
    """A linear that reads the mean over all images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.gate = nn.Linear(6, 8)
        self.head = nn.Linear(6, 8)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.head(x.mean([2, 3])) + self.gate(x.mean([0, 2, 3]))


def test_a_linear_without_images_is_rounded_to_the_nearest():
    traced = trace(Averaged().eval())
    reference = copy.deepcopy(traced)
    calibrate(quantize(traced), [images(32)])
    assert options_of(traced)["gate", 2].shift is None
    weight = layers(traced)["gate"].weight.clone()
    gptq(traced, reference, [images(32)])
    assert torch.equal(layers(traced)["gate"].weight, weight)
    assert not torch.equal(layers(traced)["gate"].bias, reference.get_submodule("gate").bias)


class Random(nn.Module):
    """Draws random numbers in evaluation too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6, 8)

    def forward(self, x):
        x = nn.functional.dropout(torch.relu(self.conv(x)), training=True)
        return self.head(x.mean([2, 3]))


def test_the_random_state_is_kept():
    traced = quantized(Random().eval())
    before = torch.get_rng_state()
    options_of(traced)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_whose_squares_are_too_large_have_options_too():
    traced = quantized()
    options = options_of(traced, [images(16) * 1e18])
    assert all(option.integers.any() for option in options.values())
