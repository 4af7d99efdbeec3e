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


SYMMETRIC = Scheme(signed=True, symmetric=True)


def _symmetric(activation, low, high):
    quantizer = ActivationQuantizer(SYMMETRIC, activation=activation)
    quantizer.set_range(low, high)
    return quantizer


def test_a_symmetric_grid_uses_its_upper_half_behind_a_relu():
    x = torch.linspace(-5, 5, 2001)
    quantizer, plain = _symmetric("relu", -9.0, 3.0), _symmetric(None, 0.0, 3.0)
    assert quantizer.integers == (0, 127)
    assert quantizer.range == (0.0, pytest.approx(3.0))
    assert torch.equal(quantizer(x), plain(torch.relu(x)))
    assert plain(x).min() < -3.0


def test_gradients_behind_a_relu_are_those_of_relu_then_fake_quant():
    gradients = []
    for activation in ("relu", None):
        x = torch.linspace(-5, 5, 1999).requires_grad_()
        quantizer = _symmetric(activation, 0.0, 3.0)
        quantizer.scale.requires_grad_()
        (
            quantizer(x if activation else torch.relu(x)) * torch.linspace(1, 2, 1999)
        ).sum().backward()
        gradients.append((x.grad, quantizer.scale.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    # LSQ's factor knows how far a grid reaches: 128 steps below, 127 above.
    assert float(gradients[0][1]) == pytest.approx(
        float(gradients[1][1]) * (128 / 127) ** 0.5, rel=1e-4
    )


def test_the_cap_of_relu6_is_the_end_of_a_symmetric_grid():
    quantizer = _symmetric("relu6", 0.0, 40.0)
    with torch.no_grad():
        quantizer.scale.mul_(3)
    assert quantizer(torch.tensor([-1.0, 5.99, 100.0])).tolist() == pytest.approx([0.0, 6.0, 6.0])


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


def learning():
    """A quantizer of ``[-0.4, 1.1]`` in steps of 0.1 whose smallest value learns."""
    quantizer = ActivationQuantizer(Scheme(bits=4))
    quantizer.set_range(-0.4, 1.1)
    quantizer.own_low().requires_grad_()
    return quantizer


def test_a_smallest_value_of_ones_own_changes_no_value():
    x = torch.randn(1000)
    plain = ActivationQuantizer(Scheme(bits=4))
    plain.set_range(-0.4, 1.1)
    assert torch.equal(learning()(x), plain(x))


def test_the_zero_point_follows_the_smallest_value():
    quantizer, x = learning(), torch.randn(1000)
    with torch.no_grad():
        quantizer.low.fill_(-0.72)
    assert float(quantizer(x).min()) == pytest.approx(-0.7)
    assert (quantizer.offset, quantizer.zero_point.item()) == (7, 7)
    with torch.no_grad():
        quantizer.low.fill_(-0.2)
    quantizer.eval()  # before anything else has run
    assert quantizer.offset == 2
    assert quantizer.range == pytest.approx((-0.2, 1.3))


def test_a_smallest_value_that_moves_in_evaluation_is_followed_at_once():
    quantizer = learning().eval()
    with torch.no_grad():
        quantizer.low.fill_(-0.72)
    assert quantizer.offset == 7
    with torch.no_grad():
        quantizer.low.fill_(-0.2)
    assert int(quantizer.current_zero_point()) == 2


def test_a_smallest_value_comes_back_with_the_state_and_goes_with_a_range():
    quantizer, x = learning(), torch.randn(1000)
    with torch.no_grad():
        quantizer.low.fill_(-0.72)
    other = learning()
    other.load_state_dict(quantizer.state_dict())
    assert other.offset == 7
    assert torch.equal(other(x), quantizer(x))
    other.set_range(-0.4, 1.1)
    assert torch.equal(other(x), learning()(x))
    assert other.low.item() == pytest.approx(-0.4)
    other.move_scale(torch.tensor(0.11))
    assert other.eval().offset == 4
