"""The record of one run: measures and exports each stage, and writes the ledger and the report.

Everything here happens in one process, rank zero's.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat_tricks.data import ImageData
from qat_tricks.data.module import Batches
from qat_tricks.deploy.cost.device import measure_device, measure_runtime
from qat_tricks.deploy.cost.latency import measure_latency
from qat_tricks.deploy.cost.weights import file_bytes, weight_sparsity
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.normalization import BUILT_IN, build_in_normalization
from qat_tricks.deploy.parity.runtimes import (
    Predict,
    check_parity,
    parity,
    predictor,
)
from qat_tricks.deploy.runtimes.registry import REFERENCE
from qat_tricks.deploy.targets import target_named
from qat_tricks.evidence.ledger import Ledger, LedgerRow, check_drop
from qat_tricks.evidence.metrics import Metrics, evaluate_classifier
from qat_tricks.evidence.page import answer_lines
from qat_tricks.evidence.paired import compare
from qat_tricks.evidence.report import REQUIRED_KEYS, write_report
from qat_tricks.graph.spec import channels_of, mixed_precision_of, spec_of
from qat_tricks.graph.tensor_figures import FEW_IMAGES, layer_figures
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.jobs.calibration import calibration_figures
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.jobs.config import command, timing
from qat_tricks.jobs.description import to_metadata
from qat_tricks.jobs.guideline_result import Guideline
from qat_tricks.jobs.isolation import torch_threads
from qat_tricks.jobs.loggers import FILES, log_report
from qat_tricks.jobs.pictures import disagreement_pictures
from qat_tricks.progress import console, enter
from qat_tricks.recipes.recipe import GUIDELINE, Stage, StagedRecipe
from qat_tricks.trainer.checkpoints import save_checkpoint

EARLIER = "earlier"  # gets the results of a run that was in the folder before
PARITY_IMAGES = 512  # images on which each export is compared with its simulation


class RunRecord:
    """The measurements of a run so far, and the files that they are written to.

    Args:
        config: the composed config.
        folder: the run's.
        recipe: the recipe of ``config``.
        data: loaded.
        module: the classifier that the run trains.
    """

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        recipe: StagedRecipe,
        data: ImageData,
        module: Classifier,
    ) -> None:
        self.config = config
        self.folder = folder
        self.recipe = recipe
        self.data = data
        self.module = module
        self.ledger = Ledger()
        self.parity: dict[str, Any] = {}  # of the newest export with its simulation
        self.shape = (data.in_channels, *data.image_size)
        self.guideline: dict[str, Any] | None = None  # how it chose, where it did
        self.stage_started = time.perf_counter()

    @property
    def model_path(self) -> Path:
        """The ONNX file of the last stage."""
        return self.folder / "model.onnx"

    @property
    def float_path(self) -> Path:
        """The ONNX file of the float network."""
        return self.folder / "model_fp32.onnx"

    def save_config(self) -> None:
        """Writes the composed config into the folder.

        Results of an earlier run in it go into a folder ``earlier``: if this one fails, they must
        not pass for its own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        names = (*FILES, "model.ckpt", "model_fp32.onnx", "ledger.json")
        results = [self.folder / name for name in names]
        for path in filter(Path.is_file, results):  # a folder of such a name is not ours
            (self.folder / EARLIER).mkdir(exist_ok=True)
            path.replace(self.folder / EARLIER / path.name)
        OmegaConf.save(self.config, self.folder / "config.yaml", resolve=True)

    def measure_float(self, network: nn.Module) -> None:
        """Measures the float network that the recipe starts from."""
        self._measure_stage("fp32", network, self.float_path)
        self._enter_stage(0)

    def take_guideline(self, result: Guideline) -> None:
        """Takes over what the guideline has kept; its step is the run's only stage."""
        self.guideline = result.as_dict()
        self.module = result.module  # type: ignore[assignment]
        stage = Stage(name=result.kept.name, tricks=[])
        self.recipe = replace(self.recipe, stages=[stage])

    def after_stage(self, stage: Stage, network: nn.Module) -> None:
        """Measures the network after a stage.

        Raises:
            QatTricksError: the stage lost more accuracy than it may, or its export does not run as
                simulated.
        """
        is_last = stage is self.recipe.stages[-1]  # its file is the result
        path = self.model_path if is_last else self.folder / "stages" / f"{stage.name}.onnx"
        # Read before this stage is entered.
        before = self.ledger.stages[-1].after.accuracy
        metrics = self._measure_stage(stage.name, network, path)
        ledger_path = self.folder / "ledger.json"
        check_drop(stage.name, before, metrics.accuracy, stage.max_drop, ledger_path=ledger_path)
        self._enter_stage(self.recipe.stages.index(stage) + 1)

    def finish(self, logger: Any) -> dict[str, Any]:
        """Writes the checkpoint and the report, prints the ledger, and logs both.

        Args:
            logger: one of Lightning's loggers, several, or False.

        Returns:
            The report.
        """
        # First: a failure in the report must not cost the training.
        save_checkpoint(self.module, self.folder / "model.ckpt")
        with torch_threads(self.config.measure.threads):
            report = self._report()
        pictures = disagreement_pictures(self.data, report)
        write_report(self.folder, report, pictures)
        enter("")
        console().print(self.ledger.as_table())
        print(answer_lines(report), flush=True)
        log_report(logger, report, self.folder, pictures)
        return report

    def save_interrupted(self) -> None:
        """Writes the network as it is now, and a report of the stages that were measured."""
        save_checkpoint(self.module, self.folder / "interrupted.ckpt")
        if self.ledger.stages:  # otherwise there is nothing to report
            # A report has all its keys; those that were not measured are None.
            report = dict.fromkeys(REQUIRED_KEYS) | self._identity()
            write_report(self.folder, {**report, "parity": self.parity, "interrupted": True})
        print(f"the state so far is in {self.folder}: interrupted.ckpt, report.html", flush=True)
        if self.recipe.name == GUIDELINE:
            print(f"to go on, give the same again with hydra.run.dir={self.folder}", flush=True)

    def _measure_stage(self, name: str, network: nn.Module, path: Path) -> Metrics:
        """Measures ``network`` as it is simulated and exports it; the ledger gets both."""
        # As many threads as the file is timed with; training has torch's own number.
        with torch_threads(self.config.measure.threads):
            return self._measure_on_threads(name, network, path)

    def _measure_on_threads(self, name: str, network: nn.Module, path: Path) -> Metrics:
        metrics = self._evaluate(network, self.data.test_dataloader(), name)
        before = self.ledger.stages[-1].after if self.ledger.stages else None
        seconds = time.perf_counter() - self.stage_started
        self.ledger.add(
            LedgerRow(
                name=name,
                before=before,
                after=metrics,
                seconds=seconds,
                equivalence=self._new_entries(network, "equivalence"),
                proofs=self._new_entries(network, "proofs"),
                rates=self._new_entries(network, "rates"),
            )
        )
        self._write_ledger()  # before the export, which may refuse the network
        self._export(network, path)
        self._add_costs(path)
        print(self.ledger.line(self.ledger.stages[-1]), flush=True)
        self.stage_started = time.perf_counter()
        return metrics

    def _enter_stage(self, place: int) -> None:
        """Tells which stage begins, if any, and has the live display say so."""
        stages = self.recipe.stages
        if place == len(stages):
            enter("measure the result" if stages else "")  # the guideline makes its stage itself
            return
        stage = stages[place]
        enter(f"stage {place + 1} of {len(stages)}, {stage.name}")
        tricks = ", ".join(trick.name for trick in stage.tricks)
        unit = "epoch" if stage.epochs == 1 else "epochs"
        epochs = f"; {stage.epochs} {unit}" if stage.epochs else ""
        print(f"stage {place + 1} of {len(stages)}, {stage.name}: {tricks}{epochs}", flush=True)

    def _new_entries(self, network: nn.Module, key: str) -> list[dict[str, Any]]:
        """What the network's spec has under ``key`` since the last stage; none of a float one.

        Args:
            network: after a stage.
            key: of the spec, and the field of a ledger's row.
        """
        if not isinstance(network, TracedNetwork):
            return []
        known = sum(len(getattr(row, key)) for row in self.ledger.stages)
        return spec_of(network).get(key, [])[known:]

    def _export(self, network: nn.Module, path: Path) -> None:
        measure, export = self.config.measure, self.config.export
        # Two images, so that the exporter keeps the batch size open.
        example = torch.zeros(2, *self.shape)
        images = (images for images, _ in self.data.test_sample(PARITY_IMAGES))
        self.parity = export_onnx(
            network,
            path,
            example,
            images=images,
            metadata=self._metadata(),
            min_top1_agreement=measure.min_top1_agreement,
            min_sqnr_db=measure.min_sqnr_db,
            opset=export.opset,
            layout=target_named(self.config.target).layout,
        ).as_dict()
        if export.normalize:
            self._build_in_normalization(path)

    def _build_in_normalization(self, path: Path) -> None:
        preprocessing = self.data.preprocessing
        # the same images before and after normalization
        loaders = zip(
            self.data.test_sample(PARITY_IMAGES, pixels=True),
            self.data.test_sample(PARITY_IMAGES),
            strict=True,
        )
        batches = ((pixels.numpy(), floats.numpy()) for (pixels, _), (floats, _) in loaders)
        build_in_normalization(
            path,
            batches,
            mean=preprocessing.mean,
            std=preprocessing.std,
            scale=preprocessing.scale,
            min_top1_agreement=self.config.measure.min_top1_agreement,
        )

    def _add_costs(self, path: Path) -> None:
        """Adds the costs of the file at ``path`` to the last row of the ledger."""
        latency = measure_latency(
            {"model": path}, image_shape=self.shape, **timing(self.config.measure)
        )["model"]
        self.ledger.stages[-1] = replace(
            self.ledger.stages[-1],
            size_bytes=file_bytes(path),
            latency_ms=latency,
            sparsity=weight_sparsity(path),
        )
        self._write_ledger()

    def _report(self) -> dict[str, Any]:
        """Measures the last ONNX file in its runtimes and returns the report."""
        if not self.recipe.stages:  # recipe=fp32: the float network is the result
            self.model_path.write_bytes(self.float_path.read_bytes())
        started = time.perf_counter()
        # The result is measured as it will run, and not as it was simulated.
        metrics = self._evaluate(self._predictor(REFERENCE), self._deployed_batches(), "onnx")
        paths = {"fp32": self.float_path, "int8": self.model_path}
        device = measure_device(
            paths, self.shape, **timing(self.config.measure), profile=self.config.measure.profile
        )
        self._enter_latency(device["latency_ms"])
        self.ledger.add(
            LedgerRow(
                name="onnx",
                before=self.ledger.stages[-1].after,
                after=metrics,
                seconds=time.perf_counter() - started,
                size_bytes=device["size_bytes"]["int8"],
                latency_ms=device["latency_ms"]["int8"],
                sparsity=device["sparsity"],
            )
        )
        self._write_ledger()
        compared = compare(self.ledger.stages[0].after, metrics, self.data.class_names)
        return {
            **self._identity(),
            "stage_budgets": {stage.name: stage.max_drop for stage in self.recipe.stages},
            "agreement": compared["agreement"],
            "comparison": compared,
            "layers": layer_figures(
                self.module.network, (x for x, _ in self.data.test_sample(FEW_IMAGES))
            ),
            "calibration": calibration_figures(self.module.network, self.data, metrics.labels),
            "parity": self.parity,
            **device,
            **self._validated(),
            "runtimes": self._measure_target_runtime(paths),
        }

    def _validated(self) -> dict[str, Any]:
        """Measures the result on the validation images, where a search decides by them.

        A search must not know the test images, which the other figures are of.
        """
        if "accuracy" not in self.config.objectives:
            return {}
        takes_pixels = self.config.export.normalize
        batches = self.data.val_pixels() if takes_pixels else self.data.val_dataloader()
        metrics = self._evaluate(self._predictor(REFERENCE), batches, "validation")
        return {"validation": {"images": len(metrics.labels), "accuracy": metrics.accuracy}}

    def _enter_latency(self, of_files: dict[str, Any]) -> None:
        """Gives the rows of the two files the latency that they have side by side.

        Each was timed alone, at another moment, when its stage had ended.
        """
        stages = self.ledger.stages
        stages[-1] = replace(stages[-1], latency_ms=of_files["int8"])
        stages[0] = replace(stages[0], latency_ms=of_files["fp32"])

    def _measure_target_runtime(self, paths: dict[str, Path]) -> dict[str, Any]:
        """Measures the file in the target's runtime, if that is another than ONNX Runtime.

        Raises:
            QatTricksError: it does not compute as ONNX Runtime does.
        """
        name, measure = target_named(self.config.target).runtime, self.config.measure
        # The report has its figures already.
        if name == REFERENCE:
            return {}
        compared = parity(
            self._predictor(name),
            self._predictor(REFERENCE),
            self._deployed_batches(),
            against=REFERENCE,
        )
        # before the costs, whose measurement takes long
        check_parity(name, compared, measure.min_top1_agreement)
        metrics = self._evaluate(self._predictor(name), self._deployed_batches(), name)
        costs = measure_runtime(name, paths, self.shape, **timing(measure))
        return {name: {**costs, "accuracy": metrics.accuracy, "parity": compared}}

    def _identity(self) -> dict[str, Any]:
        return {
            "language": self.config.report.language,
            "command": command("train"),
            "recipe": self.recipe.name,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "stages": self.ledger.rows(),
            "preprocessing": self.data.preprocessing.described(),
            "normalization": BUILT_IN if self.config.export.normalize else "outside",
            "target": self.config.target,
            "channels": channels_of(self.module.network),
            "mixed_precision": mixed_precision_of(self.module.network),
            "guideline": self.guideline,
        }

    def _metadata(self) -> dict[str, str]:
        return to_metadata(
            {
                "recipe": self.recipe.name,
                "target": self.config.target,
                "model": self.module.hparams["model"],
                "data": self.module.hparams["data"],
                "preprocessing": self.module.hparams["preprocessing"],
                "class_names": list(self.data.class_names),
            }
        )

    def _evaluate(self, predict: Any, batches: Batches, name: str) -> Metrics:
        return evaluate_classifier(
            predict, batches, self.data.num_classes, description=f"measure {name}"
        )

    def _deployed_batches(self) -> Batches:
        """Returns the test images as the exported file takes them."""
        if self.config.export.normalize:
            return self.data.test_pixels()
        return self.data.test_dataloader()

    def _predictor(self, runtime: str) -> Predict:
        return predictor(self.model_path, self.config.measure.threads, runtime)

    def _write_ledger(self) -> None:
        self.ledger.write(self.folder / "ledger.json")
