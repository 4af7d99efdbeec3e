"""Runs the stages of a recipe on a LightningModule, each with its own tricks and its own fit."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from qat_tricks.errors import QatTricksError
from qat_tricks.files import write_text
from qat_tricks.graph.inputs import check_loader, is_loader
from qat_tricks.graph.workbench import check_needs
from qat_tricks.recipes.recipe import Stage, StagedRecipe, load_recipe
from qat_tricks.recipes.run_key import plain_settings, run_key, training_fingerprint
from qat_tricks.settings.ranges import AUTO
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.learning_rate import MeasuredRate, set_rate
from qat_tricks.trainer.module import has_workbench, networks_in, workbench_of
from qat_tricks.trainer.schedule import check_trained
from qat_tricks.trainer.session import Session
from qat_tricks.trainer.set_up import set_up_trainer
from qat_tricks.trainer.stage_name import name_stage

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

KEY = "qat_tricks_run"  # a file beside checkpoints, which tells whose they are

AfterStage = Callable[[Stage, nn.Module], None]


def run_stages(
    module: "LightningModule",
    datamodule: "LightningDataModule | Iterable[Any]",
    recipe: str | StagedRecipe,
    *,
    val_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    after_stage: AfterStage | None = None,
    checkpoints: str | Path | None = None,
) -> "LightningModule":
    """Runs every stage of ``recipe`` and returns ``module``.

    Each stage has a ``Trainer`` of its own; that of a stage without training ends with the set-up.

    Args:
        module: a trained LightningModule, of either Lightning package, which the trainers come
            from too; its network is changed in place. A stage's ``lr`` is set as ``module.lr``
            if there is one, ``auto`` for SGD alone; else its own optimizer decides.
        datamodule: gives training images for calibration and for the fits; or a loader, or batches.
        recipe: a recipe, or its name.
        val_dataloaders: a loader of validation images, or several, beside a training loader.
        trainer: arguments of ``Trainer``, without ``max_epochs`` and ``callbacks`` of ours.
        after_stage: called with each stage and the network behind it; may raise to stop the run.
        checkpoints: a folder that gets a checkpoint of each fit with every epoch. With the same
            folder an interrupted fit goes on behind its last epoch; stages without training, which
            give the same again, are repeated. That of another module or recipe is refused.

    Raises:
        QatTricksError: an unknown recipe, an error of a trick, or a stage that trains on no batch.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    _check_float(module, recipe)
    settings, extra_callbacks = _trainer_settings(trainer)
    data = _data(datamodule, val_dataloaders)
    frozen = _held_in_evaluation(module, recipe.network)
    folder = _own_folder(checkpoints, module, recipe, settings, datamodule)
    own_rate = getattr(module, "lr", None)
    # A recipe without stages still gives a network that was traced, as for export.
    for stage in recipe.stages or [Stage(name="float", tricks=[])]:
        session = _session(recipe, stage, own_rate)
        # A trick is applied once in each stage, and may come again in a later one.
        if has_workbench(module):
            workbench_of(module).applied.clear()
        package = package_of(module)  # a trainer of the other one would not take the module
        if stage.epochs == 0:
            callbacks = [session, *stage.tricks]
            fit = set_up_trainer(package)(max_epochs=1, callbacks=callbacks, **settings)
        else:
            _set_rate(module, stage, own_rate)
            _train(module, frozen)
            callbacks = [session, *stage.tricks, *extra_callbacks]
            kept = _kept(package, folder, stage, callbacks)
            fit = package.Trainer(max_epochs=stage.epochs, **{**settings, **kept})
        name_stage(fit, stage.name).fit(module, **data, ckpt_path=_last(folder, stage))
        if stage.epochs > 0:
            check_trained(fit, f"stage {stage.name}")
        workbench_of(module).drop_reference()  # the float copy fits only this stage's network
        if after_stage is not None and recipe.stages:
            after_stage(stage, workbench_of(module).network)
    return module


def _own_folder(
    checkpoints: str | Path | None,
    module: nn.Module,
    recipe: StagedRecipe,
    settings: Mapping[str, Any],
    datamodule: Any,
) -> Path | None:
    """Makes the folder ``checkpoints`` that of this run; returns it, None without one.

    Raises:
        QatTricksError: it has fits of another module or recipe, with other arguments of the
            trainer, or on other images.
    """
    if checkpoints is None:
        return None
    folder, of_recipe = Path(checkpoints), (recipe.network, recipe.untraced, recipe.prove)
    # A data module is set up only by its trainer, and has no data set yet.
    besides = (plain_settings(settings), training_fingerprint(datamodule))
    path, key = folder / KEY, run_key(module, [recipe], *besides, of_recipe)
    if path.is_file() and path.read_text(encoding="utf-8") != key:
        raise QatTricksError(
            f"{folder} has fits of another module or recipe, of other settings or other images: "
            "give another folder, or delete that one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, key)
    return folder


def _kept(package: Any, folder: Path | None, stage: Stage, callbacks: list[Any]) -> dict[str, Any]:
    """The callbacks of a stage's fit, with one that keeps its newest checkpoint in ``folder``."""
    if folder is None:
        return {"callbacks": callbacks}
    # Of a class of its own: Lightning tells callbacks with a state by that, and users have theirs.
    kind = type("StageCheckpoint", (package.callbacks.ModelCheckpoint,), {"state_key": KEY})
    keep = kind(
        dirpath=folder,
        filename=stage.name,
        enable_version_counter=False,  # the newest one takes the place of the one before
        save_on_train_epoch_end=True,  # validation may come within an epoch, or not in each
    )
    return {"callbacks": [*callbacks, keep], "enable_checkpointing": True}


def _last(folder: Path | None, stage: Stage) -> Path | None:
    """The checkpoint from which a stage's fit goes on."""
    if folder is None or stage.epochs == 0:
        return None
    path = folder / f"{stage.name}.ckpt"
    return path if path.is_file() else None


def check_arguments(trainer: Any) -> None:
    """Raises QatTricksError unless ``trainer`` holds arguments of a ``Trainer``, or is None."""
    if not isinstance(trainer or {}, Mapping):
        raise QatTricksError(
            f"trainer={type(trainer).__name__} is not allowed: give the arguments of a Trainer, as "
            "in {'accelerator': 'gpu'}"
        )


def _check_float(module: nn.Module, recipe: StagedRecipe) -> None:
    """Refuses a module that a later stage would refuse, before the first one changes it."""
    if has_workbench(module):
        check_needs(workbench_of(module).network, recipe.tricks)


def _trainer_settings(given: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """The arguments of each stage's trainer but for callbacks, and the user's callbacks.

    Raises:
        QatTricksError: an argument that a stage decides.
    """
    check_arguments(given)
    settings = {"enable_checkpointing": False, "logger": False, **(given or {})}
    callbacks = settings.pop("callbacks", None) or []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    # Lightning refuses a callback that keeps checkpoints where they are not enabled.
    if any(map(_keeps_checkpoints, callbacks)):
        settings["enable_checkpointing"] = (given or {}).get("enable_checkpointing", True)
    if "max_epochs" in settings:
        raise QatTricksError(
            f"trainer={{'max_epochs': {settings['max_epochs']}}} is not allowed: a stage has its "
            "own epochs; set them in the recipe, as stages.qat.epochs"
        )
    return settings, callbacks


def _keeps_checkpoints(callback: Any) -> bool:
    return any(kind.__name__ == "Checkpoint" for kind in type(callback).__mro__)


def _set_rate(module: Any, stage: Stage, own: Any) -> None:
    """Sets the learning rate that ``stage`` names; one that is measured comes with the fit."""
    rate = own if stage.lr is None else stage.lr  # an earlier stage may have set another
    if rate != AUTO and hasattr(module, "lr") and module.lr is not rate:
        set_rate(module, rate)


def _session(recipe: StagedRecipe, stage: Stage, own_rate: Any) -> Session:
    measures_rate = stage.epochs > 0 and stage.lr == AUTO and own_rate is not None
    return Session(
        rate=MeasuredRate(own_rate) if measures_rate else None,
        network=recipe.network,
        untraced=recipe.untraced,
        prove=recipe.prove,
        fits=stage.epochs > 0,
        # Before the first stage: the teacher of every stage is the float network.
        keeps_teacher=any(trick.needs_teacher for trick in recipe.tricks),
    )


def _data(datamodule: Any, val_dataloaders: Any) -> dict[str, Any]:
    """The arguments of ``fit`` for a data module, or for loaders.

    Raises:
        QatTricksError: it is neither, or loaders beside a data module.
    """
    if hasattr(datamodule, "train_dataloader"):
        if val_dataloaders is not None:
            raise QatTricksError(
                "val_dataloaders beside a data module is not allowed: let its val_dataloader give "
                "them"
            )
        return {"datamodule": datamodule}
    for loader in [datamodule] if val_dataloaders is None else [datamodule, val_dataloaders]:
        check_loader(loader)
        if isinstance(loader, Iterator):
            raise QatTricksError(
                "the loader yields its batches only once, and stages go through them several "
                "times: give a DataLoader, or a list of batches, list(loader)"
            )
    return {
        "train_dataloaders": _loader_of(datamodule),
        "val_dataloaders": _loader_of(val_dataloaders),
    }


def _loader_of(loader: Any) -> Any:
    """A loader of a list of batches, which Lightning would take for a list of loaders."""
    if isinstance(loader, list | tuple | deque) and not all(map(is_loader, loader)):
        return DataLoader(loader, batch_size=None)  # type: ignore[arg-type]
    return loader


def _held_in_evaluation(module: nn.Module, network: str | None) -> list[nn.Module]:
    """The submodules that the user holds in evaluation mode while the others train.

    Not by name, for a BatchNorm that is kept becomes a part of its layer. Of a module, or a
    network, that is in evaluation mode as a whole, nobody knows which parts are meant to stay so.
    """
    networks = list(networks_in(module)) if network is None else [network]
    networks = networks if len(networks) == 1 else []  # parts of the module as a whole
    whole = [name for name, m in module.named_modules() if name in networks and not m.training]
    return [
        m
        for name, m in module.named_modules()
        if module.training
        and not m.training
        and not any(f"{name}.".startswith(f"{other}.") for other in whole)
    ]


def _train(module: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Puts ``module`` into training mode, for Lightning trains a module in the mode it finds it."""
    module.train()
    for part in frozen:
        part.training = False
