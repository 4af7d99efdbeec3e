"""The bar of a trainer's fits: in the live display on a terminal, a line an epoch elsewhere."""

import re

import pytest

from qat_tricks.progress import enter, live
from qat_tricks.recipes.stages import run_stages
from qat_tricks.trainer.live_bar import live_bar
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit


class Logs(Lit):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train/loss", loss, prog_bar=True)
        return loss


def fit(**settings):
    settings = {"accelerator": "cpu", "enable_model_summary": False, **settings}
    callbacks = [live_bar(pl)()]
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, callbacks=callbacks, **settings
    )
    trainer.fit(Logs(), Data())
    return trainer


def test_where_nobody_watches_each_epoch_has_a_line(capsys):
    fit(limit_train_batches=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"  epoch 1 of 2: train/loss \d\.\d+, \d+\.\d s", lines[0])
    assert lines[1].startswith("  epoch 2 of 2: ")


@pytest.fixture(autouse=True)
def drawn_each_time(monkeypatch):
    monkeypatch.setattr("qat_tricks.progress.REFRESH", 0.0)


def test_on_a_terminal_a_bar_counts_the_batches_of_the_fit(terminal, capsys):
    fit(limit_train_batches=2)
    out, err = capsys.readouterr()
    assert "epoch" not in out
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", err)
    assert re.findall(r"epoch (\d of 2) .*?(\d/4) .*?train/loss", shown)[-1] == ("2 of 2", "4/4")
    assert "validate" in shown


def test_stages_share_the_bar_and_the_heading_names_them(terminal, capsys):
    settings = {"accelerator": "cpu", "enable_model_summary": False, "limit_train_batches": 1}
    bar = live_bar(pl)()
    with live():
        enter("stage 2 of 2, qat")
        run_stages(Logs(), Data(), "int8_qat", trainer={**settings, "callbacks": [bar]})
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    assert "stage 2 of 2, qat" in shown
    assert "stage qat" not in shown  # beside the figures, where the heading has it


def test_without_a_number_of_epochs_none_is_told(terminal, capsys):
    bar = live_bar(pl)()
    settings = {"accelerator": "cpu", "enable_model_summary": False, "logger": False}
    pl.Trainer(
        max_epochs=-1, max_steps=3, enable_checkpointing=False, callbacks=[bar], **settings
    ).fit(Logs(), Data())
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    assert "epoch 1 " in shown
    assert "of -1" not in shown


def test_a_bar_that_is_disabled_is_silent(capsys):
    bar = live_bar(pl)()
    bar.disable()
    settings = {"accelerator": "cpu", "enable_model_summary": False, "logger": False}
    pl.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[bar], **settings).fit(
        Logs(), Data()
    )
    assert "epoch" not in capsys.readouterr().out


def test_a_failed_fit_closes_the_bars(terminal, capsys):
    class Fails(Logs):
        def validation_step(self, batch, index):
            raise RuntimeError("no")

    bar = live_bar(pl)()
    settings = {"accelerator": "cpu", "enable_model_summary": False, "logger": False}
    with pytest.raises(RuntimeError, match="no"):
        pl.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[bar], **settings).fit(
            Fails(), Data()
        )
    capsys.readouterr()
    enter("stage")
    assert capsys.readouterr().err == ""
