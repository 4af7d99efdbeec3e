"""Runs the stages of a recipe on a LightningModule: its own tricks and its own fit for each stage."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import nn

from qat_tricks.graph.inputs import Inputs, input_names, inputs_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.ptq import do_stage
from qat_tricks.recipes.recipe import Recipe, Stage, load_recipe
from qat_tricks.trainer.ranks import loaded_once
from qat_tricks.trainer.session import attach_workbench, find_network

AfterStage = Callable[[Stage, nn.Module], None]


def run_stages(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    recipe: str | Recipe,
    *,
    trainer: Mapping[str, Any] | None = None,
    after_stage: AfterStage | None = None,
) -> pl.LightningModule:
    """Runs every stage of ``recipe``, those that train with a new ``pl.Trainer`` each, and returns
    ``module``.

    Args:
        module: a trained LightningModule; its network is changed in place. A stage's ``lr`` is set
            as ``module.lr`` where the module has that attribute; else its own optimizer decides.
        datamodule: gives training images for calibration and for the fits.
        recipe: a recipe, or its name.
        trainer: arguments of ``pl.Trainer``, without ``max_epochs`` and ``callbacks`` of ours.
        after_stage: called after each stage with the stage and the network; may raise to stop the
            run.

    Raises:
        QatTricksError: an unknown recipe, or whatever a trick finds wrong.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    settings = {"enable_checkpointing": False, "logger": False, **(trainer or {})}
    extra_callbacks = list(settings.pop("callbacks", None) or [])
    name = find_network(module, recipe.network)
    teacher = (
        copy.deepcopy(module.get_submodule(name))
        if any(t.needs_teacher for t in recipe.tricks)
        else None
    )
    work = attach_workbench(
        module, Workbench(module.get_submodule(name), teacher=teacher, untraced=recipe.whole), name
    )
    for stage in recipe.stages:
        if stage.epochs == 0:
            work.loader = partial(
                loaded_once, partial(_calibration_inputs, datamodule, input_names(work.network))
            )
            work.trains = False
            do_stage(stage, work)
        else:
            work.applied.clear()
            if stage.lr is not None and hasattr(module, "lr"):
                module.lr = stage.lr  # type: ignore[assignment]
            module.train()  # Lightning trains a module in the mode it finds it
            fit = pl.Trainer(
                max_epochs=stage.epochs, callbacks=[*stage.tricks, *extra_callbacks], **settings
            )
            fit.fit(module, datamodule=datamodule)
        if after_stage is not None:
            after_stage(stage, work.network)
    return module


def _calibration_inputs(
    datamodule: pl.LightningDataModule, names: Sequence[str], num_images: int
) -> Iterator[Inputs]:
    return (inputs_of(batch, names) for batch in calibration_images(datamodule, num_images))


def calibration_images(datamodule: pl.LightningDataModule, num_images: int) -> Iterable[Any]:
    """Batches of training images of a data module: from its ``calibration_loader`` (without
    augmentation) if it has one.
    """
    datamodule.setup("fit")
    if hasattr(datamodule, "calibration_loader"):
        return datamodule.calibration_loader(num_images)
    return datamodule.train_dataloader()
