import pytest
import torch

from qat_tricks.graph import activation_quantizers, layers, trace
from qat_tricks.graph.tensor_figures import activation_shifts, tensor_figures
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images, small_net


def quantized(bits=8):
    traced = quantize(trace(small_net()), weight_bits=bits, activation_bits=bits,
                      first_last_bits=None)  # fmt: skip
    return calibrate(traced, [images()])


def by_name(traced, batches):
    return {row["name"]: row for row in tensor_figures(traced, batches)}


def test_every_quantized_tensor_has_a_row():
    traced = quantized()
    rows = tensor_figures(traced, [images()])
    names = [row["name"] for row in rows]
    quantizers = {name.partition(".")[2] for name in activation_quantizers(traced)}
    assert set(names) == quantizers | layers(traced).keys()
    assert names[0] == "x"
    assert names.index("stem.0") < names.index("head")
    assert all(row["bits"] == 8 for row in rows)


def test_six_decibels_a_bit():
    fine, coarse = by_name(quantized(8), [images()]), by_name(quantized(4), [images()])
    for name in ("x", "stem.0", "head"):
        assert fine[name]["sqnr_db"] - coarse[name]["sqnr_db"] == pytest.approx(24, abs=6)


def test_an_activations_figures_are_those_of_its_values():
    traced = quantized(4)
    quantizer = activation_quantizers(traced)["activation_quantizers.x"]
    quantizer.set_range(-1.0, 1.0)
    x = images(32, seed=7)
    row = by_name(traced, x.split(16))["x"]
    low, high = quantizer.range
    expected = ((x < low - quantizer.scale / 2) | (x > high + quantizer.scale / 2)).double().mean()
    assert row["clipped"] == pytest.approx(float(expected))
    assert row["clipped"] > 0.2
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    out = quantizer(x)
    assert row["zeros"] == pytest.approx(float((out == 0).double().mean()))
    noise = (x - out).double().square().sum() / x.double().square().sum()
    assert row["sqnr_db"] == pytest.approx(-10 * float(noise.log10()), abs=1e-3)


def test_the_network_stays_as_it_is():
    traced = quantized().train()
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    tensor_figures(traced, [images()])
    assert traced.training
    assert all(torch.equal(before[name], value) for name, value in traced.state_dict().items())
    assert not any(q._forward_hooks for q in activation_quantizers(traced).values())


def test_activations_lie_apart_by_as_much_as_their_images():
    traced = quantized()
    low, high = activation_quantizers(traced)["activation_quantizers.x"].range
    here = images(32, seed=3)
    assert set(activation_shifts(traced, [here], [here]).values()) == {0.0}
    shifts = activation_shifts(traced, here.split(16), [here + 0.5])
    assert shifts["x"] == pytest.approx(0.5 / (high - low), rel=1e-4)
    assert max(shifts.values()) < 10
    assert activation_shifts(small_net(), [here], [here]) == {}
