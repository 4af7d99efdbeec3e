import pytest

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, trace
from qat_tricks.tricks import quantize
from qat_tricks.tricks.quantize import Quantize
from tests.helpers.nets import images, small_net


@pytest.mark.parametrize(("bits", "own"), [(8, False), (5, False), (4, True), (2, True)])
def test_low_bit_weights_have_scales_of_their_own(bits, own):
    traced = quantize(trace(small_net()), weight_bits=bits, first_last_bits=None)
    assert all(
        (layer.weight_quantizer.scale is not None) == own for layer in layers(traced).values()
    )


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_are_checked_before_anything_runs(bits):
    with pytest.raises(QatTricksError, match="from 2 to 8"):
        Quantize(weight_bits=bits)


def test_more_bits_are_closer_to_float():
    errors = []
    for bits in (2, 4, 8):
        quantized = qat_tricks.quantize(
            small_net(),
            [images(64)],
            overrides=[
                f"stages.ptq.tricks.quantize.{k}_bits={bits}" for k in ("weight", "activation")
            ],
        )
        errors.append(
            float((quantized(images(64, seed=3)) - small_net()(images(64, seed=3))).square().mean())
        )
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
