import copy

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers, spec_of
from qat_tricks.trainer.checkpoints import save_checkpoint
from tests.helpers.lit import Data, Lit, loader, trainer
from tests.helpers.nets import images


def _same_state(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize("data", ["datamodule", "loaders"])
def test_fit_in_someone_elses_trainer(data):
    lit = Lit()
    callbacks = qat_tricks.recipe("int8_prune50")
    given = (
        {"datamodule": Data()}
        if data == "datamodule"
        else {"train_dataloaders": loader(), "val_dataloaders": loader()}
    )
    trainer(callbacks, max_epochs=3).fit(lit.train(), **given)
    quantized = lit.backbone.eval()
    assert all(
        layer.weight_quantizer and layer.input_quantizer for layer in layers(quantized).values()
    )
    weights = torch.cat(
        [layer.effective_weight().flatten() for layer in layers(quantized).values()]
    )
    assert (weights == 0).float().mean() >= 0.5
    assert lit.backbone(images(2)).shape == (2, 4)


def test_ptq_needs_no_fit_and_further_runs_change_nothing():
    lit = Lit()
    run = trainer(qat_tricks.recipe("int8_ptq"))
    run.validate(lit, Data(), verbose=False)
    state = copy.deepcopy(lit.state_dict())
    run.test(lit, Data(), verbose=False)
    trainer(qat_tricks.recipe("int8_ptq")).test(lit, Data(), verbose=False)
    assert _same_state(state, lit.state_dict()) == []


def test_evaluation_changes_nothing_and_training_goes_on():
    lit = Lit().train()
    run = trainer(
        qat_tricks.recipe("int8_qat"), num_sanity_val_steps=2, val_check_interval=0.5, max_epochs=1
    )
    run.fit(lit, datamodule=Data())
    state = copy.deepcopy(lit.state_dict())
    run.validate(lit, Data(), verbose=False)
    assert _same_state(state, lit.state_dict()) == []
    trainer().fit(lit, datamodule=Data())  # no inference tensor is left that breaks a backward
    assert _same_state(state, lit.state_dict()) != []


def test_checkpoint_stands_alone(tmp_path):
    lit = Lit().train()
    run = trainer(qat_tricks.recipe("int8_prune30"))
    run.fit(lit, datamodule=Data())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    save_checkpoint(lit, tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        torch.load(tmp_path / name, weights_only=True)
        loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / name)
        assert torch.equal(loaded(images(4)), lit.eval()(images(4)))
        assert spec_of(loaded.backbone) == spec_of(lit.backbone)
    fresh = Lit(seed=3)
    trainer(qat_tricks.recipe("int8_prune30")).test(
        fresh, Data(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False
    )
    assert torch.equal(fresh.eval()(images(4)), lit(images(4)))


def test_float_checkpoint_loads_as_it_is(tmp_path):
    lit = Lit().eval()
    save_checkpoint(lit, tmp_path / "float.ckpt")
    loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / "float.ckpt")
    assert torch.equal(loaded(images(4)), lit(images(4)))


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "x.ckpt"
    with pytest.raises(QatTricksError, match="there is no checkpoint"):
        qat_tricks.load_from_checkpoint(Lit, path)
    save_checkpoint(Lit(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(QatTricksError, match="cannot be read as a checkpoint"):
        qat_tricks.load_from_checkpoint(Lit, path)
    torch.save({"something": 1}, path)
    with pytest.raises(QatTricksError, match="holds no state_dict"):
        qat_tricks.load_from_checkpoint(Lit, path)


def test_schedules_need_an_end():
    with pytest.raises(QatTricksError, match="max_epochs"):
        trainer(qat_tricks.recipe("int8_prune50"), max_epochs=-1, max_time="00:00:01:00").fit(
            Lit().train(), datamodule=Data()
        )
