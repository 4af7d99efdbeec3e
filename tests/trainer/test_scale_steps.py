"""Learned scales stay positive, keep their share of the rate, and are named when they run away."""

import warnings

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.graph import activation_quantizers
from qat_tricks.trainer.scale_steps import LARGEST_CHANGE, ScaleSteps
from tests.helpers.lit import Data, Lit, trainer


def scale(value=0.5):
    return nn.Parameter(torch.tensor(value))


def step(optimizer, **gradients):
    for parameter, gradient in gradients.values():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("gradient", [1e6, -1e6, float("inf")])
def test_a_step_changes_a_scale_by_at_most_a_tenth(gradient):
    one = scale()
    optimizer = torch.optim.SGD([one], lr=1.0)
    steps = ScaleSteps([optimizer], {"one": one})
    step(optimizer, one=(one, gradient))
    assert float(one) == pytest.approx(0.5 * (1 + LARGEST_CHANGE * (-1 if gradient > 0 else 1)))
    for _ in range(300):
        step(optimizer, one=(one, gradient))
        assert 0 < float(one) < float("inf")
    steps.let_go()
    one.data.fill_(0.5)
    step(optimizer, one=(one, gradient))
    assert not 0 < float(one) < 1


def test_ordinary_steps_stay_as_they_are():
    torch.manual_seed(0)
    ours, plain = (nn.Parameter(torch.linspace(0.1, 1, 8)) for _ in range(2))
    optimizers = [torch.optim.Adam([p], lr=1e-3) for p in (ours, plain)]
    ScaleSteps(optimizers[:1], {"ours": ours})
    for _ in range(20):
        gradient = torch.randn(8)
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, plain)


def test_a_rate_set_for_all_groups_keeps_the_scales_share():
    weight, one = nn.Parameter(torch.ones(3)), scale()
    optimizer = torch.optim.Adam([{"params": [weight]}, {"params": [one]}], lr=0.1)
    optimizer.param_groups[1] |= {"lr_factor": 0.01, "of_group": 0}
    ScaleSteps([optimizer], {"one": one})
    for group in optimizer.param_groups:  # as warm-ups are written
        group["lr"] = 0.05
    step(optimizer, weight=(weight, 1.0), one=(one, 1.0))
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05 * 0.01)
    assert float(one) == pytest.approx(0.5 - 0.05 * 0.01)


def test_scales_that_run_away_are_named_once():
    one, other = scale(), scale()
    steps = ScaleSteps([], {"one": one, "other": other})
    assert steps.running_away() == []
    one.data.fill_(0.5 / 20)
    assert steps.running_away() == [("one", pytest.approx(1 / 20))]
    other.data.fill_(0.5 * 20)
    assert steps.running_away() == [("other", pytest.approx(20))]


@pytest.mark.filterwarnings("ignore")
def test_in_a_fit_that_diverges_scales_stay_positive_and_are_named():
    class Wild(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=20.0, momentum=0.9)

    lit = Wild().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(
            qat_tricks.recipe("int8_qat", ["~stages.qat.tricks.restore_batchnorm"]),
            max_epochs=30,
            log_every_n_steps=1,
        ).fit(lit, datamodule=Data())
    scales = [float(q.scale) for q in activation_quantizers(lit.backbone).values()]
    assert min(scales) > 0
    named = [str(w.message) for w in caught if "runs away: in step" in str(w.message)]
    assert any("the scale of activation_quantizers." in line for line in named)
