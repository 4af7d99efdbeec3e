"""One session a run, whatever the number of tricks, and wherever they come from."""

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of
from qat_tricks.trainer import session as session_module
from qat_tricks.trainer.session import Session
from qat_tricks.tricks import Distill, FoldBatchnorm, Prune, Quantize
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
    assert len(callbacks) == 10
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
