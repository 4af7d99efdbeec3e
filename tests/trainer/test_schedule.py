import logging
import math

import pytest
from torch import nn, optim

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.trainer.schedule import check_fraction, fit_progress, foreseen_batches
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, trainer
from tests.helpers.weights import zeros

PER_EPOCH = 4


class Note(pl.Callback):
    """Notes before each batch, and at the end, how far the fit has come."""

    def __init__(self, stop_before=None):
        self.stop_before, self.seen = stop_before, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((foreseen_batches(trainer), fit_progress(trainer)))
        if trainer.global_step == self.stop_before:
            raise RuntimeError("stopped")

    def on_train_end(self, trainer, pl_module):
        self.seen.append((foreseen_batches(trainer), fit_progress(trainer)))


def fit(note, lit=None, **settings):
    run = trainer([note], **settings)
    run.fit((lit or Lit()).train(), datamodule=Data())
    return run


class ByHand(Lit):
    """Steps with both of its optimizers, once in ``every`` batches."""

    def __init__(self, every):
        super().__init__()
        self.automatic_optimization, self.every = False, every
        self.other, self.sparsities = nn.PReLU(), []

    def configure_optimizers(self):
        return [optim.SGD(part.parameters(), 0.01) for part in (self.backbone, self.other)]

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        if self.trainer.fit_loop.epoch_loop.total_batch_idx % self.every == self.every - 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        self.sparsities.append(zeros(self) if layers(self) else 0.0)


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": 2, "max_steps": 50}, 8),
        ({"max_epochs": -1, "max_steps": 6}, 6),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 8),
        ({"max_epochs": 9, "max_steps": 3, "accumulate_grad_batches": 2}, 6),
        # 3 of the 4 batches of an epoch make a step, and the last one another
        ({"max_epochs": 9, "max_steps": 5, "accumulate_grad_batches": 3}, 11),
    ],
    ids=str,
)
def test_progress_is_the_share_of_the_batches_that_are_done(settings, total):
    note = Note()
    fit(note, **settings)
    assert {of for of, _ in note.seen} == {total}
    assert [share for _, share in note.seen] == [batch / total for batch in range(total + 1)]


@pytest.mark.parametrize(
    ("plan", "steps", "total"),
    [
        # 4 steps, then 2 in an epoch: the second one's batches 1 to 3, and its last
        ({0: 1, 1: 3}, 7, 11),
        ({0: 3, 2: 1}, 6, 10),
    ],
)
@pytest.mark.parametrize("settings", [{"max_epochs": -1}, {"max_epochs": 9}], ids=str)
def test_gradients_of_more_batches_from_an_epoch_on_are_foreseen(plan, steps, total, settings):
    note, accumulation = Note(), pl.callbacks.GradientAccumulationScheduler(plan)
    run = trainer([accumulation, note], max_steps=steps, **settings)
    run.fit(Lit().train(), datamodule=Data())
    assert note.seen == [(total, batch / total) for batch in range(total + 1)]


@pytest.mark.parametrize(("every", "batches"), [(1, 6), (3, 18)])
def test_of_a_module_that_optimizes_by_hand_steps_count(every, batches):
    note, lit = Note(), ByHand(every)
    fit(note, lit, max_epochs=-1, max_steps=12)  # of two optimizers
    done = [step // every for step in range(batches + 1)]
    assert note.seen == [(math.inf, 2 * count / 12) for count in done]
    # what ends first counts
    note = Note()
    fit(note, ByHand(every), max_epochs=1, max_steps=1000)
    assert [share for _, share in note.seen] == [batch / 4 for batch in range(5)]


@pytest.mark.parametrize("every", [1, 3])
def test_a_module_that_optimizes_by_hand_is_pruned_by_its_steps(every, tmp_path, caplog):
    lit = ByHand(every)
    callbacks = qat_tricks.recipe("int8_prune50", ["~stages.prune_qat.tricks.distill"])
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_acc")
    with caplog.at_level(logging.INFO, logger=f"{pl.__name__}.utilities.rank_zero"):
        run = trainer([*callbacks, best], max_epochs=-1, max_steps=24, enable_checkpointing=True)
        run.fit(lit.train(), datamodule=Data())
    batches = 12 * every
    assert len(lit.sparsities) == batches
    assert lit.sparsities[-1] >= 0.5
    assert lit.sparsities[batches // 4] < 0.5  # the schedule ends at 0.6 of the fit
    assert "pruning ends when 60% of the fit is done" in caplog.text


def test_a_resumed_fit_goes_on_where_it_was(tmp_path):
    whole, first, second = Note(), Note(), Note()

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    for callbacks, path in (([whole], None), ([first, Save()], None), ([second], "middle.ckpt")):
        run = trainer(callbacks, max_epochs=3)
        path = path and tmp_path / path
        run.fit(Lit().train(), ResumableLoader(), ckpt_path=path)
    assert first.seen == whole.seen
    assert second.seen == whole.seen[6:]


@pytest.mark.parametrize("settings", [{"max_epochs": -1, "max_time": "00:00:01:00"}])
def test_a_fit_without_an_end_has_no_progress(settings):
    with pytest.raises(QatTricksError, match=r"give it max_epochs .* or max_steps"):
        fit(Note(), **settings)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_fractions_lie_between_0_and_1(value):
    assert check_fraction("start", 0) == 0
    assert check_fraction("start", 1.0) == 1.0
    with pytest.raises(QatTricksError, match=r"start=.* is not allowed: give a fraction"):
        check_fraction("start", value)
