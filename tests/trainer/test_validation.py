"""The user's validation before the training: the fit's own figures, and no trace of it."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import qat_tricks
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, dataset, differences, trainer


class Drawing(Lit):
    """A module whose validation moves all that a pass must put back."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.accuracy = MulticlassAccuracy(4)
        self.passes, self.seen = 0, []

    def validation_step(self, batch, batch_idx):
        self.accuracy.update(self(batch[0] + 0.01 * torch.randn(())), batch[1])
        self.log("val/acc", self.accuracy)
        self.seen.append(self.trainer.training)
        self.logger and self.logger.log_metrics({"step": batch_idx})

    def on_validation_epoch_end(self):
        self.passes += 1
        self.log("val/passes", float(self.passes))
        self.log("val/rate", self.optimizers().param_groups[0]["lr"])


class Record(pl.Callback):
    def __init__(self):
        self.calls = []

    def on_validation_start(self, trainer, pl_module):
        self.calls.append(trainer.state.stage.value)


def fitted(report, module=Drawing, **settings):
    """A fit whose loaders share one generator: its order shows whether anything has drawn."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(1)
    train = DataLoader(dataset(64), batch_size=16, shuffle=True, generator=generator)
    val = DataLoader(dataset(32, 4), batch_size=16, shuffle=True, generator=generator)
    lit, record = module().train(), Record()
    callbacks = [*qat_tricks.recipe("int8_qat", report=report), record]
    fit = trainer(callbacks, max_epochs=1, **settings)
    fit.fit(lit, train, val)
    return lit, fit, record


@pytest.mark.feature("the table at the end: the training is to the last bit the one without it")
def test_a_fit_with_a_report_is_to_the_last_bit_the_fit_without(capsys):
    with_report, without = fitted(True), fitted(False)
    assert differences(with_report[0].state_dict(), without[0].state_dict()) == []
    assert differences(with_report[1].callback_metrics, without[1].callback_metrics) == []
    assert with_report[0].passes == without[0].passes == 1
    assert with_report[0].seen == without[0].seen
    assert with_report[2].calls == without[2].calls == ["validate"]  # other callbacks saw nothing
    assert capsys.readouterr().out.count("at the end") == 1


class WithLoss(Lit):
    def validation_step(self, batch, _):
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))


def test_the_figures_are_those_of_validations_of_their_own(capsys):
    loaders = DataLoader(dataset(64), batch_size=16), DataLoader(dataset(30, 4), batch_size=16)
    callbacks = qat_tricks.recipe("int8_ptq")
    (before,) = trainer().validate(WithLoss(), loaders[1], verbose=False)
    fit = trainer(callbacks, max_epochs=1)
    fit.fit(WithLoss().train(), *loaders)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("loss"))
    assert row[1] == f"{before['loss']:.4f}"
    assert row[3] == f"{fit.callback_metrics['loss']:.4f}"
    assert row[1] != row[3]  # the fit has trained


class Failing(Lit):
    def validation_step(self, batch, _):
        if self.trainer.global_step == 0:
            raise ValueError("no step\nyet")
        super().validation_step(batch, _)


class Silent(Lit):
    def validation_step(self, batch, _):
        self(batch[0])


@pytest.mark.parametrize(
    ("module", "settings", "told"),
    [
        (Failing, {}, "the validation fails before the training (ValueError: no step yet)"),
        (Silent, {}, "the validation logs nothing"),
        (Lit, {"limit_val_batches": 0}, "the fit has no validation"),
    ],
)
def test_a_validation_that_gives_nothing_says_why_and_the_fit_goes_on(
    module, settings, told, capsys
):
    _, fit, _ = fitted(True, module, **settings)
    assert fit.global_step == 4
    assert f"float: not measured, {told}" in " ".join(capsys.readouterr().out.split())
