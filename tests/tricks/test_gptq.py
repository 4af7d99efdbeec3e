import copy
import importlib

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import calibrate, correct_weights, fold_batchnorm, gptq, prune, quantize
from tests.helpers.nets import images, small_net

# The package has the function under the module's name.
gptq_module = importlib.import_module("qat_tricks.tricks.gptq")


def _coarse(weight_bits=3, *, folds=True, net=None):
    traced = trace(net or small_net())
    if folds:
        fold_batchnorm(traced)
    traced.eval()
    reference = copy.deepcopy(traced)
    quantize(traced, weight_bits=weight_bits, first_last_bits=None)
    return calibrate(traced, [images(64)]), reference


@torch.no_grad()
def _error(traced, reference, x):
    return float((traced.eval()(x) - reference(x)).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_images_not_seen_err_less_than_with_weights_rounded_to_the_nearest(bits):
    traced, reference = _coarse(bits)
    before = _error(traced, reference, images(64, seed=5))
    gptq(traced, reference, list(images(64).split(16)))
    assert _error(traced, reference, images(64, seed=5)) < 0.4 * before


def test_it_errs_less_than_corrected_weights():
    traced, reference = _coarse(4)
    corrected = correct_weights(copy.deepcopy(traced))
    gptq(traced, reference, [images(64)])
    x = images(64, seed=5)
    assert _error(traced, reference, x) < 0.5 * _error(corrected, reference, x)


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_lie_on_the_grid_of_their_scale(bits, folds):
    traced, reference = _coarse(bits, folds=folds)
    gptq(traced, reference, [images(32)])
    for layer in layers(traced).values():
        weight = layer.deployed_weight()
        steps = weight / layer.weight_scale(weight)
        assert (steps - steps.round()).abs().max() < 1e-3
        assert steps.abs().max() < layer.weight_quantizer.scheme.qmax + 0.01
        # Rounding again, as training and exporters do, changes nothing.
        torch.testing.assert_close(layer.effective_weight(), weight, rtol=1e-5, atol=1e-7)


def test_errors_of_layers_before_are_taken_up():
    traced, reference = _coarse(8)
    first = traced.get_submodule("stem.0")
    with torch.no_grad():
        first.weight.mul_(torch.linspace(0.7, 1.4, 8).view(-1, 1, 1, 1))
        # The depthwise conv comes after a block that mixes these channels.
    before = _error(traced, reference, images(64, seed=5))
    gptq(traced, reference, [images(64)])
    assert _error(traced, reference, images(64, seed=5)) < 0.1 * before


@pytest.mark.parametrize("bits", [4, 8])
def test_pruned_weights_stay_zero_and_the_others_take_them_up(bits):
    traced, reference = _coarse(bits)
    prune(traced, 0.5)
    masks = {name: layer.weight_mask.clone() for name, layer in layers(traced).items()}
    before = _error(traced, reference, images(64, seed=5))
    gptq(traced, reference, [images(64)])
    for name, layer in layers(traced).items():
        assert (layer.effective_weight()[masks[name] == 0] == 0).all()
        assert (layer.weight[masks[name] == 0] == 0).all()
        assert torch.equal(layer.weight_mask, masks[name])
    assert _error(traced, reference, images(64, seed=5)) < 0.5 * before


@torch.no_grad()
def test_means_of_the_output_match_float_on_the_images_seen():
    traced, reference = _coarse()
    x = images(64)
    traced.get_submodule("head").bias += torch.linspace(-1, 1, 10)
    gptq(traced, reference, [x])
    assert (traced(x).mean(0) - reference(x).mean(0)).abs().max() < 1e-3


def _switched(count, seed):
    """Images of eight patterns, and bright noise for which ``_switching_net`` yields 0."""
    patterns = torch.randn(8, 64, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator) @ patterns
    noise = torch.randn(count, 64, generator=generator)
    bright = torch.arange(count)[:, None] % 2 == 1
    return torch.where(bright, 2 + 3 * noise, x + 0.05 * noise).view(count, 1, 8, 8)


def _switching_net(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), activation(), nn.Linear(24, 10))
    with torch.no_grad():
        net[1].weight.copy_(0.1 * torch.randn(24, 64) - 0.1)
    return net.eval()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_sums_that_the_activation_function_drops_hardly_count(activation, monkeypatch):
    errors = []
    for most in (gptq_module.MOST_PRODUCTS, 0):  # 0: all sums count alike
        monkeypatch.setattr(gptq_module, "MOST_PRODUCTS", most)
        traced = trace(_switching_net(activation))
        reference = copy.deepcopy(traced)
        quantize(traced, first_last_bits=8, overrides={"1": {"weight_bits": 4}})
        calibrate(traced, [_switched(256, 0)])
        gptq(traced, reference, [_switched(256, 0)])
        errors.append(_error(traced, reference, _switched(64, 5)[::2]))
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_channel_of_zeros_on_small_inputs_stays_finite(bits, size):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    net += nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
    x = size * images(64)
    with torch.no_grad():
        for layer in (net[0], net[2], net[5]):
            layer.weight[1], layer.bias[:] = 0.0, 0.0
    traced, reference = (trace(copy.deepcopy(net).eval()) for _ in range(2))
    calibrate(quantize(traced, weight_bits=bits, first_last_bits=None), [x])
    gptq(traced, reference, [x])
    for layer in layers(traced).values():
        assert layer.weight.isfinite().all()
        assert (layer.weight[1] == 0).all()
    assert _error(traced, reference, x) < 0.01 * float(reference(x).square().mean())


@pytest.mark.parametrize("entries", [1, 3 * 81])
def test_groups_of_a_conv_are_fitted_apart_where_they_are_large(entries, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 12, 3, groups=2), nn.ReLU())
    results = []
    for most in (gptq_module.MOST_ENTRIES, entries):
        monkeypatch.setattr(gptq_module, "MOST_ENTRIES", most)
        traced, reference = (trace(copy.deepcopy(net).eval()) for _ in range(2))
        calibrate(quantize(traced, weight_bits=4, first_last_bits=None), [images(64)])
        before = _error(traced, reference, images(64, seed=5))
        gptq(traced, reference, [images(64)])
        results.append(_error(traced, reference, images(64, seed=5)))
    assert max(results) < 0.6 * before
    assert abs(results[0] - results[1]) < 0.2 * before


@torch.no_grad()
def test_channels_that_are_fitted_apart_are_those_fitted_together(monkeypatch):
    results = []
    for entries in (gptq_module.MOST_ENTRIES, 64 * 64):  # a channel at once
        monkeypatch.setattr(gptq_module, "MOST_ENTRIES", entries)
        traced = trace(_switching_net(nn.ReLU))
        reference = copy.deepcopy(traced)
        calibrate(quantize(traced, weight_bits=4, first_last_bits=None), [_switched(256, 0)])
        gptq(traced, reference, [_switched(256, 0)])
        results.append(traced(_switched(64, 5)))
    # Each part chooses its own ridge.
    error = (results[0] - results[1]).square().mean() / results[0].var()
    assert error < 0.01


def test_it_comes_again_to_the_bit():
    results = []
    for _ in range(2):
        traced, reference = _coarse()
        gptq(traced, reference, [images(32)])
        results.append(traced.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_channel_of_zeros_stays_one():
    net = small_net()
    with torch.no_grad():
        net.left.weight[2] = 0.0
        net.block.bn1.weight[3] = 0.0
        net.block.bn1.bias[3] = 0.0
    for folds in (True, False):
        traced, reference = _coarse(4, folds=folds, net=copy.deepcopy(net))
        gptq(traced, reference, [images(32)])
        assert all(value.isfinite().all() for value in traced.state_dict().values())
        assert (traced.get_submodule("left").effective_weight()[2].abs() < 1e-3).all()


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.shared(torch.relu(self.shared(torch.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


def test_a_layer_that_is_called_twice_is_left_as_it_is():
    traced, reference = _coarse(4, net=_Twice().eval())
    before = copy.deepcopy(traced.state_dict())
    gptq(traced, reference, [images(32)])
    changed = {
        key for key, value in traced.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {"first.weight", "head.weight"} <= changed
    assert not any(key.startswith("shared") for key in changed)


def test_of_a_layer_with_too_many_inputs_only_the_bias_is_fitted(monkeypatch):
    traced, reference = _coarse(4)
    widest = max(layer.weight[0].numel() for layer in layers(traced).values())
    monkeypatch.setattr(gptq_module, "MOST_INPUTS", widest - 1)
    before = {name: layer.weight.clone() for name, layer in layers(traced).items()}
    biases = {name: layer.bias.clone() for name, layer in layers(traced).items()}
    gptq(traced, reference, [images(32)])
    for name, layer in layers(traced).items():
        is_wide = layer.weight[0].numel() == widest
        assert torch.equal(layer.weight, before[name]) == is_wide
        assert not torch.equal(layer.bias, biases[name])


def test_the_trick_is_part_of_a_recipe():
    changes = [f"~stages.ptq.tricks.{name}" for name in ("correct_weights", "correct_bias")]
    net, batches = small_net(), [images(64)]
    settings = ["stages.ptq.tricks.quantize.weight_bits=4", *changes]
    plain = qat_tricks.quantize(net, batches, "int8_ptq", settings)
    rounded = qat_tricks.quantize(
        net, batches, "int8_ptq", [*settings, "+trick@stages.ptq.tricks=gptq"]
    )
    assert rounded.meta["qat_tricks"]["applied"][-1] == "gptq"
    x = images(64, seed=5)
    assert _error(rounded, net, x) < 0.5 * _error(plain, net, x)


def test_what_is_missing_is_named():
    traced, reference = _coarse()
    with pytest.raises(QatTricksError, match="no images"):
        gptq(traced, reference, [])
    with pytest.raises(QatTricksError, match="reference has no"):
        gptq(traced, trace(nn.Identity()), [images()])
    with pytest.raises(QatTricksError, match="quantize the network first"):
        gptq(reference, reference, [images()])
