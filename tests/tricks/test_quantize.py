import copy

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import float_mode, layers, rebuild, spec_of, trace
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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_kept_batchnorm_is_simulated_as_it_is_exported(bits, tmp_path):
    overrides = [f"stages.ptq.tricks.quantize.weight_bits={bits}"]
    overrides += ["~stages.ptq.tricks.fold_batchnorm", "~stages.ptq.tricks.equalize"]
    network = qat_tricks.quantize(small_net(), [images(32)], overrides=overrides)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 4
    network.train()(images(16, seed=4))  # statistics move on
    network.eval()
    report = qat_tricks.export_onnx(network, tmp_path / "m.onnx", images(8), images=[images(64)])
    assert all(tensor.differing == 0 for tensor in report.layers)
    again = rebuild(small_net(seed=9), spec_of(network))
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), network(images()))


def test_in_training_a_kept_batchnorm_sees_the_output_of_its_layer():
    float_net = small_net().train()
    float_net.dropout.p = 0.0
    network = quantize(trace(copy.deepcopy(float_net)))
    with float_mode(network):
        assert torch.allclose(network(images()), float_net(images()), atol=1e-5)
    expected = float_net.stem[1].running_mean
    assert torch.allclose(network.get_submodule("stem.0.batchnorm").running_mean, expected)
