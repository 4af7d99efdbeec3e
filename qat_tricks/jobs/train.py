"""One run: data, float baseline, the stages of a recipe, export, and the evidence in the run's
folder.
"""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from qat_tricks.data import ImageData, build_data
from qat_tricks.data.module import Batches
from qat_tricks.deploy.cost.device import measure_device, measure_runtime
from qat_tricks.deploy.cost.forecast import Forecast, forecast_network
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.deploy.cost.weights import file_bytes, weight_sparsity
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.normalization import BUILT_IN, build_in_normalization
from qat_tricks.deploy.parity.runtimes import Predict, check_parity, parity, predictor
from qat_tricks.deploy.runtimes.registry import REFERENCE
from qat_tricks.deploy.targets import target_named
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.ledger import Ledger, LedgerRow, check_drop
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier
from qat_tricks.evidence.report import REQUIRED_KEYS, write_report
from qat_tricks.jobs.baseline import prepare_baseline
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.jobs.config import recipe_of, timing
from qat_tricks.jobs.datamodule import ImageDataModule
from qat_tricks.jobs.loggers import log_report
from qat_tricks.recipes.recipe import Stage, StagedRecipe
from qat_tricks.recipes.stages import run_stages
from qat_tricks.trainer.checkpoints import save_checkpoint
from qat_tricks.trainer.framework import default_package
from qat_tricks.trainer.ranks import Ranks
from qat_tricks.tricks.quantize import Quantize

PARITY_IMAGES = 512  # images on which each export is compared with its simulation

Logger = Any  # one of Lightning's loggers, several, or False


def run_job(config: DictConfig, folder: Path, logger: Logger = False) -> dict[str, Any]:
    """Runs one composed and checked config and returns the report that it has written to
    ``folder``.

    All processes of ``config.trainer`` train; the first alone measures, exports, writes, prints and
    logs.

    The folder holds ``report.json``, ``report.md``, ``ledger.json``, ``model.onnx``,
    ``model_fp32.onnx``, ``model.ckpt``, ``config.yaml`` and, of stages but the last,
    ``stages/NAME.onnx``. Interrupted, it leaves what was measured, and ``interrupted.ckpt``.

    Raises:
        QatTricksError: bad input, a stage that loses more than it may, or an export that does not
            run as simulated.
    """
    package = default_package()
    torch.set_num_threads(config.measure.threads)
    package.seed_everything(config.seed, workers=True, verbose=False)
    recipe = recipe_of(config)
    data = build_data(**OmegaConf.to_container(config.data, resolve=True))  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    module = _classifier(config, data)
    trainer = {**OmegaConf.to_container(config.trainer, resolve=True), "logger": logger}  # type: ignore[dict-item]
    _check_classes(module.network, data)

    datamodule = ImageDataModule(data)
    ranks = Ranks(package.Trainer(enable_checkpointing=False, **trainer).strategy)
    run = _Run(config, folder, recipe, data, module)

    def after_stage(stage: Stage, network: nn.Module) -> None:
        network.to("cpu").eval()  # on every rank: what the next stage begins with
        ranks.on_zero(run.after_stage, stage, network)

    ranks.on_zero(run.save_config)
    started = time.perf_counter()
    try:
        prepare_baseline(config, module, datamodule, trainer, ranks)
        module.network.to("cpu").eval()
        ranks.on_zero(
            run.measure_stage, "fp32", module.network, started, folder / "model_fp32.onnx"
        )
        run_stages(module, datamodule, recipe, trainer=trainer, after_stage=after_stage)
        return ranks.on_zero(run.finish, logger)
    # the latter is how Lightning ends an interrupted fit
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            run.keep_interrupted()
        raise


def foresee(config: DictConfig) -> Forecast:
    """What of the network of a composed config will run in integers; nothing is trained, and no
    image looked at.

    Raises:
        QatTricksError: bad input, a network that cannot be traced, or a recipe that quantizes
            nothing.
    """
    recipe = recipe_of(config)
    settings = [trick.settings for trick in recipe.tricks if isinstance(trick, Quantize)]
    if not settings:
        raise QatTricksError(
            f"recipe {config.recipe.name} does not quantize: preflight=true has nothing to foresee"
        )
    data = build_data(**OmegaConf.to_container(config.data, resolve=True))  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    network = _classifier(config, data).network
    return forecast_network(
        network, torch.zeros(1, data.in_channels, *data.image_size), settings[-1], recipe.untraced
    )


def _classifier(config: DictConfig, data: ImageData) -> Classifier:
    model = {
        "name": config.model.name,
        "factory": config.model.factory,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
    }
    return Classifier(
        model=model,
        data=OmegaConf.to_container(config.data, resolve=True),  # type: ignore[arg-type]
        preprocessing=data.preprocessing.described(),
        lr=config.baseline.lr,
        **config.optimizer,
    )


def _check_classes(network: nn.Module, data: ImageData) -> None:
    images, _ = next(iter(data.test_dataloader()))
    training = network.training
    with torch.no_grad():
        logits = network.eval()(images[:1])
    network.train(training)
    if logits.shape[-1] != data.num_classes:
        raise QatTricksError(
            f"the network has {logits.shape[-1]} classes and the data {data.num_classes}: choose a "
            f"network or weights with {data.num_classes}, or data with {logits.shape[-1]}"
        )


class _Run:
    """What a run has measured so far."""

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        recipe: StagedRecipe,
        data: ImageData,
        module: Classifier,
    ) -> None:
        self.config, self.folder, self.recipe, self.data, self.module = (
            config,
            folder,
            recipe,
            data,
            module,
        )
        self.ledger = Ledger()
        self.stage_started = time.perf_counter()
        self.parity: dict[str, Any] = {}
        self.shape = (data.in_channels, *data.image_size)
        self.example = torch.zeros(2, *self.shape)

    @property
    def model_path(self) -> Path:
        return self.folder / "model.onnx"

    def save_config(self) -> None:
        """Keeps the composed config in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "config.yaml", resolve=True)

    def after_stage(self, stage: Stage, network: nn.Module) -> None:
        """Measures the network after a stage, and stops the run if the stage lost more than it may."""
        is_last = stage is self.recipe.stages[-1]
        path = self.model_path if is_last else self.folder / "stages" / f"{stage.name}.onnx"
        before = self.ledger.stages[-1].after.accuracy
        metrics = self.measure_stage(stage.name, network, self.stage_started, path)
        check_drop(
            stage.name,
            before,
            metrics.accuracy,
            stage.max_drop,
            ledger_path=self.folder / "ledger.json",
        )

    def measure_stage(self, name: str, network: nn.Module, started: float, path: Path) -> Metrics:
        """Measures ``network`` as it is simulated, exports it to ``path``, and enters both in the
        ledger.
        """
        metrics = self._evaluate(network, name)
        before = self.ledger.stages[-1].after if self.ledger.stages else None
        self.ledger.add(
            LedgerRow(
                name=name, before=before, after=metrics, seconds=time.perf_counter() - started
            )
        )
        self.ledger.write(self.folder / "ledger.json")  # before the export, which may refuse
        images = (
            batch
            for batch, _ in islice(
                self.data.test_dataloader(), _batches(PARITY_IMAGES, self.data.batch_size)
            )
        )
        self.parity = export_onnx(
            network,
            path,
            self.example,
            images=images,
            metadata=self._metadata(),
            min_top1_agreement=self.config.measure.min_top1_agreement,
            opset=self.config.export.opset,
            layout=target_named(self.config.target).layout,
        ).as_dict()
        if self.config.export.normalize:
            self._build_in_normalization(path)
        self._enter_costs(path)
        self.stage_started = time.perf_counter()
        return metrics

    def _build_in_normalization(self, path: Path) -> None:
        preprocessing = self.data.preprocessing
        loaders = zip(self.data.test_pixels(), self.data.test_dataloader(), strict=True)
        batches = ((pixels.numpy(), floats.numpy()) for (pixels, _), (floats, _) in loaders)
        build_in_normalization(
            path,
            islice(batches, _batches(PARITY_IMAGES, self.data.batch_size)),
            mean=preprocessing.mean,
            std=preprocessing.std,
            scale=preprocessing.scale,
            min_top1_agreement=self.config.measure.min_top1_agreement,
        )

    def _enter_costs(self, path: Path) -> None:
        measure = self.config.measure
        latency = measure_latency(
            {"model": path},
            image_shape=self.shape,
            **timing(measure),
        )["model"]
        row = self.ledger.stages.pop()
        costs = {
            "size_bytes": file_bytes(path),
            "latency_ms": latency,
            "sparsity": weight_sparsity(path),
        }
        self.ledger.add(LedgerRow(**{**vars(row), **costs}))
        self.ledger.write(self.folder / "ledger.json")

    def _evaluate(self, predict: Any, description: str) -> Metrics:
        return self._measure(predict, self.data.test_dataloader(), description)

    def _measure(self, predict: Any, batches: Batches, description: str) -> Metrics:
        return evaluate_classifier(
            predict, batches, self.data.num_classes, description=f"measure {description}"
        )

    def _deployed_batches(self) -> Batches:
        """The test images as the exported file takes them."""
        return (
            self.data.test_pixels() if self.config.export.normalize else self.data.test_dataloader()
        )

    def _metadata(self) -> dict[str, str]:
        return {
            f"qat_tricks.{key}": json.dumps(value)
            for key, value in {
                "recipe": self.recipe.name,
                "target": self.config.target,
                "model": self.module.hparams["model"],
                "data": self.module.hparams["data"],
                "preprocessing": self.module.hparams["preprocessing"],
                "class_names": list(self.data.class_names),
            }.items()
        }

    @rank_zero_only
    def keep_interrupted(self) -> None:
        """Writes the network as it is now, and a report of the stages that were measured, if any
        was.
        """
        save_checkpoint(self.module, self.folder / "interrupted.ckpt")
        if self.ledger.stages:
            unmeasured = dict.fromkeys(key for key in REQUIRED_KEYS)
            write_report(
                self.folder,
                {**unmeasured, **self._identity(), "parity": self.parity, "interrupted": True},
            )
        print(f"what was reached is in {self.folder}: interrupted.ckpt, report.md", flush=True)

    def finish(self, logger: Logger) -> dict[str, Any]:
        """Writes the checkpoint and the report, prints the ledger, logs both, and returns the
        report.
        """
        save_checkpoint(self.module, self.folder / "model.ckpt")
        report = self.report()
        write_report(self.folder, report)
        Console().print(self.ledger.as_table())
        log_report(logger, report, self.folder)
        return report

    def report(self) -> dict[str, Any]:
        """Runs the final ONNX file itself, and puts everything together under DESIGN's keys."""
        if not self.recipe.stages:  # recipe=fp32: the float network is the result
            self.model_path.write_bytes((self.folder / "model_fp32.onnx").read_bytes())
        started = time.perf_counter()
        metrics = self._measure(self._predictor(REFERENCE), self._deployed_batches(), "onnx")
        last = self.ledger.stages[-1]
        fp32 = self.ledger.stages[0].after
        measure = self.config.measure
        device = measure_device(
            self._paths,
            self.shape,
            **timing(measure),
        )
        self.ledger.add(
            LedgerRow(
                name="onnx",
                before=last.after,
                after=metrics,
                seconds=time.perf_counter() - started,
                size_bytes=device["size_bytes"]["int8"],
                latency_ms=device["latency_ms"]["int8"],
                sparsity=device["sparsity"],
            )
        )
        self.ledger.write(self.folder / "ledger.json")
        return {
            **self._identity(),
            "agreement": agreement(metrics.predictions, fp32.predictions),
            "parity": self.parity,
            **device,
            "runtimes": self._runtimes(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "stages": self.ledger.rows(),
            "preprocessing": self.data.preprocessing.described(),
            "normalization": BUILT_IN if self.config.export.normalize else "outside",
            "target": self.config.target,
        }

    @property
    def _paths(self) -> dict[str, Path]:
        return {"fp32": self.folder / "model_fp32.onnx", "int8": self.model_path}

    def _predictor(self, runtime: str) -> Predict:
        return predictor(self.model_path, self.config.measure.threads, runtime)

    def _runtimes(self) -> dict[str, Any]:
        """What the target's runtime makes of the file, where it is another than ONNX Runtime; it
        has to make the same.
        """
        name, measure = target_named(self.config.target).runtime, self.config.measure
        if name == REFERENCE:
            return {}
        found = parity(
            self._predictor(name),
            self._predictor(REFERENCE),
            self._deployed_batches(),
            against=REFERENCE,
        )
        check_parity(name, found, measure.min_top1_agreement)
        accuracy = self._measure(self._predictor(name), self._deployed_batches(), name).accuracy
        costs = measure_runtime(name, self._paths, self.shape, **timing(measure))
        return {name: {**costs, "accuracy": accuracy, "parity": found}}


def _batches(images: int, batch_size: int) -> int:
    return max(1, -(-images // batch_size))
