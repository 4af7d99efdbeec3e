"""A file that a run wrote, a ``.onnx`` or a ``.ckpt``, and the description that it carries.

An ONNX file is opened without Lightning and the training code.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qat_tricks.data import ImageData, Preprocessing
from qat_tricks.data.module import Batches
from qat_tricks.deploy.normalization import BUILT_IN, NORMALIZATION_KEY
from qat_tricks.deploy.parity.runtimes import Predict, predictor
from qat_tricks.deploy.runtimes.registry import REFERENCE
from qat_tricks.deploy.runtimes.session import open_session
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.description import from_metadata


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file that a run wrote, with its description."""

    path: Path
    recipe: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    preprocessing: Preprocessing
    normalizes: bool = False  # it takes uint8 pixels and normalizes them itself
    module: Any = None  # the classifier of a checkpoint

    @property
    def network(self) -> nn.Module:
        """The simulated network of a checkpoint, in evaluation mode."""
        return self.module.network.eval()

    def batches(self, data: ImageData) -> Batches:
        """Returns the test images as the network takes them."""
        return data.test_pixels() if self.normalizes else data.test_dataloader()

    def predict(self, threads: int, runtime: str = REFERENCE) -> Predict:
        """Returns a function from images, as the network takes them, to logits."""
        return predictor(self.path, threads, runtime) if self.module is None else self.network


def load_artifact(path: Path) -> Artifact:
    """Opens a ``.onnx`` or ``.ckpt`` and reads its description.

    Raises:
        QatTricksError: it is missing, damaged, or was not written by a run.
    """
    if path.suffix == ".ckpt":
        # loads Lightning, which an ONNX file does without
        from qat_tricks.jobs.checkpoint import describe, load_classifier

        module = load_classifier(path)
        return _artifact(path, describe(module), module=module)
    if path.suffix != ".onnx":
        raise QatTricksError(
            f"{path} is neither a .onnx nor a .ckpt file: give one that a run wrote"
        )
    session = open_session(path)
    _check_one_input(path, session)
    metadata = session.get_modelmeta().custom_metadata_map
    # files that take normalized images do not have this key
    normalization = json.loads(metadata.get(NORMALIZATION_KEY, "null"))
    return _artifact(path, from_metadata(metadata, path), normalizes=normalization == BUILT_IN)


def export_artifact(
    artifact: Artifact, path: Path, images: Iterable[Any], min_sqnr_db: float
) -> Artifact:
    """Exports the network of a checkpoint to ``path`` and opens that file.

    Args:
        artifact: opened from a checkpoint.
        path: of the file to write.
        images: batches to measure parity on.
        min_sqnr_db: the least ratio of the simulated logits to their error in the file.

    Raises:
        QatTricksError: the file does not run as simulated.
    """
    # loads Lightning, which an ONNX file does without
    from qat_tricks.jobs.checkpoint import describe, export_classifier

    export_classifier(artifact.module, path, describe(artifact.module), images, min_sqnr_db)
    return load_artifact(path)


def preprocessing_changes(artifact: Artifact, data: ImageData, *, allowed: bool) -> list[str]:
    """Compares the preprocessing of ``data`` with the artifact's.

    The mean, std and scale of a network that normalizes pixels itself do not count.

    Returns:
        The differences, a text for each.

    Raises:
        QatTricksError: they differ, and are not ``allowed`` to.
    """
    changes = artifact.preprocessing.differences(data.preprocessing)
    if artifact.normalizes:
        # Its file has them built in, so the data's are not used.
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


def _artifact(path: Path, description: dict[str, Any], **more: Any) -> Artifact:
    preprocessing = Preprocessing.from_described(description["preprocessing"])
    return Artifact(path=path, **{**description, "preprocessing": preprocessing}, **more)


def _check_one_input(path: Path, session: Any) -> None:
    names = [entry.name for entry in session.get_inputs()]
    if len(names) > 1:
        raise QatTricksError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), and the data sets that "
            "evaluate.py reads hold images only: measure it in Python, with "
            "qat_tricks.evidence.metrics.evaluate_classifier"
        )
