import pytest
import torch
from nets import images, small_net

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.numerics import ESTIMATORS
from qat_tricks.tricks import calibrate, quantize


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_quantized_network_follows_the_float_one(estimator):
    traced = quantize(trace(small_net()))
    calibrate(traced, [images(32), images(32, seed=2)], estimator=estimator)
    expected, got = small_net()(images(64, seed=3)), traced.eval()(images(64, seed=3))
    assert (expected - got).square().mean() < 0.02 * expected.var()


def test_the_range_is_that_of_the_float_values():
    traced = calibrate(quantize(trace(small_net())), [images()], estimator="minmax")
    first = activation_quantizers(traced)["activation_quantizers.x"]
    low, high = images().min(), images().max()
    assert first.scale * 255 == pytest.approx(float(high - low), rel=1e-5)


def test_mode_and_observers_are_left_as_they_were():
    traced = quantize(trace(small_net().train()))
    calibrate(traced, [images()])
    assert traced.training
    assert all(q.observer is None and q.enabled for q in activation_quantizers(traced).values())


def test_errors():
    with pytest.raises(QatTricksError, match="quantize the network first"):
        calibrate(trace(small_net()), [images()])
    with pytest.raises(QatTricksError, match="no images"):
        calibrate(quantize(trace(small_net())), [])
    with pytest.raises(QatTricksError, match="NaN"):
        calibrate(quantize(trace(small_net())), [images() * torch.nan])
