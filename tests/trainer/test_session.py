"""One session a run, whatever the number of tricks, and wherever they come from."""

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer import session as session_module
from qat_tricks.trainer.session import Session
from qat_tricks.tricks import Distill, FoldBatchnorm, Prune, Quantize
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.weights import zeros


def test_housekeeping_is_done_once_however_many_tricks_there_are(monkeypatch):
    calls = []
    for name in ("renew_parameters", "check_order", "find_network", "keep_grids"):
        original = getattr(session_module, name)
        monkeypatch.setattr(
            session_module,
            name,
            lambda *args, name=name, original=original, **kwargs: (
                calls.append(name),
                original(*args, **kwargs),
            )[1],
        )
    callbacks = qat_tricks.recipe("int8_prune50")
    assert len(callbacks) == 11
    trainer(callbacks, max_epochs=1).fit(Lit().train(), datamodule=Data())
    assert sorted(set(calls)) == ["check_order", "find_network", "keep_grids", "renew_parameters"]
    assert [calls.count(name) for name in ("check_order", "find_network", "renew_parameters")] == [
        1,
        1,
        1,
    ]
    assert calls.count("keep_grids") == 2  # one validation, and the end


@pytest.mark.parametrize("recipe", ["int8_prune50", "w4a4_qat"])
def test_callbacks_begin_afresh_in_a_second_fit(recipe):
    """As in cross-validation: one list, several modules."""
    callbacks = qat_tricks.recipe(recipe)
    first, second, alone = Lit(seed=0).train(), Lit(seed=1).train(), Lit(seed=1).train()
    trainer(callbacks).fit(first, datamodule=Data())
    for lit, given in ((second, callbacks), (alone, qat_tricks.recipe(recipe))):
        torch.manual_seed(7)
        trainer(given).fit(lit, datamodule=Data())
    if recipe == "int8_prune50":
        assert zeros(first) >= 0.5
        assert zeros(second) >= 0.5
    states = second.state_dict(), alone.state_dict()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


def test_a_distilled_second_fit_has_its_own_teacher():
    distill = Distill(weight=1.0)
    lits = [Lit(seed=seed).train() for seed in (0, 1)]
    expected = [{k: v.clone() for k, v in lit.backbone.state_dict().items()} for lit in lits]
    for lit, own in zip(lits, expected, strict=True):
        trainer([distill], max_epochs=1).fit(lit, datamodule=Data())
        taught = distill.state_dict()["teacher"]
        assert all(torch.equal(taught[key], own[key]) for key in own)


def test_tricks_without_a_session_work():
    lit = Lit().train()
    run = trainer([FoldBatchnorm(), Prune(sparsity=0.5, end=0.5)])
    run.fit(lit, datamodule=Data())
    assert zeros(lit) >= 0.5
    assert spec_of(lit.backbone)["history"] == ["fold_batchnorm", "prune"]
    assert [type(callback) for callback in run.callbacks[:2]] == [Session, FoldBatchnorm]


def test_tricks_that_cannot_work_are_refused_in_one_line():
    with pytest.raises(QatTricksError, match="calibrate needs quantize before it"):
        trainer([qat_tricks.tricks.Calibrate()]).fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="an order that works: fold_batchnorm, quantize"):
        trainer([Quantize(), FoldBatchnorm()]).fit(Lit().train(), datamodule=Data())


def test_two_recipes_in_one_trainer_are_refused():
    both = [*qat_tricks.recipe("int8_ptq"), qat_tricks.Recipe("fp32")]
    with pytest.raises(QatTricksError, match="two recipes are in one trainer"):
        trainer(both).validate(Lit(), Data(), verbose=False)


class Sparsity(pl.Callback):
    """Notes the share of pruned weights at each training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        masks = [layer.weight_mask.flatten() for layer in layers(pl_module.backbone).values()]
        self.seen.append(float((torch.cat(masks) == 0).float().mean()))


@pytest.mark.parametrize("before", ["validate", "test"])
def test_a_fit_after_a_validation_has_its_whole_schedule(before):
    def fit(first):
        lit, seen = Lit().train(), Sparsity()
        run = trainer([*qat_tricks.recipe("int8_prune50"), seen])
        if first is not None:
            with pytest.warns(UserWarning, match="nothing was trained yet"):
                getattr(run, first)(lit, Data(), verbose=False)
        lit.train()
        run.fit(lit, datamodule=Data())
        return seen.seen

    assert fit(before) == fit(None)
    assert fit(None)[0] < 0.3


def test_a_recipe_that_is_told_not_to_train_prunes_at_once():
    lit = Lit()
    overrides = ["stages.prune_qat.epochs=0"]
    trainer(qat_tricks.recipe("int8_prune50", overrides)).validate(lit, Data(), verbose=False)
    assert zeros(lit) >= 0.5


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_without_training_says_that_nothing_was_pruned(settings):
    with pytest.warns(UserWarning, match=r"sparsity is 0\.000, not yet 0\.5"):
        trainer(qat_tricks.recipe("int8_prune50"), **settings).fit(Lit().train(), datamodule=Data())


class MakesItsCallbacks(Lit):
    def configure_callbacks(self):
        return [qat_tricks.Recipe("int8_prune50")]


def test_a_module_may_make_its_recipe_for_each_call():
    lit, run = MakesItsCallbacks().train(), trainer([Sparsity()])
    run.fit(lit, datamodule=Data())
    assert zeros(lit) >= 0.5
    for _ in range(2):
        run.validate(lit, Data(), verbose=False)
    names = [type(callback).__name__ for callback in run.callbacks]
    assert names.count("Prune") == names.count("Recipe") == 1


class Late(Lit):
    def __init__(self):
        super().__init__()
        del self.backbone


def test_a_module_without_a_network_is_told_where_to_make_it():
    with pytest.raises(QatTricksError, match="make it in __init__, setup or configure_model"):
        trainer(qat_tricks.recipe("int8_ptq")).validate(Late(), Data(), verbose=False)


@pytest.fixture
def gated(monkeypatch):
    """A workbench that asks for images while it is made, unless the network is traced already."""
    made = []

    class Gated(Workbench):
        def __init__(self, network, loader=None, **settings):
            super().__init__(network, loader, **settings)
            made.append(len(self.batches(4)[0]) if self.network is not network else None)
            assert self.loader is loader is not None

    monkeypatch.setattr(session_module, "Workbench", Gated)
    return made


class Counting(Data):
    asked = 0

    def train_dataloader(self):
        type(self).asked += 1
        return super().train_dataloader()


def test_the_workbench_has_its_loader_before_the_network_is_traced(gated):
    for run in (
        lambda: trainer(qat_tricks.recipe("int8_qat")).fit(Lit().train(), datamodule=Data()),
        lambda: trainer(qat_tricks.recipe("int8_ptq")).test(Lit(), Data(), verbose=False),
        lambda: qat_tricks.run_stages(Lit(), Data(), "int8_ptq"),
    ):
        run()
    assert gated == [4, 4, 4]


def test_a_rebuilt_network_has_its_loader_too_and_does_not_ask_it(gated, tmp_path):
    lit = Lit()
    run = trainer(qat_tricks.recipe("int8_ptq"))
    run.test(lit, Data(), verbose=False)
    run.save_checkpoint(tmp_path / "a.ckpt")
    Counting.asked = 0
    again = trainer(qat_tricks.recipe("int8_ptq"))
    again.test(Lit(seed=3), Counting(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert gated == [4, None]
    assert Counting.asked == 0


@pytest.mark.feature("one trainer for two fits")
def test_a_trainer_that_has_reached_its_end_is_refused():
    run = trainer(qat_tricks.recipe("int8_prune50"))
    run.fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="has reached max_epochs=2 in an earlier fit"):
        run.fit(Lit(seed=1).train(), datamodule=Data())
    run = trainer(qat_tricks.recipe("int8_prune50"), max_epochs=-1, max_steps=3)
    run.fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="has reached max_steps=3 in an earlier fit"):
        run.fit(Lit(seed=1).train(), datamodule=Data())


@pytest.mark.feature("ModelPruning is refused")
def test_callbacks_that_cannot_work_beside_the_tricks_are_refused():
    callback = pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    for callbacks in (
        [callback, *qat_tricks.recipe("int8_qat")],
        [*qat_tricks.recipe("int8_qat"), callback],
    ):
        lit = Lit().train()
        with pytest.raises(QatTricksError, match=r"ModelPruning prunes .*the trick") as error:
            trainer(callbacks).fit(lit, datamodule=Data())
        assert "\n" not in str(error.value)
        assert not layers(lit.backbone)


def test_a_callback_of_functions_works_beside_the_tricks():
    seen = []
    beside = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda *_: seen.append(1))
    lit = Lit().train()
    trainer([beside, *qat_tricks.recipe("int8_qat")]).fit(lit, datamodule=Data())
    assert seen == [1, 1]
    assert layers(lit.backbone)
