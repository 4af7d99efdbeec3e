"""Scales have parameter groups of their own, and schedules leave them their share of the rate."""

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import qat_tricks
from qat_tricks.trainer.scale_groups import give_scales_own_group, rates_with_scales
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer


def parameters(count):
    return [nn.Parameter(torch.zeros(i + 1)) for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "lr_factor", "factor"),
    [(SGD, None, 0.1), (AdamW, None, 0.01), (SGD, 0.2, 0.2), (AdamW, 0.5, 0.5)],
)
def test_scales_leave_their_group_for_one_like_it_without_weight_decay(kind, lr_factor, factor):
    weights, scales = parameters(3), parameters(2)
    optimizer = kind([*weights, *scales], lr=0.2, weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    give_scales_own_group(optimizer, scales, [schedule], lr_factor)
    own, of_scales = optimizer.param_groups
    assert [id(p) for p in own["params"]] == [id(p) for p in weights]
    assert [id(p) for p in of_scales["params"]] == [id(p) for p in scales]
    assert (own["weight_decay"], of_scales["weight_decay"]) == (0.1, 0)
    assert of_scales["lr"] == pytest.approx(0.2 * factor)
    for p in (*weights, *scales):
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    assert own["lr"] == pytest.approx(0.1)
    assert of_scales["lr"] == pytest.approx(0.1 * factor)
    assert schedule.get_last_lr() == [own["lr"], of_scales["lr"]]
    assert rates_with_scales(0.3, optimizer) == pytest.approx([0.3, 0.3 * factor])
    assert rates_with_scales([0.3, 0.4], optimizer) == [0.3, 0.4]  # the user knows both groups


def test_an_optimizer_without_scales_stays_as_it_is():
    weights, scales = parameters(3), parameters(2)
    optimizer = SGD(weights, lr=0.1)
    give_scales_own_group(optimizer, scales, [], None)
    assert len(optimizer.param_groups) == 1


def test_lbfgs_which_has_one_group_trains_no_scales():
    weights, scales = parameters(3), parameters(2)
    optimizer = LBFGS([*weights, *scales])
    give_scales_own_group(optimizer, scales, [], None)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in weights]

    def closure():
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in (*weights, *scales))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(float(p.detach().min()) > 0.5 for p in weights)
    assert not any(float(p.detach().abs().max()) for p in scales)


class OwnLists(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of the user's, with a list of its own that has an entry for each group."""

    def __init__(self, optimizer):
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self):
        pairs = zip(self.optimizer.param_groups, self.peaks, strict=True)
        return [peak / (1 + self.last_epoch) for _, peak in pairs]


class Scheduled(Lit):
    def configure_optimizers(self):
        adam = AdamW(self.parameters(), lr=0.01)
        return [adam], [{"scheduler": OwnLists(adam), "interval": "step"}]


class WarmUp(Lit):
    """As Lightning's documentation writes a warm-up."""

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.01)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (2 + self.trainer.global_step)


@pytest.mark.parametrize("kind", [Scheduled, WarmUp])
def test_schedules_that_know_nothing_of_scales_leave_them_their_share(kind):
    rates = []

    class See(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer([*qat_tricks.recipe("int8_qat"), See()]).fit(kind().train(), datamodule=Data())
    assert len({rate for rate, _ in rates}) > 2
    assert all(of_scales == pytest.approx(0.01 * rate) for rate, of_scales in rates)
