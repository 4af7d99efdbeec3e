"""The table at the end of a fit: its rows, the loggers that get them, and when there is none."""

import csv
import re

import pytest
import torch
from torch import nn

import qat_tricks
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import small_net
from tests.helpers.weights import zeros


class WithFloat(nn.Module):
    """A network with two operations that stay in float."""

    def __init__(self):
        super().__init__()
        self.body = small_net(num_classes=4)
        self.first, self.second = nn.GELU(), nn.GELU()

    def forward(self, x):
        return self.second(self.body(self.first(x)))


def fitted(callbacks, lit=None, **settings):
    torch.manual_seed(3)
    lit = (lit or Lit()).train()
    fit = trainer(callbacks, **settings)
    fit.fit(lit, datamodule=Data(), ckpt_path=settings.pop("ckpt_path", None))
    return lit, fit


def table(capsys):
    """The printed lines, without their spaces at the ends."""
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]


@pytest.mark.parametrize("one", [False, True], ids=["list", "Recipe"])
def test_a_fit_ends_with_one_table(capsys, one):
    make = qat_tricks.Recipe if one else qat_tricks.recipe
    callbacks = make("int8_prune50")
    lit, fit = fitted([callbacks] if one else callbacks)
    lines = table(capsys)
    assert lines[0] == "int8_prune50"
    assert re.split(r"\s{2,}", lines[1]) == ["float", "after PTQ", "at the end"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:5]}
    assert rows["val_acc"][2] == f"{fit.callback_metrics['val_acc']:.4f}"
    assert rows["zeros"][0] == "0.0%"
    assert float(rows["zeros"][2].rstrip("%")) == pytest.approx(100 * zeros(lit), abs=1)
    assert lines[5:8] == [
        "7 of 7 convs and linears in integers",
        "nothing stays in float",
        "64 images used for calibration",
    ]
    assert lines[8].startswith("proved on 16 images held out: equalize")


def test_operations_of_one_kind_are_one_line_and_excluded_layers_are_named(capsys):
    lit = Lit()
    lit.backbone = WithFloat()
    fitted(qat_tricks.recipe("int8_ptq", ["stages.ptq.tricks.quantize.exclude=[body.head]"]), lit)
    text = " ".join(table(capsys))
    assert "6 of 7 convs and linears in integers" in text
    assert "in float: 2 GELU (first, second): no integer kernel" in text
    assert "in float: 1 Linear (body.head): left out by quantize.include or exclude" in text


@pytest.mark.feature("the table at the end: every logger gets its figures")
def test_every_logger_gets_the_figures(tmp_path, capsys):
    logger = pl.loggers.CSVLogger(tmp_path)
    _, fit = fitted(qat_tricks.recipe("int8_qat"), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = {k: float(v) for row in rows for k, v in row.items() if v and "qat_tricks/" in k}
    assert logged["qat_tricks/layers_quantized"] == logged["qat_tricks/layers"] == 7
    assert logged["qat_tricks/float_operations"] == 0
    assert logged["qat_tricks/calibration_images"] == 64
    for trick in ("equalize", "correct_weights", "correct_bias"):
        assert logged[f"qat_tricks/proofs/{trick}/kl_before"] >= 0
        assert logged[f"qat_tricks/proofs/{trick}/kl_kept"] >= 0
    assert {"qat_tricks/before/val_acc", "qat_tricks/after_ptq/val_acc"} < set(logged)
    assert logged["qat_tricks/end/val_acc"] == pytest.approx(float(fit.callback_metrics["val_acc"]))
    steps = [row["step"] for row in rows if row["qat_tricks/layers"]]
    assert steps == [str(fit.global_step)]


def test_without_a_report_nothing_is_printed(capsys):
    fitted(qat_tricks.recipe("int8_ptq", report=False))
    fitted([qat_tricks.Recipe("int8_ptq", report=False)])
    trainer(qat_tricks.recipe("int8_ptq")).validate(Lit(), Data(), verbose=False)  # no fit
    assert capsys.readouterr().out == ""


@pytest.mark.feature("the table at the end: a resumed fit does not validate again")
def test_a_resumed_fit_does_not_validate_again(tmp_path, capsys, monkeypatch):
    _, fit = fitted(qat_tricks.recipe("int8_qat"), max_epochs=1)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    runs = []
    monkeypatch.setattr("qat_tricks.trainer.validation.Validation.run", runs.append)
    torch.manual_seed(3)
    second = trainer(qat_tricks.recipe("int8_qat"), max_epochs=2)
    second.fit(Lit().train(), datamodule=Data(), ckpt_path=tmp_path / "last.ckpt")
    text = " ".join(table(capsys))
    assert runs == []
    assert "7 of 7 convs and linears in integers" in text
    assert "float: not measured, the run was resumed" in text


def test_a_second_fit_has_a_table_of_its_own(capsys):
    lit, _ = fitted(qat_tricks.recipe("int8_qat"), max_epochs=1)
    capsys.readouterr()
    fitted(qat_tricks.recipe("int8_qat"), lit, max_epochs=1, check_val_every_n_epoch=5)
    text = " ".join(table(capsys))
    assert "float: not measured, the network was quantized already" in text
    assert "at the end: not measured, the fit has not validated" in text


def test_an_older_validation_is_named_with_its_step(capsys):
    fitted(qat_tricks.recipe("int8_ptq"), max_epochs=3, check_val_every_n_epoch=2)
    assert "at the end: the last validation, of step 8 of 12" in " ".join(table(capsys))
