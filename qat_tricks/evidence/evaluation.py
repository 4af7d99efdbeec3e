"""Evaluates an artifact that a run wrote, a ``.onnx`` or a ``.ckpt``, and writes its report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from qat_tricks.classifier import Classifier
from qat_tricks.config import evaluation_folder
from qat_tricks.data import ImageData, build_data
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.parity import measure_parity
from qat_tricks.deploy.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.device import measure_device
from qat_tricks.evidence.ledger import Ledger, LedgerRow
from qat_tricks.evidence.metrics import Metrics, agreement, evaluate_classifier
from qat_tricks.evidence.report import write_report
from qat_tricks.lightning import load_from_checkpoint

_PREFIX = "qat_tricks."


def evaluate_artifact(config: DictConfig) -> dict[str, Any]:
    """Measures ``config.artifact`` and its float counterpart and returns the report that it has written.

    A checkpoint is measured as it is simulated, exported, and measured again in ONNX Runtime. The data are those that the
    artifact was made for, unless ``config.data`` names others; the float network is ``config.float``, or ``model_fp32.onnx``
    beside the artifact.

    Raises:
        QatTricksError: an artifact that is missing, damaged or not ours, or data with other classes.
    """
    torch.set_num_threads(config.measure.threads)
    folder = evaluation_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    artifact = Path(config.artifact)
    if artifact.suffix not in (".onnx", ".ckpt"):
        raise QatTricksError(f"artifact={artifact} is neither a .onnx nor a .ckpt file: give one that a run wrote")
    module = _load_module(artifact) if artifact.suffix == ".ckpt" else None
    described = _metadata(artifact) if module is None else _from_module(module)
    options: Any = described["data"] if config.data is None else OmegaConf.to_container(config.data, resolve=True)
    data = build_data(**options)
    data.prepare_data()
    data.setup()

    ledger = Ledger()
    reference = Path(config.float) if config.float else artifact.with_name("model_fp32.onnx")
    floats = None
    if config.float or reference.is_file():
        floats = _measure(_predictor(reference, config.measure.threads), data, "fp32", ledger)
    onnx_path, parity = artifact, None
    if module is not None:
        _measure(module.network.eval(), data, "simulated", ledger)
        onnx_path = folder / "model.onnx"
        example = torch.zeros(2, data.in_channels, *data.image_size)
        metadata = {f"{_PREFIX}{key}": json.dumps(value) for key, value in described.items()}
        export_onnx(module.network, onnx_path, example, metadata=metadata)
        parity = measure_parity(onnx_path, module.network, data.test_dataloader()).as_dict()
    metrics = _measure(_predictor(onnx_path, config.measure.threads), data, "onnx", ledger)

    paths = {"int8": onnx_path}
    if reference.is_file() and reference.suffix == ".onnx":
        paths["fp32"] = reference
    measure = config.measure
    report = {
        "recipe": described.get("recipe"),
        "model": described["model"]["name"],
        "data": options["name"],
        "stages": ledger.rows(),
        "agreement": agreement(metrics.predictions, floats.predictions) if floats is not None else None,
        "parity": parity,
        **measure_device(
            paths,
            (data.in_channels, *data.image_size),
            batch_size=measure.batch_size,
            threads=measure.threads,
            runs=measure.runs,
            max_seconds=measure.max_seconds,
        ),
        "preprocessing": {**data.preprocessing.as_dict(), "hash": data.preprocessing.hash},
    }
    write_report(folder, report)
    Console().print(ledger.as_table())
    return report


def _measure(predict: Callable[[Tensor], Tensor], data: ImageData, name: str, ledger: Ledger) -> Metrics:
    metrics = evaluate_classifier(predict, data.test_dataloader(), data.num_classes, description=f"measure {name}")
    ledger.add(LedgerRow(name=name, before=None, after=metrics, seconds=metrics.seconds))
    return metrics


def _predictor(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".ckpt":
        return _load_module(path).network.eval()
    session = open_session(path, threads=threads)
    return lambda images: torch.from_numpy(run_batch(session, images.numpy()))


def _load_module(path: Path) -> Classifier:
    try:
        module = load_from_checkpoint(Classifier, path)
    except TypeError as error:
        raise QatTricksError(f"{path} was not written by train.py: it does not say which network it holds") from error
    assert isinstance(module, Classifier)
    return module


def _from_module(module: Classifier) -> dict[str, Any]:
    if module.hparams["data"] is None:
        raise QatTricksError("the checkpoint does not say which data it was made for: give data=NAME")
    return {"recipe": None, "model": module.hparams["model"], "data": module.hparams["data"]}


def _metadata(path: Path) -> dict[str, Any]:
    """What the file says of itself, from its ``qat_tricks.*`` properties."""
    properties = open_session(path).get_modelmeta().custom_metadata_map
    described = {key: properties[_PREFIX + key] for key in ("recipe", "model", "data") if _PREFIX + key in properties}
    if set(described) != {"recipe", "model", "data"}:
        raise QatTricksError(f"{path} was not written by train.py: it does not say which network and data it is for")
    return {key: json.loads(value) for key, value in described.items()}
