"""A run that was stopped anywhere ends as the one that was not: every tensor, to the last bit."""

import os
import signal

import pytest
import torch

import qat_tricks
from qat_tricks.tricks import Calibrate, Prune
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, ResumableLoader, differences, loader, trainer
from tests.helpers.process import run_forked

EPOCHS, STEPS = 3, 12


def run(folder, ckpt_path=None, *, seed=0, train=None, extra=(), **settings):
    """Fits ``int8_prune50`` with dropout, keeping a checkpoint a step, and returns the checkpoint
    of its end.
    """
    pl.seed_everything(11, verbose=False)
    lit = Lit(seed=seed).train()
    callbacks = qat_tricks.recipe("int8_prune50", ["stages.prune_qat.tricks.prune.updates=7"])
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, every_n_train_steps=1, filename="{step}", save_last=True
    )
    fit = trainer(
        [*callbacks, *extra, keep], max_epochs=EPOCHS, enable_checkpointing=True, **settings
    )
    fit.fit(
        lit,
        train if train is not None else ResumableLoader(),
        loader(32, seed=4),
        ckpt_path=ckpt_path,
    )
    fit.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True)


def end_of(checkpoint):
    """What must be the same: weights, scales, masks, spec, optimizer, schedules and generators."""
    callbacks = [
        state for name, state in checkpoint["callbacks"].items() if "ModelCheckpoint" not in name
    ]
    return {
        key: checkpoint[key]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "qat_tricks")
    } | {"": callbacks}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.fixture
def never_calibrated_again(monkeypatch):
    def never(*args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Calibrate, "apply", never)


@pytest.mark.feature("resume at any step, within and between epochs")
@pytest.mark.usefixtures("never_calibrated_again")
@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_at_any_step_is_exact(whole, tmp_path, step):
    folder, expected = whole
    # other weights, which the checkpoint replaces
    resumed = run(tmp_path, folder / f"step={step}.ckpt", seed=5)
    assert differences(end_of(expected), end_of(resumed)) == []


@pytest.mark.feature("resume: the pruning schedule goes on")
def test_the_pruning_schedule_goes_on_where_it_was(tmp_path, monkeypatch):
    reached = []
    renew = Prune._update

    def note(self, work, progress):
        due = renew(self, work, progress)
        reached.append((round(progress * STEPS), self.done, self.reached))
        return due

    monkeypatch.setattr(Prune, "_update", note)
    run(tmp_path)
    expected, reached[:] = list(reached), []
    run(tmp_path / "resumed", tmp_path / "step=5.ckpt")
    assert reached == expected[5:]
    assert len({sparsity for *_, sparsity in expected}) > 5


@pytest.mark.feature("resume from an epoch's end, order drawn by the loader")
def test_a_shuffling_loader_of_torch_goes_on_in_the_same_order(tmp_path):
    expected = run(tmp_path, train=loader(64, shuffle=True))
    resumed = run(tmp_path / "resumed", tmp_path / "step=8.ckpt", train=loader(64, shuffle=True))
    assert differences(end_of(expected), end_of(resumed)) == []


class Kill(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def be_killed(folder):
    """Runs in a process of its own, for it does not end."""
    run(folder, extra=[Kill()])


@pytest.mark.feature('resume after SIGKILL with ckpt_path="last"')
@pytest.mark.usefixtures("never_calibrated_again")
def test_a_killed_run_resumes_exactly_from_last(whole, tmp_path):
    killed = run_forked(be_killed, tmp_path, output=tmp_path / "output")
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path, "last", seed=5)
    assert differences(end_of(whole[1]), end_of(resumed)) == []


@pytest.mark.feature("resume under gradient accumulation and clipping")
def test_resume_between_accumulated_gradients(tmp_path):
    """A checkpoint is written only after an optimizer step, so that no gradient is lost."""
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    expected = run(tmp_path, **settings)
    resumed = run(tmp_path / "resumed", tmp_path / "step=3.ckpt", seed=5, **settings)
    assert differences(end_of(expected), end_of(resumed)) == []
