"""A recipe as callbacks, for an ordinary trainer of either Lightning package."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.fit_report import FitReport
from qat_tricks.recipes.recipe import StagedRecipe, load_recipe
from qat_tricks.trainer.session import Session

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# A stage's epochs or learning rate in an override; 0 epochs leave its training out.
_OF_THE_TRAINER = re.compile(r"[+~]*(?:recipe\.)?stages\.[^.=]+\.(?:lr$|lr=|epochs$|epochs=(?!0$))")


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
    return Callbacks([Session(**_session_settings(loaded, report)), *loaded.tricks])


class Callbacks(list[Any]):
    """The callbacks of a recipe, in order.

    A trainer that is given the list inside of another one, ``callbacks=[recipe(name)]``, finds them
    as if they had been there themselves.
    """

    state_key = "Callbacks"  # by which Lightning calls it in a profile

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Puts the callbacks into the trainer's own list, in the place of this one."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        place = next(index for index, callback in enumerate(callbacks) if callback is self)
        # In place, for Lightning is walking through this list by index, and goes on behind the
        # first of ours.
        callbacks[place : place + 1] = self
        self[0].setup(trainer, pl_module, stage)

    def on_exception(self, *_: Any) -> None:
        """Of an error before the set-up."""


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
        "prove": loaded.prove,
        "trains": bool(loaded.training),
        "report": FitReport(loaded.name) if report else None,
    }


def _of_one_fit(name: str, overrides: Sequence[str] | None) -> StagedRecipe:
    loaded = load_recipe(name, overrides)
    for override in overrides or ():
        if _OF_THE_TRAINER.match(override):
            raise QatTricksError(
                f"{override} is not allowed here, where your own trainer decides the epochs "
                "(max_epochs) and your optimizer the learning rate: leave it out, or run the "
                f'recipe\'s own stages with qat_tricks.run_stages(module, datamodule, "{name}")'
            )
    # A trainer runs one fit, and tricks of a stage behind it would come too early.
    training = [stage.name for stage in loaded.training]
    if len(training) > 1 or any(stage.epochs > 0 for stage in loaded.stages[:-1]):
        raise QatTricksError(
            f'recipe "{name}" trains in several stages ({", ".join(training)}) and cannot be one '
            f'list of callbacks: run it with qat_tricks.run_stages(module, datamodule, "{name}")'
        )
    return loaded
