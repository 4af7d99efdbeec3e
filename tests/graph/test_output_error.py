import pytest
import torch
from torch.nn import functional as F

from qat_tricks.graph.output_error import divergences, output_error


def test_figures_are_those_of_their_definitions():
    torch.manual_seed(0)
    reference = torch.randn(6, 4)
    output = reference + 0.3 * torch.randn(6, 4)
    error = output_error(reference, output)
    p, q = reference.double().log_softmax(1), output.double().log_softmax(1)
    assert error.kl == pytest.approx(float(F.kl_div(q, p, reduction="batchmean", log_target=True)))
    power = reference.square().sum() / (output - reference).square().sum()
    assert error.sqnr_db == pytest.approx(10 * float(power.log10()), abs=1e-4)
    assert error.agreement == float((reference.argmax(1) == output.argmax(1)).float().mean())


def test_the_same_logits_have_no_error():
    logits = torch.randn(3, 5)
    error = output_error(logits, logits + 2)  # probabilities do not see a constant
    assert error.kl == pytest.approx(0, abs=1e-9)
    assert error.agreement == 1
    assert output_error(logits, logits).sqnr_db == 200


def test_one_logit_and_positions_are_understood():
    one = torch.tensor([0.5, -1.0])
    two = torch.stack([torch.zeros(2), one], 1)
    assert torch.equal(divergences(one, one + 1), divergences(two, two + torch.tensor([0.0, 1.0])))
    maps = torch.randn(2, 3, 4, 4)
    by_position = divergences(maps.flatten(2)[..., 5], maps.flatten(2)[..., 5] * 2)
    assert divergences(maps, maps * 2).shape == by_position.shape == (2,)


def test_what_is_not_finite_is_worse_than_everything():
    logits = torch.randn(2, 3)
    assert output_error(logits, logits * torch.nan).kl == float("inf")
