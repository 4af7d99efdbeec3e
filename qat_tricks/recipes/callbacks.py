"""A recipe as callbacks, for an ordinary trainer of either Lightning package."""

from collections.abc import Sequence
from typing import Any

from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.fit_report import FitReport
from qat_tricks.recipes.recipe import StagedRecipe, load_recipe
from qat_tricks.trainer.session import Session


def recipe(name: str, overrides: Sequence[str] | None = None, *, report: bool = True) -> list[Any]:
    """The callbacks of a recipe, for a ``Trainer``; schedules are fractions of its epochs.

    Args:
        name: a recipe with at most one stage that trains.
        overrides: Hydra overrides, such as ``network=backbone`` or
            ``stages.qat.tricks.distill.weight=0.9``.
        report: whether a fit ends with a table of what was done, printed and logged (see
            ``recipes.fit_report``). For it the fit's validation runs twice before the training.

    Returns:
        The run's ``Session``, and the tricks in their order. Each is a ``Callback`` of every
        Lightning package that this process imports, now or later.

    Raises:
        QatTricksError: an unknown recipe or setting, or a recipe that needs several fits.
    """
    loaded = _of_one_fit(name, overrides)
    # The trainer needs the tricks in its own list, where it saves and restores their states.
    return [Session(**_session_settings(loaded, report)), *loaded.tricks]


class Recipe(Session):
    """A whole recipe as one callback, for configs that list callbacks by ``_target_``.

    Like ``qat_tricks.recipe`` it adds the recipe's tricks to the trainer.

    Args:
        name: a recipe with at most one stage that trains.
        overrides: Hydra overrides of the recipe.
        report: as of ``qat_tricks.recipe``.

    Raises:
        QatTricksError: an unknown recipe or setting, or a recipe that needs several fits.
    """

    def __init__(
        self, name: str, overrides: Sequence[str] | None = None, *, report: bool = True
    ) -> None:
        loaded = _of_one_fit(name, overrides)
        # The session adds the tricks in ``setup``, since one ``_target_`` makes one callback.
        super().__init__(loaded.tricks, **_session_settings(loaded, report))
        self.name = name


def _session_settings(loaded: StagedRecipe, report: bool) -> dict[str, Any]:
    return {
        "network": loaded.network,
        "untraced": loaded.untraced,
        "trains": bool(loaded.training),
        "report": FitReport(loaded.name) if report else None,
    }


def _of_one_fit(name: str, overrides: Sequence[str] | None) -> StagedRecipe:
    loaded = load_recipe(name, overrides)
    # A trainer runs one fit, and tricks of a stage behind it would come too early.
    training = [stage.name for stage in loaded.training]
    if len(training) > 1 or any(stage.epochs > 0 for stage in loaded.stages[:-1]):
        raise QatTricksError(
            f'recipe "{name}" trains in several stages ({", ".join(training)}) and cannot be one '
            f'list of callbacks: run it with qat_tricks.run_stages(module, datamodule, "{name}")'
        )
    return loaded
