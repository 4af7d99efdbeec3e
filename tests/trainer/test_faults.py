"""What goes wrong in long runs: the one before is used, the fault is told, and what was reached is
kept.
"""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qat_tricks
from qat_tricks.cli import main as cli
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import read_report
from qat_tricks.graph import spec_of
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.trainer.checkpoints import save_checkpoint
from qat_tricks.tricks import LearnScales
from tests.helpers import ROOT
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, dataset, differences, trainer
from tests.helpers.nets import images


def run(
    folder,
    ckpt_path=None,
    *,
    extra=(),
    recipe="int8_qat",
    overrides=(),
    lit=None,
    train=None,
    **checkpoints,
):
    lit = lit or Lit().train()
    pl.seed_everything(2, verbose=False)
    settings = {
        "save_top_k": -1,
        "every_n_train_steps": 1,
        "filename": "{step}",
        "save_last": True,
        **checkpoints,
    }
    keep = pl.callbacks.ModelCheckpoint(dirpath=folder, **settings)
    fit = trainer(
        [*qat_tricks.recipe(recipe, overrides), *extra, keep],
        max_epochs=2,
        enable_checkpointing=True,
    )
    fit.fit(lit, train or ResumableLoader(), ckpt_path=ckpt_path)
    return lit


@pytest.mark.feature("a damaged last checkpoint: the previous one is used, said aloud")
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path):
    expected = run(tmp_path).state_dict()
    for newest in ("step=8.ckpt", "last.ckpt"):
        (tmp_path / newest).write_bytes((tmp_path / newest).read_bytes()[:3000])
    with pytest.warns(
        UserWarning,
        match=r"last\.ckpt cannot be read .* the previous one is used, .*step=7\.ckpt, of step 7",
    ):
        found = run(tmp_path, "last", lit=Lit(seed=5).train()).state_dict()
    assert differences(expected, found) == []


@pytest.mark.feature("a damaged checkpoint that was named is refused in one line")
def test_a_damaged_checkpoint_that_was_named_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "step=8.ckpt").write_bytes(b"nothing")
    with pytest.raises(QatTricksError, match=r"step=8\.ckpt cannot be read as a checkpoint"):
        run(tmp_path, tmp_path / "step=8.ckpt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for some three checkpoints, and what makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system takes the rights of root")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    subprocess.run(["umount", disk], check=True)


@pytest.mark.feature(
    "disk full while saving: a small tmpfs fills, and the run resumes from what was whole"
)
def test_a_full_file_system_leaves_a_checkpoint_that_resumes(tmp_path, small_disk):
    expected = run(tmp_path / "whole").state_dict()
    disk, enlarge = small_disk
    with pytest.raises(OSError, match="No space left"):
        run(disk)
    assert len(list(disk.glob("step=*.ckpt"))) < 8
    enlarge()
    found = run(disk, "last", lit=Lit(seed=5).train()).state_dict()
    assert differences(expected, found) == []


def test_save_checkpoint_on_a_full_file_system_keeps_the_one_before(small_disk):
    disk, _ = small_disk
    save_checkpoint(Lit(), disk / "a.ckpt")
    before = (disk / "a.ckpt").read_bytes()
    (disk / "filler").write_bytes(bytes(256 * 1024 - 4096 - len(before) - 4096))
    with pytest.raises(QatTricksError, match=r"a\.ckpt\" cannot be written .*No space left"):
        save_checkpoint(Lit(seed=1), disk / "a.ckpt")
    assert (disk / "a.ckpt").read_bytes() == before
    assert sorted(path.name for path in disk.iterdir()) == ["a.ckpt", "filler"]


@pytest.mark.feature("disk full while saving: the checkpoint before stays, and resumes")
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole").state_dict()
    from fsspec.implementations import local

    written, move = [], local.LocalFileOpener.commit

    def full(self):
        written.append(self.path)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(self)

    with monkeypatch.context() as patch:
        patch.setattr(local.LocalFileOpener, "commit", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "full")
    assert len(list((tmp_path / "full").glob("step=*.ckpt"))) < 8
    found = run(tmp_path / "full", "last", lit=Lit(seed=5).train()).state_dict()
    assert differences(expected, found) == []


@pytest.mark.feature("disk full while save_checkpoint writes: one line, nothing half-written")
def test_save_checkpoint_leaves_nothing_half_written(tmp_path, monkeypatch):
    save_checkpoint(Lit(), tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()

    def full(path, data):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(QatTricksError, match=r"a\.ckpt\" cannot be written .*No space left"):
        save_checkpoint(Lit(seed=1), tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class Mortal(torch.utils.data.Dataset):
    """Images whose loading worker dies at the ``fatal``-th."""

    def __init__(self, fatal):
        self.fatal, self.images = fatal, dataset()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.fatal and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index]


def die(folder):
    """Ends in the error of a worker that died, out of a signal that pytest would meet too."""
    calibrate = [
        f"stages.ptq.tricks.{trick}.num_images=8"
        for trick in ("equalize", "calibrate", "correct_bias")
    ]
    calibrate.append("stages.qat.tricks.restore_batchnorm.num_images=8")
    calibrate.append("prove=false")  # which would ask for more images
    torch.set_num_threads(1)
    run(
        folder,
        train=torch.utils.data.DataLoader(Mortal(60), batch_size=8, num_workers=1),
        overrides=calibrate,
    )


@pytest.mark.feature("a data loader's worker dies: the run ends, and resumes from last")
def test_a_run_whose_worker_died_resumes_exactly(tmp_path):
    code = f"import tests.trainer.test_faults as t; t.die({str(tmp_path / 'died')!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # what torch says depends on what it notices first: the signal, the silence or a closed socket
    assert done.returncode == 1
    kept = torch.load(tmp_path / "died" / "last.ckpt", weights_only=True)["global_step"]
    assert 1 <= kept < 8
    found = run(
        tmp_path / "died", "last", train=torch.utils.data.DataLoader(dataset(), batch_size=8)
    )
    assert torch.isfinite(found.eval()(images(4))).all()


class Diverge(pl.Callback):
    """Spoils one scale in the third step."""

    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            pl_module.get_parameter(self.name).data.fill_(float("nan"))


@pytest.mark.feature("NaN loss: the fit stops and names the layer whose scale went first")
@pytest.mark.parametrize("what", ["activation_quantizers.relu.scale", "head.weight"])
def test_a_loss_that_is_no_number_names_what_went_first(tmp_path, what):
    lit = Lit().train()
    name = "scale of activation_quantizers.relu" if "scale" in what else "weight of head"
    with pytest.raises(
        QatTricksError,
        match=f"loss is nan in step 3: the {name} is no finite number.*learning rate",
    ):
        run(tmp_path, extra=[Diverge(f"backbone.{what}")], lit=lit)
    resumed = run(tmp_path, tmp_path / "step=2.ckpt")
    assert torch.isfinite(resumed.eval()(images(4))).all()


@pytest.mark.feature("NaN loss: images or the loss itself")
def test_a_loss_that_is_no_number_without_a_cause_in_the_network(tmp_path):
    class Broken(Lit):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * (
                float("inf") if self.trainer.global_step == 2 else 1
            )

    with pytest.raises(
        QatTricksError, match="loss is inf in step 2: all weights and scales are finite"
    ):
        run(tmp_path, lit=Broken().train())


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also where a shell started the tests in the background and ignores it;
    Lightning ignores a second one.
    """
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


class Interrupt(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.feature("Ctrl-C: a checkpoint remains that resumes exactly")
def test_an_interrupted_fit_resumes_exactly_from_last(tmp_path, ctrl_c):
    expected = run(tmp_path / "whole", recipe="int8_prune50").state_dict()
    lit = Lit().train()
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", recipe="int8_prune50", extra=[Interrupt()], lit=lit)
    assert "training_step" not in lit.__dict__
    found = run(
        tmp_path / "stopped", "last", recipe="int8_prune50", lit=Lit(seed=5).train()
    ).state_dict()
    assert differences(expected, found) == []


@pytest.mark.feature("a data loader without images, or with NaN pixels, is refused")
def test_calibration_refuses_pixels_that_are_no_numbers():
    class Bad(Data):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(
                [(torch.full((1, 8, 8), float("nan")), 0)] * 4, batch_size=2
            )

    with pytest.raises(QatTricksError, match="NaN or infinite pixels"):
        trainer(qat_tricks.recipe("int8_ptq")).test(Lit(), Bad(), verbose=False)


@pytest.mark.feature("Ctrl-C of train.py: a usable checkpoint and a report remain")
def test_an_interrupted_run_leaves_a_checkpoint_and_a_report(tmp_path, monkeypatch, capsys, ctrl_c):
    def interrupt(self, trainer, pl_module, loss):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LearnScales, "on_before_backward", interrupt)
    monkeypatch.chdir(tmp_path)
    settings = (
        "recipe=int8_qat data=fake model=custom model.factory=tests.helpers.nets.SmallNet "
        "logger=none hydra.run.dir=run baseline.epochs=1 measure.runs=5 measure.threads=1 "
        "measure.min_top1_agreement=0 trainer.accelerator=cpu trainer.enable_progress_bar=false"
    )
    with pytest.raises(SystemExit) as ended:
        cli.train(settings.split())
    assert ended.value.code == cli.INTERRUPTED
    kept = read_report(tmp_path / "run")
    assert [stage["name"] for stage in kept["stages"]] == ["fp32", "ptq"]
    assert kept["interrupted"] is True
    assert "ptq" in (tmp_path / "run" / "report.md").read_text()
    assert "interrupted.ckpt" in capsys.readouterr().out
    module = qat_tricks.load_from_checkpoint(Classifier, tmp_path / "run" / "interrupted.ckpt")
    assert spec_of(module.network)["history"][-1] == "learn_scales"
