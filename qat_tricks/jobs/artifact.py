"""A file of a network, a ``.onnx`` or a ``.ckpt``, and the description that it carries.

An ONNX file is opened without Lightning and the training code.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qat_tricks.data import ImageData, Preprocessing
from qat_tricks.deploy.normalization import BUILT_IN, NORMALIZATION_KEY
from qat_tricks.deploy.parity.runtimes import Predict, predictor
from qat_tricks.deploy.runtimes.registry import REFERENCE
from qat_tricks.deploy.runtimes.session import open_session
from qat_tricks.deploy.targets import target_named
from qat_tricks.errors import QatTricksError
from qat_tricks.graph.logits import logits_of
from qat_tricks.jobs.description import NEEDS_DATA, foreign, from_metadata


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file of a network, with its description."""

    path: Path
    recipe: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    preprocessing: Preprocessing
    class_names: Sequence[str] | None = None  # in the order of the logits; None: it says none
    # The target and the opset of a run's own file; None: those of ``export_onnx``.
    export: Mapping[str, Any] | None = None
    normalizes: bool = False  # it takes uint8 pixels and normalizes them itself
    simulated: nn.Module | None = None  # the network of a checkpoint
    # From a batch of images and labels to the network's inputs, where a module changes the images.
    inputs: Callable[[Any], Any] | None = None

    @property
    def network(self) -> nn.Module:
        """The simulated network of a checkpoint, in evaluation mode."""
        assert self.simulated is not None
        return self.simulated.eval()

    def batches(self, data: ImageData, few: int | None = None) -> Iterable[Any]:
        """Returns the test images as the network takes them, with their labels.

        Args:
            data: loaded.
            few: number of images, balanced by class; None means all.
        """
        if few is not None:
            batches = data.test_sample(few, pixels=self.normalizes)
        else:
            batches = data.test_pixels() if self.normalizes else data.test_dataloader()
        return batches if self.inputs is None else _Changed(batches, self.inputs)

    def predict(self, threads: int, runtime: str = REFERENCE) -> Predict:
        """Returns a function from images, as the network takes them, to logits."""
        if self.simulated is None:
            return predictor(self.path, threads, runtime)
        return lambda *inputs: logits_of(self.network(*inputs))


@dataclass(frozen=True)
class _Changed:
    """The batches of a loader, with the network's inputs in place of the images."""

    batches: Iterable[Any]
    inputs: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield self.inputs(batch), batch[1]


def load_artifact(
    path: Path, *, module: str | None = None, data: Mapping[str, Any] | None = None
) -> Artifact:
    """Opens a ``.onnx`` or ``.ckpt`` and reads its description.

    Args:
        path: of the file.
        module: of a checkpoint that ``train.py`` did not write, the LightningModule's class,
            ``package.Class``.
        data: settings of the data, for a file that does not say them.

    Raises:
        QatTricksError: it is missing or damaged, or does not say enough of itself.
    """
    if path.suffix == ".ckpt":
        return _checkpoint(path, module, data)
    if path.suffix != ".onnx":
        raise QatTricksError(f"{path} is neither a .onnx nor a .ckpt file: give one of them")
    session = open_session(path)
    _check_one_input(path, session)
    metadata = session.get_modelmeta().custom_metadata_map
    # files that take normalized images do not have this key
    normalization = json.loads(metadata.get(NORMALIZATION_KEY, "null"))
    described = from_metadata(metadata, path, data)
    return _artifact(path, described, normalizes=normalization == BUILT_IN)


def _checkpoint(path: Path, module: str | None, data: Mapping[str, Any] | None) -> Artifact:
    # loads Lightning, which an ONNX file does without
    from qat_tricks.jobs.checkpoint import describe, load_classifier, load_own_module

    if module is None:
        classifier = load_classifier(path)
        return _artifact(path, describe(classifier), simulated=classifier.network)
    if data is None:
        raise QatTricksError(f"{path} does not say which data it was made for: {NEEDS_DATA}")
    own = load_own_module(path, module)
    described = foreign(type(own.module).__name__, data)
    return _artifact(path, described, simulated=own.network, inputs=own.inputs)


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
    from qat_tricks.jobs.checkpoint import export_network

    described: dict[str, Any] = {
        "recipe": artifact.recipe,
        "model": artifact.model,
        "data": artifact.data,
    }
    described["preprocessing"] = artifact.preprocessing.described()
    if artifact.class_names is not None:
        described["class_names"] = list(artifact.class_names)
    choices = {}
    if artifact.export is not None:
        target, choices["opset"] = artifact.export["target"], artifact.export["opset"]
        choices["layout"] = target_named(target).layout
        described["target"] = target
    export_network(artifact.network, path, described, images, min_sqnr_db, **choices)
    return replace(load_artifact(path), inputs=artifact.inputs)


def check_classes(artifact: Artifact, data: ImageData) -> None:
    """Raises QatTricksError unless the classes of ``data`` are the artifact's, in their order."""
    own, others = artifact.class_names, data.class_names
    if own is None or list(own) == list(others):
        return
    # one list may be the beginning of the other
    pairs = zip(own, others, strict=False)
    differing = next((pair for pair in pairs if pair[0] != pair[1]), None)
    which = f', the first that differs "{differing[0]}" and "{differing[1]}"' if differing else ""
    raise QatTricksError(
        f"the {len(others)} classes of the data are not the {len(own)} of {artifact.path.name}"
        f"{which}: give data with the same classes, by the same names"
    )


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
            "qat_tricks.evaluate(path, loader)"
        )
