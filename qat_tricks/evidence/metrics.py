"""Quality of a classifier: accuracy, top-5, macro F1, ECE and NLL, in one pass over a loader."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, call_network
from qat_tricks.graph.logits import class_logits, has_one_logit
from qat_tricks.progress import track


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The figures of one pass over a loader of N images."""

    accuracy: float  # 0..1
    top5: float  # 0..1; top-k of all classes where there are fewer than five
    f1: float  # macro, 0..1, over the classes that the data holds
    ece: float  # expected calibration error in 15 bins, 0..1
    nll: float  # mean cross entropy, nats
    seconds: float  # of the whole pass, loading included
    # of each image, in loader order
    predictions: Tensor = field(repr=False, compare=False)  # int64 [N], the most likely classes
    confidences: Tensor = field(repr=False, compare=False)  # float32 [N], their probabilities
    labels: Tensor = field(repr=False, compare=False)  # int64 [N]

    def as_dict(self) -> dict[str, float]:
        """Returns the figures as plain data, without what is of single images."""
        return {key: value for key, value in asdict(self).items() if not isinstance(value, Tensor)}


def evaluate_classifier(
    predict: Callable[..., Tensor],
    loader: Iterable[Any],
    num_classes: int,
    *,
    description: str = "",
) -> Metrics:
    """Measures a classifier, showing a progress bar on terminals.

    Args:
        predict: images [batch, channels, height, width], or several inputs, to logits [batch,
            num_classes]. Of two classes, one logit an image will do, [batch] or [batch, 1]: that
            of the second.
        loader: yields (images, labels), or a tuple of inputs and labels, with int64 labels [batch].
            Of two classes, labels may also be the floats 0 and 1, and have shape [batch, 1].
        num_classes: of the network; the data may hold fewer. For one logit, 1 and 2 say the same.
        description: the text of the progress bar.

    Raises:
        QatTricksError: the loader is empty or yields something else, labels are out of range, the
            logits contain NaN or have another number of classes.
    """
    start = time.perf_counter()
    classes = max(num_classes, 2)  # one logit tells two classes apart
    metrics = _torchmetrics(classes)
    nll = torch.zeros((), dtype=torch.float64)
    support = torch.zeros(classes, dtype=torch.int64)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, (inputs, given) in enumerate(_batches(loader, description)):
        labels = _as_classes(given.cpu(), classes)
        _check_labels(labels, classes, index)
        with torch.no_grad():
            logits = call_network(predict, inputs).detach().float().cpu()
        _check_logits(logits, len(labels), num_classes, index)
        logits = class_logits(logits)
        probabilities = logits.softmax(dim=1)
        metrics.update(probabilities, labels)
        nll += F.cross_entropy(logits.double(), labels, reduction="sum")
        support += torch.bincount(labels, minlength=classes)
        seen.append((logits.argmax(dim=1), probabilities.amax(dim=1), labels))
    if not seen:
        raise QatTricksError("the loader to evaluate on is empty: give it at least one batch")
    values = metrics.compute()
    predictions, confidences, labels = map(torch.cat, zip(*seen, strict=True))
    return Metrics(
        accuracy=values["accuracy"].item(),
        top5=values["top5"].item(),
        # a class that the data lacks has no F1
        f1=values["f1"][support > 0].mean().item(),
        ece=values["ece"].item(),
        nll=(nll / support.sum()).item(),
        seconds=time.perf_counter() - start,
        predictions=predictions,
        confidences=confidences,
        labels=labels,
    )


def _torchmetrics(num_classes: int) -> MetricCollection:
    """Accuracy, top-5, F1 of each class, and ECE."""
    # ``evaluate_classifier`` checks the batches itself, and no other process takes part
    options: dict[str, Any] = {"validate_args": False, "sync_on_compute": False}
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", **options),
            "top5": MulticlassAccuracy(
                num_classes, average="micro", top_k=min(5, num_classes), **options
            ),
            "f1": MulticlassF1Score(num_classes, average="none", **options),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, **options),
        },
        compute_groups=False,
    )


def agreement(first: Tensor, second: Tensor) -> float:
    """Returns the share, 0..1, of images on which two classifiers' predictions [N] are the same.

    Raises:
        QatTricksError: the predictions are not of the same, non-empty set of images.
    """
    if first.shape != second.shape or first.numel() == 0:
        raise QatTricksError(
            f"agreement needs predictions of the same images, {tuple(first.shape)} and "
            f"{tuple(second.shape)} given: evaluate both on the same loader, without shuffling"
        )
    return (first.cpu() == second.cpu()).double().mean().item()


def _batches(loader: Iterable[Any], description: str) -> Iterable[tuple[Inputs, Tensor]]:
    for index, batch in enumerate(track(loader, description or "evaluating")):
        is_pair = isinstance(batch, list | tuple) and len(batch) == 2
        if not (is_pair and _are_inputs(batch[0]) and isinstance(batch[1], Tensor)):
            raise QatTricksError(
                f"batch {index} of the loader is a {type(batch).__name__}, allowed: a pair of "
                "tensors (images, labels), or of a tuple of inputs and labels"
            )
        yield batch[0], batch[1]


def _are_inputs(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and all(isinstance(part, Tensor) for part in value)
    )


def _as_classes(labels: Tensor, classes: int) -> Tensor:
    """Labels as class indices, int64.

    Those that sigmoid losses take become classes: floats 0 and 1, a column of them.
    """
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        labels = labels.long()  # datasets also have bytes and int32
    if classes > 2:
        return labels
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    is_whole = labels.is_floating_point() and bool(((labels == 0) | (labels == 1)).all())
    return labels.long() if is_whole or labels.dtype == torch.bool else labels


def _check_labels(labels: Tensor, num_classes: int, index: int) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise QatTricksError(
            f"labels of batch {index} have shape {tuple(labels.shape)} and type {labels.dtype}, "
            "allowed: one integer class an image, at least one image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise QatTricksError(
            f"labels of batch {index} run from {low} to {high}, the network's classes from 0 to "
            f"{num_classes - 1}: choose data and a network with the same classes"
        )


def _check_logits(logits: Tensor, images: int, num_classes: int, index: int) -> None:
    is_one = num_classes <= 2 and has_one_logit(logits) and logits.numel() == images == len(logits)
    if not is_one and logits.shape != (images, num_classes):
        raise QatTricksError(
            f"the network gave logits of shape {tuple(logits.shape)} on batch {index}, expected "
            f"({images}, {num_classes}): choose data and a network with the same classes"
        )
    if logits.isnan().any():
        raise QatTricksError(
            f"the network gave NaN logits on batch {index}: check its weights and the images for "
            "NaN and infinity"
        )
