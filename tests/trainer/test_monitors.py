"""What is judged before the pruning schedule has ended is not the best."""

import logging
import math

import pytest
import torch

import qat_tricks
from qat_tricks.tricks import Prune
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, ResumableLoader, differences, loader, trainer
from tests.helpers.weights import zeros

EPOCHS, STEPS = 3, 12


class Falling(Lit):
    """Its first networks are the best ones."""

    def validation_step(self, batch, _):
        self(batch[0])
        self.log("val_acc", 1.0 / (1 + self.trainer.global_step))


class MyCheckpoint(pl.callbacks.ModelCheckpoint):
    """As users derive one."""


def keeper(folder, kind=pl.callbacks.ModelCheckpoint, **settings):
    given = {"monitor": "val_acc", "mode": "max", "filename": "{epoch}"}
    return kind(folder, **{**given, **settings})


def fit(callbacks, *, end=0.6, epochs=EPOCHS, path=None, lit=None, **settings):
    pl.seed_everything(11, verbose=False)
    tricks = qat_tricks.recipe(
        "int8_prune50",
        ["stages.prune_qat.tricks.prune.updates=7", f"stages.prune_qat.tricks.prune.end={end}"],
    )
    run = trainer(
        [callbacks[0], *tricks, *callbacks[1:]],
        max_epochs=epochs,
        enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        **settings,
    )
    lit = (lit or Falling()).train()
    run.fit(lit, ResumableLoader(), loader(32, seed=4), ckpt_path=path)
    return run, lit


def zeros_in(path):
    return zeros(qat_tricks.load_from_checkpoint(Falling, path))


@pytest.mark.feature('ModelCheckpoint(monitor=...), also ckpt_path="best": the best is pruned')
@pytest.mark.parametrize("end", [0.6, 1.0])
def test_the_best_network_has_the_final_sparsity(tmp_path, end, caplog):
    # Another test may have quieted the logger.
    caplog.set_level(logging.INFO, logger=f"{pl.__name__}.utilities.rank_zero")
    first = keeper(tmp_path / "one", filename="best")
    second = keeper(tmp_path / "two", MyCheckpoint, save_top_k=2, save_last=True)
    every = pl.callbacks.ModelCheckpoint(tmp_path / "all", save_top_k=-1)
    run, lit = fit([first, second, every], end=end)
    assert zeros(lit) >= 0.5
    assert zeros_in(first.best_model_path) >= 0.5
    # the only file of its name: none of an earlier network is left behind
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["best.ckpt"]
    assert float(first.best_model_score) == pytest.approx(1 / (1 + STEPS))
    assert second.best_model_path == str(tmp_path / "two" / "epoch=2.ckpt")
    assert zeros_in(second.last_model_path) >= 0.5
    assert len(list((tmp_path / "all").iterdir())) == EPOCHS
    (line,) = [r.getMessage() for r in caplog.records if "pruning ends" in r.getMessage()]
    batch = {0.6: 8, 1.0: 12}[end]
    assert line == (
        f'pruning ends at batch {batch} of 12 (epoch 2), and ModelCheckpoint(monitor="val_acc") '
        'and MyCheckpoint(monitor="val_acc") will not count what comes before'
    )
    run.test(lit, loader(32, seed=4), ckpt_path="best", verbose=False)
    assert run.ckpt_path == first.best_model_path


def test_files_are_written_before_and_resuming_in_the_midst_changes_nothing(tmp_path):
    def callbacks(folder):
        return [
            keeper(folder, save_last=True, filename="best"),
            pl.callbacks.EarlyStopping("val_acc", mode="max", patience=2),
            pl.callbacks.ModelCheckpoint(
                folder / "steps", save_top_k=-1, every_n_train_steps=1, filename="{step}"
            ),
        ]

    def end_of(run):
        run.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
        states = [
            {
                key: value
                for key, value in state.items()
                if "path" not in key and key not in ("dirpath", "best_k_models")
            }
            for state in saved["callbacks"].values()
        ]
        return states, saved["state_dict"], saved["optimizer_states"]

    run, _ = fit(whole := callbacks(tmp_path / "whole"))
    expected = end_of(run)
    for step in (2, 5, 9):
        path = tmp_path / "whole" / "steps" / f"step={step}.ckpt"
        resumed, _ = fit(again := callbacks(tmp_path / f"from {step}"), path=path)
        assert differences(expected, end_of(resumed)) == []
        assert float(again[0].best_model_score) == float(whole[0].best_model_score)
        assert zeros_in(again[0].best_model_path) >= 0.5
    early = torch.load(tmp_path / "whole" / "steps" / "step=5.ckpt", weights_only=True)
    (kept,) = [
        state
        for name, state in early["callbacks"].items()
        if "'val_acc'" in name and "ModelCheckpoint" in name
    ]
    assert kept["best_model_path"].endswith("best.ckpt")  # of epoch 0, to go on from


@pytest.mark.feature("EarlyStopping: counts from the schedule's end on")
def test_early_stopping_waits_for_the_schedule():
    def stopped_after(**settings):
        stopping = pl.callbacks.EarlyStopping("val_acc", mode="max", patience=1, **settings)
        run, lit = fit([stopping], epochs=6, end=0.5)
        return run.current_epoch, zeros(lit), stopping

    # pruned after three epochs; the fourth is the first that counts, the fifth is worse
    epochs, share, _ = stopped_after()
    assert epochs == 5
    assert share >= 0.5
    epochs, share, stopping = stopped_after(stopping_threshold=0.01)
    assert epochs == 4
    assert share >= 0.5
    assert stopping.stopping_threshold == 0.01


def test_early_stopping_still_stops_at_nan():
    class Nan(Lit):
        def validation_step(self, batch, _):
            self.log("val_acc", math.nan)

    run, _ = fit([pl.callbacks.EarlyStopping("val_acc", mode="max")], lit=Nan())
    assert run.current_epoch == 1


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 5


def test_a_fit_that_ends_too_early_says_so(tmp_path):
    stopping = pl.callbacks.EarlyStopping("val_acc", mode="max", stopping_threshold=2.0)
    with pytest.warns(UserWarning, match=r"the best network of ModelCheckpoint\(.*is no sparser"):
        fit([keeper(tmp_path), Stop(), stopping])
    assert stopping.stopping_threshold == 2.0


def test_one_that_validates_no_more_says_that_there_is_no_best(tmp_path):
    keep = keeper(tmp_path)
    stopping = pl.callbacks.EarlyStopping("val_acc", mode="max", stopping_threshold=2.0)
    with pytest.warns(UserWarning, match="has kept no network since pruning ended"):
        fit([keep, stopping], check_val_every_n_epoch=2)
    assert keep.best_model_path == ""
    assert stopping.stopping_threshold == 2.0


def test_a_metric_from_before_judges_no_network_of_after(tmp_path):
    """Between validations, checkpoints of steps are judged by the last validation's metric."""
    keep = keeper(tmp_path, every_n_train_steps=1, filename="{step}")
    stopping = pl.callbacks.EarlyStopping("val_acc", mode="max")
    fit([keep, stopping], epochs=4, end=0.5)
    # pruned at step 8, and validated again at step 12
    assert float(keep.best_model_score) == pytest.approx(1 / 13)
    assert float(stopping.best_score) == pytest.approx(1 / 13)
    assert keep.best_model_path == str(tmp_path / "step=13.ckpt")
    # and where nothing is kept after the only validation, what is pruned is the best
    keep = keeper(tmp_path / "last", every_n_train_steps=1, filename="{step}")
    fit([keep])
    assert zeros_in(keep.best_model_path) >= 0.5


def test_a_metric_of_training_is_not_forgotten_at_a_validation(tmp_path):
    class Rising(Falling):
        def training_step(self, batch, index):
            self.log("train", float(self.trainer.global_step))
            return super().training_step(batch, index)

    keep = keeper(tmp_path, monitor="train", mode="min", every_n_train_steps=1, filename="{step}")
    fit([keep], lit=Rising())
    assert float(keep.best_model_score) == 8  # the first with the last masks


def test_networks_that_are_pruned_already_are_not_held_back(tmp_path):
    _, lit = fit([keeper(tmp_path / "first")])
    keep = keeper(tmp_path / "second")
    fit([keep], lit=lit)
    assert keep.best_model_path.endswith("epoch=0.ckpt")
    assert zeros_in(keep.best_model_path) >= 0.5


@pytest.mark.feature("averaging begins at the pruning schedule's end")
@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_begin_when_pruning_has_ended(kind):
    if not hasattr(pl.callbacks, kind):
        pytest.skip("came with Lightning 2.6")

    class Counts(pl.Callback):
        seen: list = []

        def on_train_batch_end(self, trainer, *_):
            (callback,) = (c for c in trainer.callbacks if hasattr(c, "_average_model"))
            self.seen.append(int(callback._average_model.n_averaged))

    counts = Counts()
    counts.seen = []
    _, lit = fit([pl.Callback(), getattr(pl.callbacks, kind)(), counts])
    assert counts.seen == [*range(1, 9), *range(1, 5)]
    assert zeros(lit) >= 0.5


def test_stochastic_weight_averaging_begins_anew():
    swa = pl.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    _, lit = fit([pl.Callback(), swa], epochs=6, end=0.5)
    # an epoch each after the first, and none of those before the fourth counts
    assert int(swa.n_averaged) == 2
    assert zeros(lit) >= 0.5


def test_without_the_trick_nothing_is_held_back(tmp_path):
    run = trainer([keep := keeper(tmp_path)], max_epochs=2, enable_checkpointing=True)
    run.fit(Falling(), ResumableLoader(), loader(32, seed=4))
    assert not any(isinstance(c, Prune) for c in run.callbacks)
    assert keep.best_model_path.endswith("epoch=0.ckpt")
