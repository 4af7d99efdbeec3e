import torch

from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.other_bits import activation_on_grid, quantizer_with
from qat_tricks.numerics import make_estimator
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images, small_net


def quantized():
    return calibrate(quantize(trace(small_net())), [images(32)])


def test_an_activation_has_other_bits_in_the_block_only():
    traced, x = quantized(), images(4)
    name, quantizer = list(activation_quantizers(traced).items())[2]
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    observer = make_estimator("mse")
    with torch.no_grad(), float_mode(traced):
        quantizer.observer = observer
        before = traced(x)
        quantizer.observer = None
        with activation_on_grid(traced, name, 3, observer).applied():
            assert quantizer.scheme.bits == 3
            assert len(quantizer(torch.linspace(-9, 9, 99)).unique()) <= 8
            assert not torch.equal(traced(x), before)
        assert torch.equal(traced(x), before)
    assert quantizer.scheme.bits == 8
    assert quantizer.offset == int(state["zero_point"])
    assert all(torch.equal(value, state[key]) for key, value in quantizer.state_dict().items())


def test_few_bits_have_a_scale_of_their_own():
    layer = layers(quantized())["right"]
    assert quantizer_with(layer, 8) is layer.weight_quantizer
    assert [quantizer_with(layer, bits).scale is not None for bits in (6, 5, 4, 2)] == [
        False,
        False,
        True,
        True,
    ]
