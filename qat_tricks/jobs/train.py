"""Runs one job: data, float baseline, the stages of a recipe, export, and the evidence."""

from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat_tricks.data import ImageData
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.logits import check_batch_first, has_one_logit
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.trace import check_untraced
from qat_tricks.jobs.baseline import prepare_baseline
from qat_tricks.jobs.classifier import make_classifier
from qat_tricks.jobs.datamodule import ImageDataModule, load_data
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.jobs.run_record import RunRecord
from qat_tricks.recipes.recipe import Stage
from qat_tricks.recipes.stages import run_stages
from qat_tricks.trainer.compiling import CompileNetwork
from qat_tricks.trainer.framework import default_package
from qat_tricks.trainer.log_layers import LogLayers
from qat_tricks.trainer.ranks import Ranks

Logger = Any  # one of Lightning's loggers, several, or False


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
        QatTricksError: the input is bad, a stage loses more than it may, or an export does not run
            as simulated.
    """
    package = default_package()
    package.seed_everything(config.seed, workers=True, verbose=False)
    recipe = fitted_recipe(config)
    data = load_data(config.data)
    module = make_classifier(config, data)
    trainer: dict[str, Any] = {
        **OmegaConf.to_container(config.trainer, resolve=True),  # type: ignore[dict-item]
        "logger": logger,
    }
    if trainer.pop("compile", False):  # a user's own trainer config may lack it
        trainer["callbacks"] = [CompileNetwork()]
    _check_classes(module.network, data)  # training would fail only at its first loss
    check_untraced(module.network, recipe.untraced)  # before the baseline is trained

    datamodule = ImageDataModule(data)
    # Before the baseline: the other processes start here, from the top of the program.
    ranks = Ranks(package.Trainer(enable_checkpointing=False, **trainer).strategy)
    record = RunRecord(config, folder, recipe, data, module)

    def after_stage(stage: Stage, network: nn.Module) -> None:
        network.to("cpu").eval()  # on every rank: the next stage begins with it
        ranks.on_zero(record.after_stage, stage, network)

    ranks.on_zero(record.save_config)
    try:
        prepare_baseline(config, module, datamodule, trainer, ranks)
        module.network.to("cpu").eval()
        ranks.on_zero(record.measure_float, module.network)
        trainer = _with_layers_logged(trainer)
        run_stages(module, datamodule, recipe, trainer=trainer, after_stage=after_stage)
        return ranks.on_zero(record.finish, logger)
    # Lightning ends an interrupted fit with SystemExit
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            # not on_zero: the other processes may be gone
            rank_zero_only(record.save_interrupted)()
        raise


def _with_layers_logged(trainer: dict[str, Any]) -> dict[str, Any]:
    """The trainer's arguments for the stages; the float baseline has no layers to log."""
    if not trainer["logger"]:
        return trainer
    return {**trainer, "callbacks": [*trainer.get("callbacks", ()), LogLayers()]}


def _check_classes(network: nn.Module, data: ImageData) -> None:
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
