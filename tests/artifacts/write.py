"""Writes what test_written_before.py reads; README.md says with which version it was run."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch

import qat_tricks
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.mid_epoch import ARTIFACTS, SAVED_AFTER, arithmetic, fit
from tests.helpers.nets import images

OVERRIDES = [
    "recipe=int8_ptq",
    "data=fake",
    "data.noise=0.8",
    "model=custom",
    "model.factory=tests.helpers.nets.SmallNet",
    "baseline.epochs=12",
    "baseline.cache=false",
    "measure.runs=5",
    "measure.threads=1",
    "trainer.enable_progress_bar=false",
    "logger=none",
]


class Save(pl.Callback):
    """Writes a checkpoint after a batch; a ModelCheckpoint would note the path of its folder."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == SAVED_AFTER:
            trainer.save_checkpoint(ARTIFACTS / "mid_epoch.ckpt")


def write_run():
    """The files of a ``train.py`` run."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from qat_tricks.cli import train; train(sys.argv[1:])"
        command = [sys.executable, "-c", code, *OVERRIDES, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True)
        for name in ("model.ckpt", "model.onnx", "model_fp32.onnx"):
            shutil.copy(Path(folder) / name, ARTIFACTS / name)
        stages = json.loads((Path(folder) / "report.json").read_text())["stages"]
    measured = {row["name"]: {key: row[key] for key in ("accuracy", "nll")} for row in stages}
    expected = {"fp32": measured["fp32"], "simulated": measured["ptq"], "onnx": measured["onnx"]}
    (ARTIFACTS / "model_expected.json").write_text(json.dumps(expected, indent=2) + "\n")


def write_fit():
    """A checkpoint from the middle of an epoch, and the state in which that fit ended."""
    lit = fit(seed=0, callbacks=[Save()])
    torch.save({"made_with": arithmetic(), **lit.state_dict()}, ARTIFACTS / "mid_epoch_end.pt")


def write_whole():
    """A checkpoint of a network with a submodule that was not traced through, and its logits."""
    lit = Lit()
    callbacks = qat_tricks.recipe("int8_ptq", ["whole=[block]"])
    run = trainer(callbacks)
    run.validate(lit, Data(), verbose=False)
    run.save_checkpoint(ARTIFACTS / "whole.ckpt", weights_only=True)
    torch.save(lit.eval()(images(4)).detach(), ARTIFACTS / "whole_logits.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_run()
    write_fit()
    write_whole()
