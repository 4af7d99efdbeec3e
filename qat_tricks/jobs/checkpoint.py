"""A checkpoint that a run wrote, as an evaluation needs it. Loads Lightning, which evaluating an
ONNX file does without.
"""

import json
from pathlib import Path
from typing import Any

import torch

from qat_tricks.data import build_data
from qat_tricks.deploy.export import export_onnx
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.trainer.checkpoints import load_from_checkpoint

PREFIX = "qat_tricks."


def load_classifier(path: Path) -> Classifier:
    """Raises QatTricksError for a checkpoint that ``train.py`` did not write."""
    try:
        module = load_from_checkpoint(Classifier, path)
    except TypeError as error:
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say which network it holds"
        ) from error
    assert isinstance(module, Classifier)
    return module


def describe(module: Classifier) -> dict[str, Any]:
    """What the checkpoint says of itself: ``recipe``, ``model``, ``data`` and ``preprocessing``, as
    plain data.

    Raises:
        QatTricksError: it does not say which data it was made for.
    """
    data, preprocessing = module.hparams["data"], module.hparams["preprocessing"]
    if data is None:
        raise QatTricksError(
            "the checkpoint does not say which data it was made for: give one that train.py wrote"
        )
    if preprocessing is None:  # that of its data
        preprocessing = build_data(**data).preprocessing.described()
    return {
        "recipe": None,
        "model": module.hparams["model"],
        "data": data,
        "preprocessing": preprocessing,
    }


def export_classifier(
    module: Classifier, path: Path, described: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    """Writes the network to an ONNX file that says of itself what the checkpoint does."""
    metadata = {f"{PREFIX}{key}": json.dumps(value) for key, value in described.items()}
    export_onnx(module.network, path, torch.zeros(2, *shape), metadata=metadata)
