"""A checkpoint that a run wrote, as an evaluation needs it.

It loads Lightning, which the evaluation of an ONNX file does without.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qat_tricks.data import build_data
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.parity.logits import MIN_SQNR_DB
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import check_batches
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.jobs.description import to_metadata
from qat_tricks.trainer.checkpoints import load_from_checkpoint


def load_classifier(path: Path) -> Classifier:
    """Loads the classifier of a checkpoint.

    Raises:
        QatTricksError: ``train.py`` did not write it.
    """
    try:
        module = load_from_checkpoint(Classifier, path)
    # A checkpoint of another LightningModule lacks the argument ``model``.
    except TypeError as error:
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say which network it holds"
        ) from error
    assert isinstance(module, Classifier)
    return module


def describe(module: Classifier) -> dict[str, Any]:
    """Returns the description of a checkpoint: ``recipe``, ``model``, ``data``, ``preprocessing``.

    Raises:
        QatTricksError: it does not say which data it was made for.
    """
    data, preprocessing = module.hparams["data"], module.hparams["preprocessing"]
    if data is None:
        raise QatTricksError(
            "the checkpoint does not say which data it was made for: give one that train.py wrote"
        )
    if preprocessing is None:  # older checkpoints: that of their data
        preprocessing = build_data(**data).preprocessing.described()
    return {
        "recipe": None,
        "model": module.hparams["model"],
        "data": data,
        "preprocessing": preprocessing,
    }


def export_classifier(
    module: Classifier,
    path: Path,
    description: dict[str, Any],
    images: Iterable[Any],
    min_sqnr_db: float = MIN_SQNR_DB,
) -> None:
    """Writes the network to an ONNX file with a description.

    Args:
        module: the classifier.
        path: of the file.
        description: from ``describe``.
        images: at least one batch ``[N, C, H, W]``, or pairs of one and labels, on which the file
            is compared with the network.
        min_sqnr_db: the least ratio of the network's logits to their error in the file.

    Raises:
        QatTricksError: there are no images, or the file does not run as simulated.
    """
    batches = list(images)
    check_batches(batches, "to compare the exported file on")
    export_onnx(
        module.network,
        path,
        batches[0],
        images=batches,
        metadata=to_metadata(description),
        min_sqnr_db=min_sqnr_db,
    )
