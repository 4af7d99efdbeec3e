import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.schedule import check_fraction, fit_progress, total_batches
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, ResumableLoader, trainer

PER_EPOCH = 4


class Note(pl.Callback):
    """Notes before each batch, and at the end, how far the fit has come."""

    def __init__(self, stop_before=None):
        self.stop_before, self.seen = stop_before, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((total_batches(trainer), fit_progress(trainer)))
        if trainer.global_step == self.stop_before:
            raise RuntimeError("stopped")

    def on_train_end(self, trainer, pl_module):
        self.seen.append((total_batches(trainer), fit_progress(trainer)))


def fit(note, **settings):
    run = trainer([note], **settings)
    run.fit(Lit().train(), datamodule=Data())
    return run


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
