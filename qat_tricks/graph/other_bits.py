"""Tries other bits for a quantizer of a network, and sets them.

Weights of 5 and more bits take the scale of their largest value, and it goes on following the
weight. Below that, rounding is so coarse that clipping pays: each channel takes the scale of least
squared error.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import fx

from qat_tricks.graph.layers import Layer, activation_quantizers
from qat_tricks.graph.sensitivity import Change
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer
from qat_tricks.numerics.range_estimators import RangeEstimator

OWN_SCALE_BITS = 4  # weights of 4 bits or fewer have a scale of their own


def fit_low_bit_scale(quantizer: WeightQuantizer, layer: Layer) -> bool:
    """Gives ``quantizer`` a scale of its own if it has few bits; returns whether it did."""
    if quantizer.scheme.bits > OWN_SCALE_BITS:
        return False
    # Of the masked weight: zeros of pruned weights need no range.
    quantizer.fit_mse(layer.masked_weight())
    return True


def quantizer_with(layer: Layer, bits: int) -> WeightQuantizer:
    """The layer's own quantizer if it has these bits, else one like it with them."""
    own = layer.weight_quantizer
    assert own is not None
    if own.scheme.bits == bits:
        return own
    other = WeightQuantizer(replace(own.scheme, bits=bits), channel_axis=own.channel_axis)
    other.to(layer.weight.device)
    fit_low_bit_scale(other, layer)
    return other


def activation_on_grid(
    traced: fx.GraphModule, name: str, bits: int, observer: RangeEstimator
) -> Change:
    """The values of the quantizer ``name`` on its grid, with so many bits.

    Args:
        traced: holds the quantizer.
        name: of the quantizer in the graph.
        bits: of the grid.
        observer: has seen the values in float.
    """
    quantizer = activation_quantizers(traced)[name]

    @contextmanager
    def applied() -> Iterator[None]:
        scheme, before = quantizer.scheme, copy.deepcopy(quantizer.state_dict())
        set_activation_bits(quantizer, bits, observer)
        quantizer.enabled = True
        try:
            yield
        finally:
            quantizer.enabled = False
            quantizer.scheme = scheme
            quantizer.load_state_dict(before)

    return Change(module=name, applied=applied)


def set_activation_bits(
    quantizer: ActivationQuantizer, bits: int, observer: RangeEstimator
) -> None:
    """Gives ``quantizer`` other bits, and the range for them that ``observer`` finds.

    At its own bits it keeps its range, which may have been tuned.
    """
    if quantizer.scheme.bits != bits:
        quantizer.scheme = replace(quantizer.scheme, bits=bits)
        quantizer.set_range(*observer.range(quantizer.scheme))
