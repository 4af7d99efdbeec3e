import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.numerics import ActivationQuantizer, Scheme, WeightQuantizer
from qat_tricks.numerics.scheme import weight_scheme


def test_grid_that_begins_at_zero_is_the_relu():
    x = torch.randn(1000) * 2
    quantizer = ActivationQuantizer(Scheme(bits=8), activation="relu")
    quantizer.set_range(-1.0, 3.0)
    plain = ActivationQuantizer(Scheme(bits=8))
    plain.set_range(0.0, 3.0)
    assert torch.equal(quantizer(x), plain(torch.relu(x)))


def test_relu6_is_kept_when_the_scale_grows():
    quantizer = ActivationQuantizer(Scheme(bits=4), activation="relu6")
    quantizer.set_range(0.0, 6.0)
    with torch.no_grad():
        quantizer.scale.mul_(3)
    assert quantizer(torch.tensor([100.0])) == pytest.approx(6.0)


def test_running_without_a_range_is_refused():
    with pytest.raises(QatTricksError, match="calibrate"):
        ActivationQuantizer(Scheme())(torch.ones(1))


def test_zero_point_comes_back_with_the_state():
    first, second = ActivationQuantizer(Scheme()), ActivationQuantizer(Scheme())
    first.set_range(-1.0, 2.0)
    second.load_state_dict(first.state_dict())
    x = torch.randn(100)
    assert torch.equal(first(x), second(x))


def test_least_squares_scale_beats_the_maximum_at_low_bits():
    weight = torch.randn(8, 16, 3, 3)
    quantizer = WeightQuantizer(weight_scheme(4))
    largest = (quantizer(weight) - weight).square().sum((1, 2, 3))
    quantizer.fit_mse(weight)
    fitted = (quantizer(weight) - weight).square().sum((1, 2, 3))
    assert (fitted <= largest).all()
    assert fitted.sum() < 0.9 * largest.sum()
    assert quantizer.scale.shape == (8, 1, 1, 1)
