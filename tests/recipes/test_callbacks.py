"""A recipe in someone else's trainer: a list of callbacks, or one callback."""

import pytest
import torch
from omegaconf import OmegaConf

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import layers
from qat_tricks.recipes.callbacks import recipe
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
