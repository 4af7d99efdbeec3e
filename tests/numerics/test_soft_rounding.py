import pytest
import torch

from qat_tricks.numerics import Scheme, fake_quantize
from qat_tricks.numerics.scheme import weight_scheme
from qat_tricks.numerics.soft_rounding import BESIDE, SURE, SoftRounding, partly_rounded

SCHEME = weight_scheme(4)  # steps -7 to 7


def _soft(exact, present, stays=None):
    exact, present = torch.tensor(exact), torch.tensor(present)
    stays = torch.zeros_like(exact, dtype=torch.bool) if stays is None else torch.tensor(stays)
    return SoftRounding(exact, present, stays, SCHEME)


def test_begins_at_the_present_step_as_sure_as_the_weight_is_far_from_the_middle():
    #             nearest, the other side, negative, beyond both
    soft = _soft([1.3, 1.3, -2.4, 0.6], [1.0, 2.0, -3.0, 3.0])
    assert torch.equal(soft.rounded(), torch.tensor([1.0, 2.0, -3.0, 3.0]))
    expected = torch.tensor([1.3, 1.7, -2.6, 2 + BESIDE])
    torch.testing.assert_close(soft.steps().detach(), expected)


def test_a_weight_on_its_step_can_still_move():
    soft = _soft([3.0], [3.0])
    torch.testing.assert_close(soft.steps(), torch.tensor([4 - SURE]))
    soft.steps().sum().backward()
    assert soft.logit.grad.item() > 0


def test_what_stays_or_is_clipped_does_not_move():
    soft = _soft([9.3, -8.2, 0.4, 0.4], [7.0, -7.0, 0.0, 0.0], [False, False, True, False])
    assert soft.number == 1
    soft.steps().sum().backward()
    assert (soft.logit.grad != 0).tolist() == [False, False, False, True]
    assert torch.equal(soft.rounded(), torch.tensor([7.0, -7.0, 0.0, 0.0]))


def test_the_most_decided_are_fixed_first_and_in_the_end_all():
    soft = _soft([0.1, 0.6, -1.2, 2.3, 9.0], [0.0, 1.0, -1.0, 2.0, 7.0])
    for share, fixed in ((0.25, [0]), (0.5, [0, 2]), (0.75, [0, 2, 3]), (1.0, [0, 1, 2, 3])):
        soft.fix(share)
        soft.logit.grad = None
        soft.steps().sum().backward()
        assert [i for i in range(4) if soft.logit.grad[i] == 0] == fixed
    assert torch.equal(soft.steps().detach(), soft.rounded())
    assert torch.equal(soft.rounded(), torch.tensor([0.0, 1.0, -1.0, 2.0, 7.0]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_partly_rounded_has_the_gradients_of_lsq(share):
    scheme = Scheme(bits=3)
    x = torch.linspace(-1, 3, 41).requires_grad_()
    scale = torch.tensor(0.3, requires_grad=True)
    weights = torch.linspace(0.5, 1.5, 41)
    out = partly_rounded(x, scale, 0, 7, torch.full((41,), share))
    (out * weights).sum().backward()
    other_x, other_scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
    if share == 1:
        expected = fake_quantize(other_x, other_scale, 0, scheme)
    else:  # clamped only, for which autograd knows the gradient
        expected = (other_x / other_scale).clamp(0, 7) * other_scale
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, other_x.grad)
    # fake_quantize divides by a factor that Adam does not see.
    factor = (41 * 7) ** 0.5 if share == 1 else 1.0
    torch.testing.assert_close(scale.grad, other_scale.grad * factor, atol=1e-4, rtol=1e-4)
