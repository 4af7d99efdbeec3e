"""Evaluates an artifact that a run wrote, a ``.onnx`` or a ``.ckpt``, and writes its report.

An ONNX file is measured without Lightning, the training code and the loggers being loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from qat_tricks.data import ImageData, Preprocessing, build_data
from qat_tricks.data.module import Batches
from qat_tricks.deploy.cost.device import measure_device, measure_runtime
from qat_tricks.deploy.cost.latency import measure_throughput
from qat_tricks.deploy.normalization import BUILT_IN
from qat_tricks.deploy.parity.runtimes import Predict, parity, predictor
from qat_tricks.deploy.runtimes.registry import (
    REFERENCE,
    check_runtimes,
    installed_runtimes,
    runtime_version,
)
from qat_tricks.deploy.runtimes.session import open_session
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.ledger import Ledger, LedgerRow
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier
from qat_tricks.evidence.report import write_report
from qat_tricks.jobs.config import evaluation_folder, timing

_PREFIX = "qat_tricks."
_SAID = ("recipe", "model", "data", "preprocessing")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file that a run wrote, and what it says of itself."""

    path: Path
    recipe: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    preprocessing: Preprocessing
    normalizes: bool = False  # takes pixels, and normalizes them itself
    module: Any = None  # the classifier of a checkpoint

    @property
    def network(self) -> nn.Module:
        """The simulated network of a checkpoint."""
        return self.module.network.eval()

    def batches(self, data: ImageData) -> Batches:
        """The test images as the network takes them."""
        return data.test_pixels() if self.normalizes else data.test_dataloader()

    def predict(self, threads: int, runtime: str = REFERENCE) -> Predict:
        """Images as the network takes them to logits."""
        return predictor(self.path, threads, runtime) if self.module is None else self.network


def evaluate_artifact(config: DictConfig) -> dict[str, Any]:
    """Measures ``config.artifact`` and its float counterpart and returns the report that it has
    written.

    A checkpoint is measured as it is simulated, exported, and measured again in each runtime. The
    data are those that the artifact was made for, unless ``config.data`` names others; the float
    network is ``config.float``, or ``model_fp32.onnx`` beside the artifact.

    Raises:
        QatTricksError: an artifact that is missing, damaged or not ours, data with other classes or
            another preprocessing, or a runtime that is not installed.
    """
    measure = config.measure
    torch.set_num_threads(measure.threads)
    runtimes = list(config.runtimes) if config.runtimes else installed_runtimes()
    check_runtimes(runtimes)
    folder = evaluation_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    artifact = load_artifact(Path(config.artifact))
    options: Any = (
        artifact.data if config.data is None else OmegaConf.to_container(config.data, resolve=True)
    )
    given = build_data(**options)
    changes = _changes(artifact, given, config.allow_preprocessing_change)
    data = given.with_preprocessing(artifact.preprocessing)
    data.prepare_data()
    data.setup()
    shape = (data.in_channels, *data.image_size)

    ledger = Ledger()
    reference = Path(config.float) if config.float else artifact.path.with_name("model_fp32.onnx")
    floats = None
    if config.float or reference.is_file():
        original = load_artifact(reference)
        _changes(original, data, allowed=False)
        floats = _enter(
            ledger, "fp32", original.predict(measure.threads), original.batches(data), data
        )
    deployed, simulated = artifact, None
    if artifact.module is not None:
        simulated = artifact.network
        _enter(ledger, "simulated", simulated, artifact.batches(data), data)
        deployed = _export(artifact, folder / "model.onnx", shape)
    predict = deployed.predict(measure.threads)
    against = REFERENCE if simulated is None else "simulated"
    metrics = _enter(ledger, "onnx", predict, deployed.batches(data), data)

    paths = {"int8": deployed.path}
    if reference.is_file() and reference.suffix == ".onnx":
        paths["fp32"] = reference
    device = measure_device(
        paths,
        shape,
        **timing(measure),
    )
    report = {
        "recipe": artifact.recipe,
        "model": artifact.model["name"],
        "data": options["name"],
        "stages": ledger.rows(),
        "agreement": agreement(metrics.predictions, floats.predictions)
        if floats is not None
        else None,
        "parity": parity(predict, simulated, deployed.batches(data), against=against)
        if simulated is not None
        else None,
        **device,
        "preprocessing": artifact.preprocessing.described(),
        "normalization": BUILT_IN if deployed.normalizes else "outside",
        "runtimes": {
            name: {
                **(
                    _costs(device)
                    if name == REFERENCE
                    else measure_runtime(name, paths, shape, **timing(measure))
                ),
                **_in_runtime(
                    deployed.predict(measure.threads, name),
                    simulated or predict,
                    against,
                    deployed,
                    data,
                    name,
                ),
            }
            for name in runtimes
        },
        "throughput": [
            {"runtime": name, **row}
            for name in runtimes
            for row in measure_throughput(
                paths,
                image_shape=shape,
                batch_sizes=measure.batch_sizes,
                thread_counts=measure.thread_counts,
                runtime=name,
                seconds=measure.point_seconds,
            )
        ],
    }
    if changes:
        report["preprocessing_change"] = _with_other_preprocessing(
            deployed, given, changes, metrics, measure.threads
        )
    write_report(folder, report)
    Console().print(ledger.as_table())
    return report


def load_artifact(path: Path) -> Artifact:
    """Opens a ``.onnx`` or ``.ckpt`` and reads what it says of itself.

    Raises:
        QatTricksError: it is missing, damaged, or was not written by a run.
    """
    if path.suffix == ".ckpt":
        from qat_tricks.jobs.checkpoint import describe, load_classifier  # loads Lightning

        module = load_classifier(path)
        return _artifact(path, describe(module), module=module)
    if path.suffix != ".onnx":
        raise QatTricksError(
            f"{path} is neither a .onnx nor a .ckpt file: give one that a run wrote"
        )
    session = open_session(path)
    _check_one_input(path, session)
    properties = session.get_modelmeta().custom_metadata_map
    said = {
        key: properties[_PREFIX + key]
        for key in (*_SAID, "normalization")
        if _PREFIX + key in properties
    }
    missing = [key for key in _SAID if key not in said]
    if missing:
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say its {', '.join(missing)}"
        )
    described = {key: json.loads(value) for key, value in said.items()}
    return _artifact(path, described, normalizes=described.pop("normalization", None) == BUILT_IN)


def _check_one_input(path: Path, session: Any) -> None:
    names = [given.name for given in session.get_inputs()]
    if len(names) > 1:
        raise QatTricksError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), and the data sets that "
            "evaluate.py reads are images alone: measure it in Python, with "
            "qat_tricks.evidence.metrics.evaluate_classifier"
        )


def _artifact(path: Path, described: dict[str, Any], **more: Any) -> Artifact:
    preprocessing = Preprocessing.from_described(described["preprocessing"])
    return Artifact(path=path, **{**described, "preprocessing": preprocessing}, **more)


def _export(artifact: Artifact, path: Path, shape: tuple[int, int, int]) -> Artifact:
    from qat_tricks.jobs.checkpoint import describe, export_classifier  # loads Lightning

    export_classifier(artifact.module, path, describe(artifact.module), shape)
    return load_artifact(path)


def _changes(artifact: Artifact, data: ImageData, allowed: bool) -> list[str]:
    """In what the preprocessing of ``data`` differs from the artifact's, that of a network that
    normalizes aside.

    Raises:
        QatTricksError: it does, and is not ``allowed`` to.
    """
    changes = artifact.preprocessing.differences(data.preprocessing)
    if artifact.normalizes:
        changes = [
            change for change in changes if change.partition(":")[0] not in ("mean", "std", "scale")
        ]
    if changes and not allowed:
        raise QatTricksError(
            f"the data are preprocessed otherwise than {artifact.path.name} was made with "
            f"({'; '.join(changes)}): give the data its settings, or "
            "allow_preprocessing_change=true to measure both"
        )
    return changes


def _measure(predict: Predict, batches: Batches, data: ImageData, name: str) -> Metrics:
    return evaluate_classifier(predict, batches, data.num_classes, description=f"measure {name}")


def _enter(
    ledger: Ledger, name: str, predict: Predict, batches: Batches, data: ImageData
) -> Metrics:
    metrics = _measure(predict, batches, data, name)
    ledger.add(LedgerRow(name=name, before=None, after=metrics, seconds=metrics.seconds))
    return metrics


def _costs(device: dict[str, Any]) -> dict[str, Any]:
    """What ``measure_runtime`` would say of ONNX Runtime, which has been measured already."""
    costs = {key: device[key] for key in ("latency_ms", "load_ms")}
    return {"version": runtime_version(REFERENCE), **costs, "int8_layers": None}


def _in_runtime(
    predict: Predict,
    reference: Predict,
    against: str,
    deployed: Artifact,
    data: ImageData,
    name: str,
) -> dict[str, Any]:
    """What the network gives in one runtime; parity is with the simulated network, or else with
    ONNX Runtime.
    """
    return {
        "accuracy": _measure(predict, deployed.batches(data), data, name).accuracy,
        "parity": parity(predict, reference, deployed.batches(data), against=against),
    }


def _with_other_preprocessing(
    deployed: Artifact, given: ImageData, changes: list[str], own: Metrics, threads: int
) -> dict[str, Any]:
    """What the network makes of images that went through the data's preprocessing instead of its
    own.
    """
    given.prepare_data()
    given.setup()
    metrics = _measure(
        deployed.predict(threads), deployed.batches(given), given, "the other preprocessing"
    )
    return {
        "differences": changes,
        "preprocessing": given.preprocessing.described(),
        **metrics.as_dict(),
        "agreement": agreement(metrics.predictions, own.predictions),
    }
