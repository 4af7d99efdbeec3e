import pytest
from nets import small_net

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import correct_weights, prune, quantize
from qat_tricks.tricks.correct_weights import _statistics


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mean_and_spread_come_nearer(bits):
    traced = quantize(trace(small_net()), weight_bits=bits, first_last_bits=None)
    targets = {name: _statistics(layer.weight.detach()) for name, layer in layers(traced).items()}

    def errors():
        quantized = {name: _statistics(layer.effective_weight().detach()) for name, layer in layers(traced).items()}
        return [
            sum(float((quantized[name][i] - targets[name][i]).abs().sum()) for name in targets) for i in range(2)
        ]

    mean_before, spread_before = errors()
    correct_weights(traced)
    mean_after, spread_after = errors()
    assert spread_after < 0.2 * spread_before
    assert mean_after + spread_after <= mean_before + spread_before


def test_pruned_weights_stay_zero():
    traced = quantize(trace(small_net()), weight_bits=4)
    prune(traced, 0.5)
    correct_weights(traced)
    assert all((layer.effective_weight()[layer.weight_mask == 0] == 0).all() for layer in layers(traced).values())


def test_without_quantized_weights_it_says_so():
    with pytest.raises(QatTricksError, match="quantize the network first"):
        correct_weights(trace(small_net()))
