"""Runs one job: data, float baseline, the stages of a recipe, export, and the evidence."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat_tricks.data import ImageData
from qat_tricks.errors import QatTricksError
from qat_tricks.files import reserved
from qat_tricks.graph.logits import check_batch_first, has_one_logit
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.trace import check_untraced
from qat_tricks.jobs.baseline import prepare_baseline
from qat_tricks.jobs.classifier import Classifier, make_classifier
from qat_tricks.jobs.config import settle_root
from qat_tricks.jobs.datamodule import ImageDataModule, load_data
from qat_tricks.jobs.fitted_recipe import fit_recipe, fitted_recipe
from qat_tricks.jobs.guideline import guideline
from qat_tricks.jobs.guideline_result import Guideline
from qat_tricks.jobs.run_record import RunRecord
from qat_tricks.jobs.validate_deployed import ValidateDeployed
from qat_tricks.progress import live
from qat_tricks.recipes.guideline_steps import GuidelineSettings
from qat_tricks.recipes.recipe import GUIDELINE, Stage, StagedRecipe
from qat_tricks.recipes.stages import run_stages
from qat_tricks.trainer.compiling import CompileNetwork
from qat_tricks.trainer.framework import default_package
from qat_tricks.trainer.live_bar import live_bar
from qat_tricks.trainer.log_layers import LogLayers
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.ranks import Ranks

DEPLOYED_SHARE = 0.05  # of a fit's time, for the accuracy of the exported file while it trains

Logger = Any  # one of Lightning's loggers, several, or False


@live()
def run_job(config: DictConfig, folder: Path, logger: Logger = False) -> dict[str, Any]:
    """Runs one composed and checked config.

    All processes of ``config.trainer`` train; only the first measures, exports, writes, prints and
    logs.

    The folder holds ``report.html``, ``report.md``, ``report.json``, ``ledger.json``,
    ``model.onnx``, ``model_fp32.onnx``, ``model.ckpt``, ``config.yaml`` and, of every stage but the
    last, ``stages/NAME.onnx``. An interrupted run leaves its measurements so far, and
    ``interrupted.ckpt``.

    Args:
        config: composed from ``conf/train.yaml``.
        folder: is made, and gets the files.
        logger: for the trainer.

    Returns:
        The report.

    Raises:
        InUseError: another run writes into the folder.
        QatTricksError: the input is bad, a stage loses more than it may, or an export does not run
            as simulated.
    """
    package = default_package()
    package.seed_everything(config.seed, workers=True, verbose=False)
    settle_root(config)
    recipe = fitted_recipe(config)
    data = load_data(config.data)
    module = make_classifier(config, data)
    trainer = _trainer_settings(config, logger)
    _check_network(module.network, data, recipe)

    datamodule = ImageDataModule(data)
    # Before the baseline: the other processes start here, from the top of the program.
    ranks = Ranks(package.Trainer(enable_checkpointing=False, **trainer).strategy)
    record = RunRecord(config, folder, recipe, data, module)

    def after_stage(stage: Stage, network: nn.Module) -> None:
        network.to("cpu").eval()  # on every rank: the next stage begins with it
        ranks.on_zero(record.after_stage, stage, network)

    with ExitStack() as held, _saved_if_interrupted(record):
        ranks.on_zero(lambda: held.enter_context(reserved(folder)))
        ranks.on_zero(record.save_config)
        prepare_baseline(config, module, datamodule, trainer, ranks)
        module.network.to("cpu").eval()
        ranks.on_zero(record.measure_float, module.network)
        stages = {**trainer, "callbacks": [*trainer["callbacks"], *_logging(logger)]}
        if recipe.name == GUIDELINE:
            result = _run_guideline(config, folder, recipe, module, datamodule, stages)
            record.take_guideline(result)
            after_stage(record.recipe.stages[0], workbench_of(record.module).network)
        else:
            run_stages(module, datamodule, recipe, trainer=stages, after_stage=after_stage)
        return ranks.on_zero(record.finish, logger)


@contextmanager
def _saved_if_interrupted(record: RunRecord) -> Iterator[None]:
    """Saves the network of a run that its user ends."""
    try:
        yield
    # Lightning ends an interrupted fit with SystemExit
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            # not on_zero: the other processes may be gone
            rank_zero_only(record.save_interrupted)()
        raise


def _trainer_settings(config: DictConfig, logger: Logger) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(config.trainer, resolve=True)
    # a user's own trainer config may lack it
    callbacks: list[Any] = [CompileNetwork()] if settings.pop("compile", False) else []
    if settings.get("enable_progress_bar", True):
        callbacks.append(live_bar(default_package())())
    return {**settings, "callbacks": callbacks, "logger": logger}


def _run_guideline(
    config: DictConfig,
    folder: Path,
    recipe: StagedRecipe,
    module: Classifier,
    datamodule: ImageDataModule,
    trainer: dict[str, Any],
) -> Guideline:
    """Runs the guideline with the settings of a composed config, in ``folder/guideline``."""

    def prepare(step: StagedRecipe) -> StagedRecipe:
        settings = {key: getattr(recipe, key) for key in ("network", "untraced", "prove")}
        return replace(fit_recipe(step, config), **settings)

    aims = {field.name: config[field.name] for field in fields(GuidelineSettings)}
    return guideline(
        module,
        datamodule,
        **aims,
        trainer=trainer,
        folder=folder / GUIDELINE,
        seed=config.seed,
        prepare=prepare,
    )


def _logging(logger: Logger) -> list[Any]:
    """The callbacks of stages that train, for a logger; the float baseline has no such layers."""
    return [LogLayers(), ValidateDeployed(max_share=DEPLOYED_SHARE)] if logger else []


def _check_network(network: nn.Module, data: ImageData, recipe: StagedRecipe) -> None:
    """Refuses what would fail only when the baseline is trained, or at its first loss."""
    check_untraced(network, recipe.untraced)
    images, _ = next(iter(data.test_dataloader()))
    with evaluating(network), torch.no_grad():
        logits = network(images[:1])
    check_batch_first(logits, 1)
    if has_one_logit(logits) and data.num_classes <= 2:
        return  # one logit tells two classes apart
    if logits.shape[-1] != data.num_classes:
        raise QatTricksError(
            f"the network has {logits.shape[-1]} classes and the data {data.num_classes}: choose a "
            f"network or weights with {data.num_classes}, or data with {logits.shape[-1]}"
        )
