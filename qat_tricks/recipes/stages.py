"""Runs the stages of a recipe on a LightningModule, each with its own tricks and its own fit."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from qat_tricks.graph.inputs import Inputs, input_names, inputs_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import Stage, StagedRecipe, load_recipe
from qat_tricks.trainer.calibration_images import datamodule_images
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.module import attach_workbench, find_network
from qat_tricks.trainer.ranks import loaded_once
from qat_tricks.trainer.session import Session

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

AfterStage = Callable[[Stage, nn.Module], None]


def run_stages(
    module: "LightningModule",
    datamodule: "LightningDataModule",
    recipe: str | StagedRecipe,
    *,
    trainer: Mapping[str, Any] | None = None,
    after_stage: AfterStage | None = None,
) -> "LightningModule":
    """Runs every stage of ``recipe`` and returns ``module``.

    Each stage that trains has a ``Trainer`` of its own.

    Args:
        module: a trained LightningModule, of either Lightning package, which the trainers come
            from too; its network is changed in place. A stage's ``lr`` is set as ``module.lr``
            if the module has that attribute; else its own optimizer decides.
        datamodule: gives training images for calibration and for the fits.
        recipe: a recipe, or its name.
        trainer: arguments of ``Trainer``, without ``max_epochs`` and ``callbacks`` of ours.
        after_stage: called after each stage with the stage and the network; may raise to stop the
            run.

    Raises:
        QatTricksError: an unknown recipe, or an error of a trick.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    settings = {"enable_checkpointing": False, "logger": False, **(trainer or {})}
    extra_callbacks = list(settings.pop("callbacks", None) or [])
    name = find_network(module, recipe.network)
    network = module.get_submodule(name)
    # Before the first stage: the teacher of every stage is the float network.
    teacher = copy.deepcopy(network) if any(t.needs_teacher for t in recipe.tricks) else None
    work = Workbench(network, teacher=teacher, untraced=recipe.untraced)
    attach_workbench(module, work, name)
    for stage in recipe.stages:
        if stage.epochs == 0:
            # Without a trainer the module's ``forward`` is not run: a batch holds the network's
            # inputs.
            names = input_names(work.network)
            work.loader = partial(loaded_once, partial(_calibration_inputs, datamodule, names))
            work.trains = False
            stage.apply(work)
        else:
            work.applied.clear()
            if stage.lr is not None and hasattr(module, "lr"):
                module.lr = stage.lr  # type: ignore[assignment]
            module.train()  # Lightning trains a module in the mode it finds it
            # The session takes the workbench that the module has by now.
            callbacks = [Session(network=name), *stage.tricks, *extra_callbacks]
            # A trainer of the other Lightning package would not take the module.
            make_trainer = package_of(module).Trainer
            fit = make_trainer(max_epochs=stage.epochs, callbacks=callbacks, **settings)
            fit.fit(module, datamodule=datamodule)
        if after_stage is not None:
            after_stage(stage, work.network)
    return module


def _calibration_inputs(
    datamodule: "LightningDataModule", names: Sequence[str], num_images: int
) -> Iterator[Inputs]:
    """The inputs, called ``names``, of the training images of a data module."""
    # A trainer would do this, and a stage without training has none.
    datamodule.setup("fit")
    return (inputs_of(batch, names) for batch in datamodule_images(datamodule, num_images))
