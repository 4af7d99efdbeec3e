"""Judges a quantized classifier against its float self, on validation images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_structure

from qat_tricks.data.splits import balanced_subset
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.metrics import Metrics, agreement
from qat_tricks.evidence.paired import paired_change
from qat_tricks.graph.inputs import input_names
from qat_tricks.jobs.evaluation import labels_of, metrics_of


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How a network does against the float one, on the same images."""

    images: int
    accuracy: float  # 0..1
    change: dict[str, float]  # of accuracy in points, see ``evidence.paired.paired_change``
    f1_change: float  # points of macro F1
    agreement: float  # share of images with the class that the float network gives, 0..1
    seconds: float  # of the pass


class Judge:
    """Knows what the float network gives on the validation images, and on a few of them.

    Args:
        module: in float.
        batches: of validation images, the same ones in the same order in each pass.
        few: images of a subset in which each class has the same share; it is kept in memory.
        data: the data module that the images are of, if they are.

    Raises:
        QatTricksError: there are no labels, or no images.
    """

    def __init__(
        self, module: nn.Module, batches: Iterable[Any], few: int, data: Any = None
    ) -> None:
        self.batches, self.data = batches, data
        self.reference = metrics_of(module, batches, data)
        self.images = len(self.reference.labels)
        names = input_names(module)
        chosen = balanced_subset(self.reference.labels, few, seed=0).sort().values
        self.few = list(_rows(batches, chosen, names))
        self.reference_of_few = metrics_of(module, self.few, data)

    def judge(self, module: nn.Module) -> Judgement:
        """Judges ``module`` on all images.

        Raises:
            QatTricksError: the loader gives the images in another order than before.
        """
        return _compare(self.reference, metrics_of(module, self.batches, self.data))

    def judge_on_few(self, module: nn.Module) -> Judgement:
        """Judges ``module`` on the subset."""
        return _compare(self.reference_of_few, metrics_of(module, self.few, self.data))

    def pass_seconds(self, module: nn.Module) -> float:
        """About how long ``judge`` takes for ``module``, which has run on the subset before.

        The float network's pass over all images is known. The subset, which lies in memory, tells
        how much longer the network takes; the first pass of a network would be longer than others.
        """
        float_seconds = self.reference_of_few.seconds
        computing = metrics_of(module, self.few, self.data).seconds - float_seconds
        return self.reference.seconds + max(0.0, computing) * self.images / len(
            self.reference_of_few.labels
        )


def other_images() -> QatTricksError:
    """The error of a loader that does not give the same again."""
    return QatTricksError(
        "the validation loader gives other images, or another order, in each pass: two networks "
        "are compared image by image; give a loader with shuffle=False"
    )


def _compare(before: Metrics, after: Metrics) -> Judgement:
    if not torch.equal(before.labels, after.labels):
        raise other_images()
    right = [metrics.predictions == metrics.labels for metrics in (before, after)]
    return Judgement(
        images=len(after.labels),
        accuracy=after.accuracy,
        change=paired_change(*right),
        f1_change=100 * (after.f1 - before.f1),
        agreement=agreement(before.predictions, after.predictions),
        seconds=after.seconds,
    )


def _rows(batches: Iterable[Any], chosen: Tensor, names: Sequence[str]) -> Iterator[Any]:
    """The images with the numbers ``chosen``, in batches of about the size that they came in."""
    begin, parts, held = 0, [], 0
    for index, batch in enumerate(batches):
        size = len(labels_of(batch, names, index))
        rows = chosen[(chosen >= begin) & (chosen < begin + size)] - begin
        begin += size
        if len(rows):
            parts.append(tree_map(partial(_taken, rows=rows, size=size), batch))
            held += len(rows)
        if held >= size:
            yield from _joined(parts)
            parts, held = [], 0
    yield from _joined(parts)


def _taken(value: Any, rows: Tensor, size: int) -> Any:
    """Rows of a tensor that has one for each image of the batch; anything else as it is."""
    of_images = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
    return value[rows] if of_images else value


def _joined(parts: Sequence[Any]) -> Iterator[Any]:
    """One batch of several; those that differ in more than their images, as in names, stay so."""
    if len({repr(tree_structure(part)) for part in parts}) > 1:
        yield from parts
    elif parts:
        yield tree_map(
            lambda *values: torch.cat(values) if _has_rows(values[0]) else values[0], *parts
        )


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
