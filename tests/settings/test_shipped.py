"""Shipped recipes, composed without Hydra."""

from shutil import copytree

import pytest
from omegaconf import OmegaConf

from qat_tricks.recipes.recipe import GUIDELINE
from qat_tricks.settings.compose import Composer
from qat_tricks.settings.config_dir import config_dir, options
from qat_tricks.settings.shipped import NeedsHydraError, compose_recipe

RECIPES = [name for name in options("recipe") if name != GUIDELINE]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_without_hydra_as_hydra_composes_it(name):
    by_hydra = OmegaConf.to_container(Composer("train").compose([f"recipe={name}"]).config.recipe)
    by_hand = compose_recipe(name, config_dir())
    assert by_hand == by_hydra
    # The order of the tricks is the order of their execution.
    for stage, settings in by_hydra["stages"].items():
        assert list(by_hand["stages"][stage]["tricks"]) == list(settings["tricks"])
    assert list(by_hand["stages"]) == list(by_hydra["stages"])


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nname: mine",
        "defaults:\n  - /trick@stages.ptq.tricks: quantize",
        "defaults:\n  - /stage@stages.ptq: [ptq]",
        "defaults:\n  - /trick: [quantize]",
        "- quantize",
    ],
    ids=["package", "one name", "another group", "no place", "list"],
)
def test_a_form_that_only_hydra_reads_is_left_to_it(tmp_path, text):
    (tmp_path / "recipe").mkdir()
    copytree(config_dir() / "trick", tmp_path / "trick")
    (tmp_path / "recipe" / "mine.yaml").write_text(text + "\n")
    with pytest.raises(NeedsHydraError):
        compose_recipe("mine", tmp_path)
