"""Builds a run's recipe from its config, fits it to the target, and applies ``stage``."""

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat_tricks.deploy.targets import target_named
from qat_tricks.jobs.config import StageOverride
from qat_tricks.recipes.recipe import Stage, StagedRecipe, build_recipe
from qat_tricks.settings.binding import Problems, make
from qat_tricks.tricks.mixed_precision import MixedPrecision
from qat_tricks.tricks.quantize import Quantize


def fitted_recipe(config: DictConfig) -> StagedRecipe:
    """Builds the recipe of a composed config, fitted to its target and ``stage``.

    Raises:
        QatTricksError: one line with every error in ``recipe``, ``target`` and ``stage``.
    """
    problems = Problems()
    # Each part is checked by itself, so that one error does not hide the others.
    override = problems.of(lambda: _stage_override(config))
    recipe = problems.of(lambda: build_recipe(config.recipe))
    target = problems.of(lambda: target_named(config.target))
    problems.report()
    assert override is not None
    assert recipe is not None
    assert target is not None
    return fit_recipe(recipe, config)


def fit_recipe(recipe: StagedRecipe, config: DictConfig) -> StagedRecipe:
    """Fits a recipe that was made for this run to its config; its tricks are changed.

    Its quantizers are fitted to ``config.target``, and ``config.stage`` replaces the settings of
    its stages.
    """
    target, override = target_named(config.target), _stage_override(config)
    for trick in recipe.tricks:
        if isinstance(trick, Quantize):
            # The tricks were made for this run, and no other recipe shares them.
            trick.settings = trick.settings.limited_to(target)
        if isinstance(trick, MixedPrecision):
            trick.limit(target)
    return replace(recipe, stages=[_overridden(stage, override) for stage in recipe.stages])


def _stage_override(config: DictConfig) -> StageOverride:
    settings: Any = OmegaConf.to_container(config.stage)
    return make("stage", StageOverride, settings)


def _overridden(stage: Stage, override: StageOverride) -> Stage:
    settings: dict[str, Any] = {"max_drop": override.max_drop}
    if stage.epochs > 0:  # a stage without training stays one
        settings |= {"epochs": override.epochs, "lr": override.lr}
    return replace(stage, **{key: value for key, value in settings.items() if value is not None})
