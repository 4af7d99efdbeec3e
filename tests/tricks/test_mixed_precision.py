import copy
import itertools

import onnx
import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.deploy.cost.weights import weight_size
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, spec_of, trace
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.output_error import output_error
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.weight_options import weight_on_grid, weight_options
from qat_tricks.tricks import (
    calibrate,
    fold_batchnorm,
    gptq,
    learn_scales,
    mixed_precision,
    quantize,
)
from qat_tricks.tricks.mixed_precision import MixedPrecision
from tests.helpers.nets import images, small_net

BATCHES = [images(16, seed=5)]


def quantized(**settings):
    traced = trace(small_net())
    fold_batchnorm(traced)
    return calibrate(quantize(traced, **settings), [images(64)])


def bits_of(traced):
    return {name: layer.weight_quantizer.scheme.bits for name, layer in layers(traced).items()}


def size_of(traced):
    """The bits of all weights, as a share of those with 8 bits each."""
    found = layers(traced)
    bits = sum(found[name].weight.numel() * bits for name, bits in bits_of(traced).items())
    return bits / sum(layer.weight.numel() * 8 for layer in found.values())


def bops_of(traced):
    """MACs times both bits, as a share of those with 8 bits each."""
    bits, calls = bits_of(traced), macs_of_calls(traced, images(2))
    products = sum(call.macs * bits[call.layer] * call.grid.scheme.bits for call in calls)
    return products / sum(call.macs * 8 * 8 for call in calls)


def test_the_bits_are_those_of_the_least_error_that_fits():
    traced = quantized()
    chosen = mixed_precision(traced, BATCHES, share=0.4, weight_bits=[2, 4, 8])
    assert size_of(traced) == pytest.approx(chosen["reached"])
    assert chosen["reached"] <= 0.4
    assert spec_of(traced)["mixed_precision"] == chosen
    # Every other choice, by the errors of all layers at each of the bits, on a quarter of the
    # images.
    other, alone = quantized(), {}
    measured, to_round = BATCHES[0][:4], BATCHES[0][4:]
    options = weight_options(other, [to_round], dict.fromkeys(bits_of(traced), (2, 4, 8)))
    with torch.no_grad(), float_mode(other):
        expected = other(measured)
        for place, option in options.items():
            with weight_on_grid(other, place[0], option).applied():
                alone[place] = output_error(expected, other(measured)).kl
    assert chosen["images"] == 4
    sizes = {name: layer.weight.numel() for name, layer in layers(traced).items()}
    fitting = (
        sum(alone[name, bits] for name, bits in zip(sizes, choice, strict=True))
        for choice in itertools.product((2, 4, 8), repeat=len(sizes))
        if sum(n * b for n, b in zip(sizes.values(), choice, strict=True))
        <= 0.4 * 8 * sum(sizes.values())
    )
    assert chosen["kl"] == pytest.approx(min(fitting))


def test_it_errs_less_than_one_number_of_bits_for_all():
    mixed = quantized()
    mixed_precision(mixed, BATCHES, share=0.375, weight_bits=[2, 3, 4, 6, 8])
    uniform = quantized(weight_bits=3, first_last_bits=None)
    assert size_of(mixed) <= size_of(uniform)
    x = images(256, seed=9)
    with torch.no_grad():
        expected = small_net()(x)
        errors = [output_error(expected, traced(x)).kl for traced in (mixed, uniform)]
    assert errors[0] < 0.8 * errors[1]


class Means(nn.Module):
    """Two convs of one size. What the first reads is far from 0, so that errors have means."""

    def __init__(self):
        super().__init__()
        self.far = nn.Conv2d(8, 32, 3)
        self.near = nn.Conv2d(32, 8, 3)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = torch.relu(self.far(x))
        return self.head(torch.relu(self.near(x)).mean([2, 3]))


def means_net():
    torch.manual_seed(3)
    net = Means().eval()
    with torch.no_grad():
        # Inputs lie about 6; the bias keeps the sums about 0.
        net.far.bias.sub_(6 * net.far.weight.sum([1, 2, 3]))
        # One large weight makes the second conv's grids coarse.
        net.near.weight[:, 0, 0, 0] = 0.6
        net.head.weight.mul_(8)
    return net


def test_errors_that_a_bias_takes_up_do_not_count():
    net, x = means_net(), images(64, channels=8) + 6
    traced = calibrate(quantize(trace(net)), [x])
    chosen = mixed_precision(traced, [x], share=0.51, weight_bits=[3, 4, 5], exclude=["head"])
    bits = {part["name"]: part["bits"] for part in chosen["parts"]}
    # With the means of its errors, the first errs more than the second.
    assert bits == {"far": 3, "near": 5}


def test_weights_are_judged_on_images_that_they_were_not_rounded_on():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    traced = trace(net)
    reference = copy.deepcopy(traced)
    calibrate(quantize(traced), [images(64)])
    # Fewer images than inputs: the weights of 2 bits fit them, and no others.
    (part,) = mixed_precision(traced, [images(40)], share=1, weight_bits=[2])["parts"]
    gptq(traced, reference, [images(30, seed=7)])
    with torch.no_grad():
        x = images(256, seed=8)
        unseen = output_error(reference(x), traced(x)).kl
    assert part["kl"] > 0.6 * unseen


def test_bops_change_weights_and_activations_together():
    traced = quantized()
    chosen = mixed_precision(
        traced, BATCHES, budget="bops", share=0.3, weight_bits=[2, 4, 8], activation_bits=[3, 8]
    )
    assert chosen["reached"] <= 0.3
    assert {part["kind"] for part in chosen["parts"]} == {"weights", "activations"}
    bits = {quantizer.scheme.bits for quantizer in activation_quantizers(traced).values()}
    assert bits == {3, 8}
    assert all(quantizer.is_calibrated for quantizer in activation_quantizers(traced).values())


def test_a_checkpoint_rebuilds_and_the_file_computes_the_same(tmp_path):
    traced = quantized()
    mixed_precision(
        traced, BATCHES, budget="bops", share=0.25, weight_bits=[2, 4, 6], activation_bits=[4, 8]
    )
    assert len(set(bits_of(traced).values())) > 1
    again = rebuild(small_net(seed=7), spec_of(traced))
    again.load_state_dict(traced.state_dict(), strict=True)
    x = images(32, seed=6)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), traced(x))
    report = qat_tricks.export_onnx(traced, tmp_path / "m.onnx", images(2), images=[x])
    assert report.max_abs_error < 1e-5
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    size = weight_size(tmp_path / "m.onnx")
    saved = sum(
        layer.weight.numel() * (8 - layer.weight_quantizer.scheme.bits) / 8
        for layer in layers(traced).values()
    )
    assert size.on_disk - size.packed == pytest.approx(saved, abs=len(layers(traced)))


def test_the_only_choice_is_taken():
    traced = quantized()
    mixed_precision(traced, BATCHES, share=1, weight_bits=[4], include=["right"])
    assert bits_of(traced) == dict.fromkeys(bits_of(traced), 8) | {"right": 4}


def test_layers_that_are_left_out_keep_their_quantizers():
    traced = quantized()
    before = layers(traced)["head"].weight_quantizer
    mixed_precision(traced, BATCHES, share=0.5, exclude=["head", "stem.*"])
    assert layers(traced)["head"].weight_quantizer is before
    assert bits_of(traced)["stem.0"] == 8
    assert size_of(traced) <= 0.5


def test_the_recipe_repeats_to_the_bit():
    settings = ["stages.ptq.tricks.mixed_precision.share=0.4"]
    first, second = (
        qat_tricks.quantize(small_net(), [images(64)], "mixed_ptq", settings) for _ in range(2)
    )
    assert spec_of(first) == spec_of(second)
    assert all(torch.equal(a, second.state_dict()[k]) for k, a in first.state_dict().items())


@pytest.mark.filterwarnings("ignore:correct_bias:UserWarning")  # it may be rolled back
@pytest.mark.parametrize(
    ("recipe", "uniform", "least_gain"),
    [("mixed_w4a8_ptq", "w4a8_ptq", 1.2), ("mixed_w4a4_ptq", "w4a4_ptq", 2)],
)
def test_for_the_cost_of_uniform_bits_the_output_is_nearer_to_float(recipe, uniform, least_gain):
    net, seen, unseen = small_net(), [images(64), images(64, seed=3)], images(256, seed=9)

    def error(network):
        with torch.no_grad():
            return output_error(net(unseen), network(unseen)).kl

    of_uniform = qat_tricks.quantize(net, seen, uniform)
    mixed = qat_tricks.quantize(net, seen, recipe)
    chosen = spec_of(mixed)["mixed_precision"]
    cost = {"size": size_of, "bops": bops_of}[chosen["budget"]]
    assert chosen["share"] == pytest.approx(cost(of_uniform))
    assert chosen["reached"] == pytest.approx(cost(mixed))
    assert chosen["reached"] <= chosen["share"]
    assert error(mixed) * least_gain < error(of_uniform)


def test_layers_behind_a_residual_stream_have_bits_of_their_own():
    network = qat_tricks.quantize(small_net(), [images(64)], "mixed_w4a4_ptq")
    grids = activation_quantizers(network)
    bits = {name.rpartition(".")[2]: grid.scheme.bits for name, grid in grids.items()}
    # Where it is added to, the stream costs no product. The layers behind it pay for theirs.
    assert bits["stem_2"] == 8
    assert bits["stem_2_for_layers"] < 8
    chosen = {part["name"] for part in spec_of(network)["mixed_precision"]["parts"]}
    assert chosen >= {"stem_2_for_layers"}
    assert not chosen & {"stem_2"}


@pytest.mark.filterwarnings("ignore:correct_bias:UserWarning")  # it may be rolled back
def test_the_trick_that_follows_is_judged_at_the_new_bits():
    network = qat_tricks.quantize(small_net(), [images(64)], "mixed_ptq")
    proofs = {proof["trick"]: proof for proof in spec_of(network)["proofs"]}
    assert "mixed_precision" not in proofs  # it harms by design
    # With fewer bits the error before is larger than that which the trick at 8 bits has left.
    assert proofs["gptq"]["kl_before"] > 1.5 * proofs["tune_ranges"]["kl_after"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budget": "latency"}, "compute weights of 2 to 8 bits alike, in int8"),
        ({"budget": "sise"}, 'did you mean "size"'),
        ({"share": 0}, "share=0 is not allowed"),
        ({"weight_bits": [1, 8]}, "weight_bits=.1, 8. is not allowed"),
        ({"weight_bits": []}, "weight_bits=.. is not allowed"),
        ({"activation_bits": [4]}, "would not change the size"),
    ],
)
def test_settings_are_checked_when_made(settings, told):
    with pytest.raises(QatTricksError, match=told):
        MixedPrecision(**settings)


def test_a_budget_that_cannot_be_met_tells_the_smallest():
    with pytest.raises(QatTricksError, match=r"share=0\.1 .* with the fewest bits .* it is 0\.25"):
        mixed_precision(quantized(), BATCHES, share=0.1)
    assert mixed_precision(quantized(), BATCHES, share=0.25)["reached"] == 0.25


def test_what_depends_on_other_bits_must_not_come_before():
    with pytest.raises(QatTricksError, match="calibrate first"):
        mixed_precision(quantize(trace(small_net())), BATCHES)
    learned = quantized(weight_bits=4)
    learn_scales(learned)
    with pytest.raises(QatTricksError, match="put mixed_precision before learn_scales"):
        mixed_precision(learned, BATCHES)
    added = ["+trick@stages.ptq.tricks=mixed_precision", "~stages.ptq.tricks.correct_weights"]
    result = qat_tricks.quantize(small_net(), [images(16)], "int8_ptq", added)
    applied = result.meta["qat_tricks"]["applied"]
    assert applied[-2:] == ["mixed_precision", "correct_bias"]
