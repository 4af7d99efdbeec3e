import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import correct_weights, prune, quantize
from qat_tricks.tricks.correct_weights import _balance
from tests.helpers.nets import small_net


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mean_and_spread_come_nearer(bits):
    traced = quantize(trace(small_net()), weight_bits=bits, first_last_bits=None)
    floats = {name: layer.weight.detach().clone() for name, layer in layers(traced).items()}

    def errors(statistic):
        pairs = [
            (layer.weight_quantizer(layer.weight).detach(), floats[name])
            for name, layer in layers(traced).items()
        ]
        return sum(
            float((statistic(one.flatten(1)) - statistic(other.flatten(1))).abs().sum())
            for one, other in pairs
        )

    means, spreads = errors(lambda w: w.mean(1)), errors(lambda w: w.std(1))
    correct_weights(traced)
    assert errors(lambda w: w.mean(1)) < 0.7 * means
    assert errors(lambda w: w.std(1)) < 0.01 * spreads


def test_errors_of_a_row_sum_to_half_a_step_and_none_is_a_step_off():
    exact = torch.randn(64, 9) * 20
    movable = torch.rand(64, 9) > 0.1
    steps = _balance(exact, exact.round(), movable)
    assert (steps - exact).sum(1).abs().max() <= 0.5 + 1e-4
    assert (steps - exact).abs().max() < 1
    assert torch.equal(steps[~movable], exact.round()[~movable])


def test_a_constant_input_gives_nearly_the_float_output():
    traced = quantize(trace(small_net()))
    layer = layers(traced)["right"]
    x = torch.ones(1, 8, 5, 5)
    expected = torch.nn.functional.conv2d(x, layer.weight).detach()

    def error():
        return float(
            (torch.nn.functional.conv2d(x, layer.effective_weight()).detach() - expected)
            .abs()
            .max()
        )

    before = error()
    correct_weights(traced)
    assert error() < 0.5 * before


def test_pruned_weights_stay_zero():
    traced = quantize(trace(small_net()), weight_bits=4)
    prune(traced, 0.5)
    correct_weights(traced)
    assert all(
        (layer.effective_weight()[layer.weight_mask == 0] == 0).all()
        for layer in layers(traced).values()
    )


def test_without_quantized_weights_it_says_so():
    with pytest.raises(QatTricksError, match="quantize the network first"):
        correct_weights(trace(small_net()))
