"""A recipe in someone else's trainer: a list of callbacks, or one callback."""

import pytest
import torch
from omegaconf import OmegaConf

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.recipes.callbacks import recipe
from qat_tricks.recipes.registry import trick_config
from qat_tricks.settings.config_dir import options
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.weights import zeros


def test_several_trainings_are_no_list_of_callbacks():
    assert "learn_scales" in [trick.name for trick in recipe("int8_qat")]
    with pytest.raises(QatTricksError, match="run_stages"):
        recipe("int8_prune50_multistage")


def test_a_recipe_is_one_callback_too():
    lit, other = Lit().train(), Lit().train()
    overrides = ["stages.prune_qat.tricks.prune.sparsity=0.25"]
    one = qat_tricks.Recipe("int8_prune50", overrides)
    for given, callbacks in ((lit, [one]), (other, qat_tricks.recipe("int8_prune50", overrides))):
        torch.manual_seed(7)
        trainer(callbacks).fit(given, datamodule=Data())
    states = lit.state_dict(), other.state_dict()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []
    assert 0.25 <= zeros(lit) < 0.4


def test_a_config_lists_a_recipe_as_one_entry():
    from hydra.utils import instantiate

    config = OmegaConf.create(
        "callbacks:\n  quantize:\n    _target_: qat_tricks.Recipe\n    name: int8_ptq\n"
        "    overrides: [network=backbone]"
    )
    callbacks = [instantiate(entry) for entry in config.callbacks.values()]
    lit = Lit()
    trainer(callbacks).validate(lit, Data(), verbose=False)
    assert all(layer.weight_quantizer for layer in layers(lit.backbone).values())


@pytest.mark.parametrize("overrides", ["network=backbone", {"network": "backbone"}, [None], [5], 3])
@pytest.mark.parametrize("make", [qat_tricks.recipe, qat_tricks.Recipe])
def test_overrides_that_are_no_list_of_text_are_refused(make, overrides):
    with pytest.raises(QatTricksError, match=r"is not allowed: give a list of key=value"):
        make("int8_ptq", overrides)


@pytest.mark.parametrize("make", [qat_tricks.recipe, qat_tricks.Recipe])
def test_no_overrides_and_a_name_that_is_none(make):
    make("int8_ptq", None)
    with pytest.raises(QatTricksError, match="recipe=None is not allowed"):
        make(None)


def test_the_place_of_an_added_trick_may_leave_out_the_recipe():
    names = [
        trick.name for trick in qat_tricks.recipe("int8_ptq", ["+trick@stages.ptq.tricks=prune"])
    ]
    assert "prune" in names


@pytest.mark.parametrize("inside", [lambda given: [given], lambda given: given])
def test_a_recipe_may_lie_in_the_list_of_callbacks_as_a_list(inside):
    lit, expected = Lit().train(), Lit().train()
    run = trainer(inside(qat_tricks.recipe("int8_prune50", report=False)), max_epochs=1)
    alone = trainer(qat_tricks.recipe("int8_prune50", report=False), max_epochs=1)
    for fit, module in ((run, lit), (alone, expected)):
        torch.manual_seed(7)
        fit.fit(module, datamodule=Data())
    assert [type(c) for c in run.callbacks] == [type(c) for c in alone.callbacks]
    states = lit.state_dict(), expected.state_dict()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []
    run.validate(lit, Data(), verbose=False)


@pytest.mark.parametrize("make", [qat_tricks.recipe, qat_tricks.Recipe])
@pytest.mark.parametrize("override", ["stages.qat.lr=0.1", "recipe.stages.qat.epochs=3"])
def test_what_the_users_trainer_decides_is_no_override(make, override):
    with pytest.raises(QatTricksError, match=f"{override} is not allowed here.*max_epochs"):
        make("int8_qat", [override])


def test_a_stage_may_be_left_without_training():
    make = qat_tricks.recipe("int8_qat", ["stages.qat.epochs=0"])
    assert not make[0].trains


def test_every_trick_instantiates_from_its_own_yaml():
    from hydra.utils import instantiate

    for name in options("trick"):
        config = OmegaConf.create(trick_config(name))
        trick = instantiate(config)
        assert isinstance(trick, pl.Callback)
        assert trick.name == name
