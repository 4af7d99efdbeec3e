"""Configs composed without Hydra's global state, and every override that fails explained."""

import pytest
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.compose import Composer, unknown_path


def test_overrides_that_fail_are_left_out_and_the_others_applied():
    config, problems = Composer("train").compose(["sed=1", "seed=2", "recipe=int8_ptq", "data=x"])
    assert (config.seed, config.recipe.name, config.data.name) == (2, "int8_ptq", "digits")
    assert [problem.partition(":")[0] for problem in problems] == [
        'the config has no setting "sed"',
        'unknown data "x"',
    ]


def test_a_users_folder_adds_to_the_shipped_configs(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("mine", "digits"):
        (tmp_path / "data" / f"{name}.yaml").write_text("name: mine\n")
    composer = Composer("train", tmp_path)
    assert composer.compose(["data=mine"]).config.data.name == "mine"
    assert composer.compose(["data=digits"]).config.data.name == "digits"
    with pytest.raises(QatTricksError, match="is not a folder"):
        Composer("train", tmp_path / "none")


def test_the_part_of_a_key_that_is_missing_is_named():
    config = OmegaConf.create({"a": {"b": {"size": 1}}, "trainer": {"devices": 1}, "hydra": {}})
    assert unknown_path(config, "a.b.size") is None
    assert unknown_path(config, "a.c.size") == 'a has no setting "c": allowed: b'
    assert unknown_path(config, "b.size") == (
        'the config has no setting "b": did you mean a.b.size?'
    )
    assert unknown_path(config, "a.b.size.x") == 'a.b.size is a value and has no setting "x"'
    assert "+trainer.nodes=" in unknown_path(config, "trainer.nodes")
