import copy
import sys

import pytest
import torch
from torch.nn import functional

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.blocks import GRANULARITIES
from qat_tricks.graph.fold import attach_batchnorms
from qat_tricks.graph.layers import layers
from qat_tricks.tricks import (
    LearnedRounding,
    calibrate,
    fold_batchnorm,
    learned_rounding,
    quantize,
)
from tests.helpers.nets import small_net
from tests.helpers.networks import ShortcutOfZeros, SqueezeExcite, quantized, seeded
from tests.helpers.networks import images as large_images
from tests.helpers.structures import STRUCTURES, built, inputs

# Larger steps than by default, since they are few.
FEW = {"iterations": 60, "bias_lr": 0.02}


def images(count=96, seed=1):
    """Images whose neighbouring pixels are alike.

    On noise, whose pixels are independent, nothing is better than the nearest step.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(count, 1, size, size, generator=generator) for size in (2, 8))
    return functional.interpolate(coarse, size=(8, 8), mode="bilinear") + 0.1 * fine


def _coarse(fold=True, **settings):
    traced = trace(small_net())
    if fold:
        fold_batchnorm(traced)
    attach_batchnorms(traced)
    reference = copy.deepcopy(traced)
    quantize(traced, **{"weight_bits": 3, "activation_bits": 4, **settings})
    return calibrate(traced, [images(64)]), reference


@torch.no_grad()
def _error(traced, reference):
    """The squared error of the logits on images that were not seen."""
    x = images(256, seed=5)
    return (traced.eval()(x) - reference.eval()(x)).square().mean().item()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_images_not_seen_get_better(granularity):
    traced, reference = _coarse(weight_bits=2, activation_bits=6)
    before = _error(traced, reference)
    learned_rounding(traced, reference, [images(96)], granularity=granularity, **FEW)
    assert _error(traced, reference) < 0.5 * before


def test_rounding_alone_helps_and_dropping_can_be_left_out():
    traced, reference = _coarse(weight_bits=2, activation_bits=8)
    before = _error(traced, reference)
    learned_rounding(traced, reference, [images(96)], **{**FEW, "bias_lr": 0.0, "drop": 0.0})
    assert _error(traced, reference) < 0.8 * before


def test_weights_lie_on_their_grid_beside_the_float_ones_and_zeros_stay():
    traced, reference = _coarse()
    pruned = layers(traced)["block.conv1"]
    pruned.weight_mask = (torch.rand(pruned.weight.shape) > 0.5).float()
    learned_rounding(traced, reference, [images(96)], **FEW)
    for name, layer in layers(traced).items():
        if layer.weight_quantizer.scale is None:
            continue
        scale = layer.weight_scale(layer.deployed_weight())
        steps = layer.masked_weight() / scale
        assert torch.equal(steps.round() * scale, layer.masked_weight())
        exact = reference.get_submodule(name).weight / scale
        inside = (exact.abs() < 3) & (layer.masked_weight() != 0)
        assert ((steps.round() - exact).abs()[inside] < 1).all()
    assert (pruned.weight[pruned.weight_mask == 0] == 0).all()


def test_only_what_is_learned_changes():
    traced, reference = _coarse(weight_bits=2)
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    traced.train()
    trains = [name for name, parameter in traced.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    with torch.inference_mode():
        learned_rounding(traced, reference, [images(40), images(50, seed=2)], **FEW)
    assert traced.training
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, p in traced.named_parameters() if p.requires_grad] == trains
    assert all(parameter.grad is None for parameter in traced.parameters())
    changed = {
        key for key, value in traced.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {"block.conv1.weight", "left.weight", "left.bias"} <= changed
    assert not {"stem.0.weight", "head.weight"} & changed  # of 8 bits
    assert not any(key.endswith("zero_point") for key in changed)
    assert "activation_quantizers.x.scale" not in changed
    traced.eval()(images()).sum().backward()  # no inference tensor was left behind


def test_scales_of_activations_stay_where_asked():
    traced, reference = _coarse()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    learned_rounding(traced, reference, [images(64)], learn_activation_scales=False, **FEW)
    for key, value in traced.state_dict().items():
        assert not key.startswith("activation_quantizers") or torch.equal(value, before[key])


def test_a_batchnorm_that_is_not_folded_is_taken_into_account():
    traced, reference = _coarse(fold=False)
    assert layers(traced)["block.conv1"].batchnorm is not None
    with torch.no_grad():
        for network in (traced, reference):
            network.get_submodule("block.conv1").batchnorm.weight[::2] *= -1
    before = _error(traced, reference)
    learned_rounding(traced, reference, [images(96)], **FEW)
    assert _error(traced, reference) < 0.5 * before


def test_the_same_seed_gives_the_same_bits_also_after_an_interruption(tmp_path, monkeypatch):
    results = []
    for seed in (0, 0, 1):
        traced, reference = _coarse()
        learned_rounding(traced, reference, [images(64)], iterations=10, seed=seed)
        results.append(traced.state_dict())
    same = [all(torch.equal(results[0][k], other[k]) for k in other) for other in results[1:]]
    assert same == [True, False]

    module = sys.modules["qat_tricks.tricks.learned_rounding"]  # not the function of this name
    calls = []
    real = module.reconstruct

    def counted(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == 2:  # in the second block
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr(module, "reconstruct", counted)
    traced, reference = _coarse()
    with pytest.raises(KeyboardInterrupt):
        learned_rounding(traced, reference, [images(64)], iterations=10, cache=tmp_path)
    traced, reference = _coarse()
    learned_rounding(traced, reference, [images(64)], iterations=10, cache=tmp_path)
    assert all(torch.equal(results[0][k], value) for k, value in traced.state_dict().items())
    blocks = len(list(tmp_path.rglob("*.pt")))
    assert len(calls) == blocks + 1  # only the block that was interrupted was begun twice

    traced, reference = _coarse()
    learned_rounding(traced, reference, [images(64, seed=9)], iterations=10, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other images, other blocks


# In the second, layers have grids of their own behind those of a residual stream.
@pytest.mark.parametrize("kind", [SqueezeExcite, ShortcutOfZeros])
def test_exports_as_it_is_simulated(kind, tmp_path):
    traced = quantized(kind, weight_bits=4, activation_bits=4)
    reference = trace(seeded(kind))
    fold_batchnorm(reference)
    x = large_images(32)
    learned_rounding(traced, reference, [x], iterations=5)
    parity = qat_tricks.export_onnx(traced.eval(), tmp_path / "model.onnx", x[:1], images=[x])
    assert parity.max_abs_error == 0


@pytest.mark.parametrize(
    "name", ["attention", "tied_weight", "conv_called_twice", "in_place_relu_read_twice"]
)
def test_other_structures_do_not_get_worse(name):
    build, shape = STRUCTURES[name]
    traced = trace(built(build))
    fold_batchnorm(traced)
    reference, x = copy.deepcopy(traced), inputs(shape, count=16)
    quantize(traced, weight_bits=4, activation_bits=4, first_last_bits=None)
    calibrate(traced, [x])
    with torch.no_grad():
        before = (traced(x) - reference(x)).square().mean()
        learned_rounding(traced, reference, [x], iterations=20)
        assert (traced(x) - reference(x)).square().mean() <= before


def test_errors():
    traced, reference = _coarse()
    with pytest.raises(QatTricksError, match="no images to learn the rounding on"):
        learned_rounding(traced, reference, [])
    with pytest.raises(QatTricksError, match="calibrate the network first"):
        learned_rounding(quantize(trace(small_net())), reference, [images()])
    with pytest.raises(QatTricksError, match=r'no such layer "block\.conv1"'):
        learned_rounding(traced, trace(small_net().depthwise), [images()])
    with pytest.raises(QatTricksError, match="did you mean"):
        LearnedRounding(granularity="blocks")
