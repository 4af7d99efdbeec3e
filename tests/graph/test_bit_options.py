import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.bit_options import (
    activation_places,
    option_costs,
    option_errors,
    weight_places,
)
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.numerics.choices import cost_of
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images, small_net


def quantized(**settings):
    return calibrate(quantize(trace(small_net()), **settings), [images(32)])


def places_of(traced, activations=None):
    weights = weight_places(traced, [2, 4, 8], ["*"], ["head"])
    return [*weights, *activation_places(traced, images(2), activations)]


def test_fewer_bits_err_more():
    traced = quantized()
    places = places_of(traced, [2, 8])
    found = option_errors(traced, [images(16)], places, [images(48, seed=3)])
    for place, errors in zip(places, found, strict=True):
        if place.is_free:
            assert errors[0] > errors[-1] > 0
        else:
            assert (place.options, errors) == ([8], [0.0])


def test_what_no_layer_reads_keeps_its_bits():
    places = places_of(quantized(), [2, 8])
    kept = {place.name.rpartition(".")[2] for place in places if not place.is_free}
    # "head" keeps them by its name. A residual add reads the second, and the mean the third.
    assert kept == {"head", "block_conv2", "relu"}


def test_bops_are_macs_times_the_bits_of_both():
    traced = quantized()
    places = places_of(traced, [3, 8])
    costs, pairs, whole = option_costs(traced, images(2), places, "bops")
    macs = sum(call.macs for call in macs_of_calls(traced, images(2)))
    assert whole == macs * 64
    most = [len(place.options) - 1 for place in places]
    assert cost_of(most, costs, pairs) == whole
    least = [0] * len(places)
    head = 160 * 8 * 3  # an input of 3 bits, and a weight that keeps 8
    assert cost_of(least, costs, pairs) == (macs - 160) * 2 * 3 + head
    # with fixed activations the same is a cost of the weights alone
    places = places_of(traced)
    costs, pairs, _ = option_costs(traced, images(2), places, "bops")
    assert pairs == []
    assert cost_of(least, costs) == (macs - 160) * 2 * 8 + 160 * 64


def test_the_size_is_that_of_the_weights():
    traced = quantized()
    places = places_of(traced)
    costs, _, whole = option_costs(traced, images(2), places, "size")
    count = sum(place.size for place in places)
    assert whole == 8 * count
    assert cost_of([0] * len(places), costs) == 2 * (count - 160) + 8 * 160


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(QatTricksError, match=r'"hed" matches no quantized layer.*"head"'):
        weight_places(quantized(), [2, 8], ["*"], ["hed"])
