"""The float network that a recipe starts from: loaded, or trained once and cached."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from platformdirs import user_cache_dir
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.files import write_tensors
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.models.build import build_model
from qat_tricks.progress import console, enter
from qat_tricks.trainer.framework import default_package
from qat_tricks.trainer.ranks import Ranks
from qat_tricks.trainer.schedule import check_trained
from qat_tricks.trainer.stage_name import name_stage
from qat_tricks.version import __version__

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = default_package()


def cache_dir() -> Path:
    """Returns the folder of the float baselines, in ``QAT_TRICKS_CACHE`` or the user's cache."""
    return Path(os.environ.get("QAT_TRICKS_CACHE") or user_cache_dir("qat_tricks")) / "baselines"


def prepare_baseline(
    config: DictConfig,
    module: Classifier,
    datamodule: pl.LightningDataModule,
    trainer: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Gives ``module`` its float weights: from ``model.weights``, from the cache, or trained here.

    A network trained here is cached under a key of everything that made it (model and its code,
    settings and images of the data, training, seed, versions), so that a sweep trains it once.

    Args:
        config: the composed config of a run.
        module: the classifier, with fresh weights.
        datamodule: set up.
        trainer: arguments of ``pl.Trainer``.
        ranks: the trainer's processes. Only rank zero reads and writes the cache; all of them get
            its weights.

    Raises:
        QatTricksError: ``model.weights`` are missing, damaged or of another network, or the
            baseline trains on no batch.
    """
    weights = config.model.weights
    if weights is not None:
        module.network = build_model(**{**module.hparams["model"], "weights": weights})
        if not config.baseline.finetune:
            return
    # Also with ``finetune``: the key holds the content of the weights' file.
    cached = None
    if config.baseline.cache:
        cached = cache_dir() / f"{ranks.on_zero(_key, config, module, datamodule)}.pt"
    if cached is None or not ranks.on_zero(_restore, module, cached):
        module.train().lr = config.baseline.lr
        fit = pl.Trainer(max_epochs=config.baseline.epochs, enable_checkpointing=False, **trainer)
        enter("float baseline")
        name_stage(fit, "float baseline").fit(module, datamodule=datamodule)
        if config.baseline.epochs > 0:
            check_trained(fit, "the float baseline")
        if cached is not None:
            ranks.on_zero(_cache, module, cached)
    # the ranks may have restored, trained or begun differently
    module.network.load_state_dict(ranks.on_zero(module.network.state_dict))


def _key(config: DictConfig, module: Classifier, datamodule: pl.LightningDataModule) -> str:
    """Returns a hash of everything that the trained weights depend on."""
    datamodule.setup("fit")
    dataset: Any = datamodule.train_dataloader().dataset
    made_by: dict[str, Any] = {
        name: OmegaConf.to_container(config[name], resolve=True)
        for name in ("model", "data", "baseline", "optimizer", "trainer")
    }
    weights = Path(str(config.model.weights))
    # a file's content counts, not its name
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    # Another version may train otherwise.
    made_by |= {
        "seed": config.seed,
        "weights": digest,
        "images": dataset.fingerprint(),
        "code": _code(module.network, str(config.model.factory)),
        "torch": torch.__version__,
        "qat_tricks": __version__,
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:24]


def _code(network: nn.Module, factory: str) -> str:
    """Returns a hash of a network's structure and, where they are the user's own, its sources."""
    digest = hashlib.sha256(repr(network).encode())
    modules = {type(part).__module__ for part in network.modules()} | {factory.rpartition(".")[0]}
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        # Of installed ones the version counts; without a file, as in a notebook, there is no more.
        if path is not None and name.partition(".")[0] not in ("torch", "torchvision", "timm"):
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _restore(module: Classifier, cached: Path) -> bool:
    """Loads the cached weights; returns whether there were any."""
    if not cached.is_file():
        return False
    try:
        module.network.load_state_dict(torch.load(cached, map_location="cpu", weights_only=True))
    # torch raises many kinds for a damaged file; training again mends all of them
    except Exception as error:
        console(stderr=True).print(
            f"the cached float baseline {cached.name} is damaged ({type(error).__name__}): "
            "training it again"
        )
        return False
    console().print("  float baseline: from the cache (baseline.cache=false trains it anew)")
    return True


def _cache(module: Classifier, cached: Path) -> None:
    try:
        write_tensors(module.network.state_dict(), cached)
    except QatTricksError as error:
        console(stderr=True).print(
            f"the float baseline could not be cached: {error}; the run goes on"
        )
