"""Evaluates an artifact that a run wrote, a ``.onnx`` or a ``.ckpt``, and writes its report.

An ONNX file is measured without loading Lightning, the training code or the loggers.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat_tricks.data import ImageData, build_data
from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.deploy.cost.device import measure_device, measure_runtime
from qat_tricks.deploy.cost.latency import measure_throughput
from qat_tricks.deploy.cost.weights import weight_sparsity
from qat_tricks.deploy.normalization import BUILT_IN
from qat_tricks.deploy.parity.runtimes import PARITY_BATCHES, Predict, parity
from qat_tricks.deploy.runtimes.registry import (
    REFERENCE,
    check_runtimes,
    installed_runtimes,
    runtime_version,
)
from qat_tricks.evidence.ledger import Ledger, LedgerRow
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier
from qat_tricks.evidence.paired import compare
from qat_tricks.evidence.report import write_report
from qat_tricks.files import reserved
from qat_tricks.graph.spec import channels_of, mixed_precision_of
from qat_tricks.graph.tensor_figures import FEW_IMAGES, layer_figures
from qat_tricks.jobs.artifact import (
    Artifact,
    check_classes,
    export_artifact,
    load_artifact,
    preprocessing_changes,
)
from qat_tricks.jobs.config import EXPORTED, command, evaluation_folder, settle_root, timing
from qat_tricks.jobs.isolation import torch_threads
from qat_tricks.jobs.pictures import disagreement_pictures
from qat_tricks.jobs.sensitivity import check_sensitivity, measure_artifact
from qat_tricks.progress import console, live


def evaluate_artifact(config: DictConfig) -> dict[str, Any]:
    """Measures ``config.artifact`` and its float counterpart, and writes the report.

    A checkpoint is measured as it is simulated, exported, and measured again in each runtime. The
    data are those that the artifact was made for, unless ``config.data`` names others. A file that
    ``train.py`` did not write needs them, and a checkpoint of the user's own its class,
    ``config.module``. The float network is ``config.float``, or ``model_fp32.onnx`` beside the
    artifact.

    Returns:
        The report.

    Raises:
        QatTricksError: an artifact is missing, damaged or says too little of itself, the data have
            other classes or another preprocessing, or a runtime is not installed.
    """
    # The simulated network runs on as many threads as the file.
    with torch_threads(config.measure.threads), live(), ExitStack() as held:
        return _evaluate_artifact(config, held)


def _evaluate_artifact(config: DictConfig, held: ExitStack) -> dict[str, Any]:
    runtimes = list(config.runtimes) if config.runtimes else installed_runtimes()
    # Before the measurements, which take minutes.
    check_runtimes(runtimes)
    folder = evaluation_folder(config)
    settle_root(config)

    given = {"module": config.module, "data": _given_data(config)}
    artifact = load_artifact(Path(config.artifact), **given)
    if config.sensitivity:
        check_sensitivity(artifact)
    # the data as config.data describes them; the artifact's own preprocessing may be another
    data_as_configured = build_data(**_data_options(config, artifact))
    changes = preprocessing_changes(
        artifact, data_as_configured, allowed=config.allow_preprocessing_change
    )
    data = _loaded(data_as_configured.with_preprocessing(artifact.preprocessing))
    check_classes(artifact, data)
    held.enter_context(reserved(folder))

    evaluation = _Evaluation(config=config, data=data)
    float_path = Path(config.float) if config.float else artifact.path.with_name("model_fp32.onnx")
    float_metrics = None
    # A float file that is compared with itself tells nothing.
    has_float = float_path.is_file() and float_path.resolve() != artifact.path.resolve()
    if config.float or has_float:
        float_artifact = load_artifact(float_path, **given)
        float_artifact = replace(float_artifact, inputs=float_artifact.inputs or artifact.inputs)
        float_metrics = evaluation.measure_float(float_artifact)
    deployed = artifact  # the ONNX file: the artifact itself, or its export
    if artifact.simulated is not None:
        deployed = evaluation.export_checkpoint(artifact, folder / EXPORTED)
    metrics = evaluation.enter("onnx", deployed, deployed.predict(config.measure.threads))

    paths = {"int8": deployed.path}
    # a float checkpoint has no file to time
    if float_path.suffix == ".onnx" and float_metrics is not None:
        paths["fp32"] = float_path
    report = evaluation.report(artifact, deployed, metrics, float_metrics, paths, runtimes)
    if changes:
        report["preprocessing_change"] = evaluation.with_other_preprocessing(
            deployed, _loaded(data_as_configured), changes, metrics
        )
    console().print(evaluation.ledger.as_table())
    if config.sensitivity:
        report["sensitivity"] = measure_artifact(artifact, data, folder)
    write_report(folder, report, disagreement_pictures(data, report))
    return report


def _given_data(config: DictConfig) -> dict[str, Any] | None:
    """The settings of ``data=NAME``, if it was given."""
    if config.data is None:
        return None
    options: Any = OmegaConf.to_container(config.data, resolve=True)
    return options


def _data_options(config: DictConfig, artifact: Artifact) -> dict[str, Any]:
    return _given_data(config) or artifact.data


def _loaded(data: ImageData) -> ImageData:
    data.prepare_data()
    data.setup()
    return data


@dataclass(kw_only=True)
class _Evaluation:
    """The measurements of one evaluation so far."""

    config: DictConfig
    data: ImageData  # loaded, under the artifact's preprocessing
    ledger: Ledger = field(default_factory=Ledger)
    simulated: Predict | None = None  # of a checkpoint: the network that its export must follow
    _shape: tuple[int, ...] | None = None  # where a module changes that of the images

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of the images, as the network takes them."""
        return self._shape or (self.data.in_channels, *self.data.image_size)

    def enter(self, name: str, artifact: Artifact, predict: Predict) -> Metrics:
        """Measures ``predict`` on the images as ``artifact`` takes them; adds it to the ledger."""
        metrics = _measure(predict, artifact, self.data, name)
        self.ledger.add(LedgerRow(name=name, before=None, after=metrics, seconds=metrics.seconds))
        return metrics

    def measure_float(self, original: Artifact) -> Metrics:
        """Measures the float network, which must have the artifact's preprocessing."""
        # Accuracies under different preprocessing cannot be compared.
        preprocessing_changes(original, self.data, allowed=False)
        check_classes(original, self.data)
        return self.enter("fp32", original, original.predict(self.config.measure.threads))

    def export_checkpoint(self, artifact: Artifact, path: Path) -> Artifact:
        """Measures the network of a checkpoint as it is simulated, and exports it."""
        self.simulated = artifact.predict(self.config.measure.threads)
        self.enter("simulated", artifact, self.simulated)
        if artifact.inputs is not None:
            inputs, _ = next(iter(artifact.batches(self.data)))
            self._shape = tuple(inputs.shape[1:])
        few = islice(artifact.batches(self.data), PARITY_BATCHES)
        return export_artifact(artifact, path, few, self.config.measure.min_sqnr_db)

    def report(
        self,
        artifact: Artifact,
        deployed: Artifact,
        metrics: Metrics,
        float_metrics: Metrics | None,
        paths: dict[str, Path],
        runtimes: Sequence[str],
    ) -> dict[str, Any]:
        """Measures the costs and every runtime, and returns the report.

        Args:
            artifact: the one to evaluate.
            deployed: its ONNX file.
            metrics: of ``deployed`` in ONNX Runtime.
            float_metrics: of the float network, if there is one.
            paths: the ONNX files, ``int8`` and perhaps ``fp32``.
            runtimes: the names of those to measure.
        """
        measure = self.config.measure
        predict = deployed.predict(measure.threads)
        device = measure_device(paths, self.shape, **timing(measure), profile=measure.profile)
        self._enter_costs(device, paths)
        compared = None  # an ONNX file has no simulation to follow
        if self.simulated is not None:
            compared = parity(
                predict, self.simulated, deployed.batches(self.data), against="simulated"
            )
        return {
            "language": self.config.report.language,
            "command": command("evaluate"),
            "recipe": artifact.recipe,
            "model": artifact.model["name"],
            "data": _data_options(self.config, artifact)["name"],
            "stages": self.ledger.rows(),
            **self._compared(float_metrics, metrics),
            "layers": layer_figures(
                artifact.simulated, (x for x, _ in artifact.batches(self.data, FEW_IMAGES))
            ),
            "parity": compared,
            **_choices_in(artifact.simulated),
            **device,
            "preprocessing": artifact.preprocessing.described(),
            "normalization": BUILT_IN if deployed.normalizes else "outside",
            "runtimes": {
                name: {
                    **self._runtime_costs(name, device, paths),
                    **self._runtime_results(name, deployed, predict),
                }
                for name in runtimes
            },
            "throughput": [row for name in runtimes for row in self._throughput(name, paths)],
        }

    def _compared(self, original: Metrics | None, metrics: Metrics) -> dict[str, Any]:
        if original is None:
            return {"agreement": None, "comparison": None}
        compared = compare(original, metrics, self.data.class_names)
        return {"agreement": compared["agreement"], "comparison": compared}

    def _enter_costs(self, device: dict[str, Any], paths: dict[str, Path]) -> None:
        """Enters the figures of the files in the ledger's rows."""
        files = {"fp32": "fp32", "simulated": "int8", "onnx": "int8"}  # by the name of the row
        for index, row in enumerate(self.ledger.stages):
            file = files[row.name]
            if file not in paths:
                continue
            row = replace(row, sparsity=weight_sparsity(paths[file]))
            if row.name != "simulated":  # which is no file
                size, latency = device["size_bytes"][file], device["latency_ms"][file]
                row = replace(row, size_bytes=size, latency_ms=latency)
            self.ledger.stages[index] = row

    def _runtime_costs(
        self, name: str, device: dict[str, Any], paths: dict[str, Path]
    ) -> dict[str, Any]:
        if name != REFERENCE:
            return measure_runtime(name, paths, self.shape, **timing(self.config.measure))
        operators = integer_coverage(paths["int8"], self.shape).operators
        # ONNX Runtime was measured already; the same keys as measure_runtime's
        return {
            "version": runtime_version(REFERENCE),
            "latency_ms": device["latency_ms"],
            "load_ms": device["load_ms"],
            "int8_layers": sum(operator.integer for operator in operators) / len(operators),
        }

    def _runtime_results(
        self, name: str, deployed: Artifact, in_onnxruntime: Predict
    ) -> dict[str, Any]:
        """Returns accuracy and parity in one runtime.

        Parity is with the simulated network of a checkpoint, otherwise with ONNX Runtime.
        """
        predict = deployed.predict(self.config.measure.threads, name)
        return {
            "accuracy": _measure(predict, deployed, self.data, name).accuracy,
            "parity": parity(
                predict,
                in_onnxruntime if self.simulated is None else self.simulated,
                deployed.batches(self.data),
                against=REFERENCE if self.simulated is None else "simulated",
            ),
        }

    def _throughput(self, name: str, paths: dict[str, Path]) -> list[dict[str, Any]]:
        measure = self.config.measure
        rows = measure_throughput(
            paths,
            image_shape=self.shape,
            batch_sizes=measure.batch_sizes,
            thread_counts=measure.thread_counts,
            runtime=name,
            seconds=measure.point_seconds,
        )
        return [{"runtime": name, **row} for row in rows]

    def with_other_preprocessing(
        self, deployed: Artifact, data: ImageData, changes: list[str], own: Metrics
    ) -> dict[str, Any]:
        """Measures the network on ``data``, whose preprocessing is not the network's own."""
        predict = deployed.predict(self.config.measure.threads)
        metrics = _measure(predict, deployed, data, "the other preprocessing")
        return {
            "differences": changes,
            "preprocessing": data.preprocessing.described(),
            **metrics.as_dict(),
            "agreement": agreement(metrics.predictions, own.predictions),
        }


def _measure(predict: Predict, artifact: Artifact, data: ImageData, name: str) -> Metrics:
    return evaluate_classifier(
        predict, artifact.batches(data), data.num_classes, description=f"measure {name}"
    )


def _choices_in(network: nn.Module | None) -> dict[str, Any]:
    """What tricks have chosen for a network; nothing is known of a file without one."""
    if network is None:
        return {}
    return {"channels": channels_of(network), "mixed_precision": mixed_precision_of(network)}
