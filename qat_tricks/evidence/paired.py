"""Two classifiers on the same images: what their difference is worth.

Two networks that are right on as many images may be right on others; and a difference of a few
images may be chance. So they are compared image by image. Only images that one of them has right
and the other wrong tell which is better: McNemar 1947, "Note on the sampling error of the
difference between correlated proportions or percentages".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import binomtest, false_discovery_control
from torch import Tensor

from qat_tricks.evidence.language import Language
from qat_tricks.evidence.metrics import Metrics, agreement
from qat_tricks.evidence.show import show

CONFIDENCE = 0.95  # of all intervals
SIGNIFICANT = 1 - CONFIDENCE
RELIABILITY_BINS = 15  # as in the expected calibration error
MOST_SHOWN = 24  # images, and changes of confusions
_Z = 1.959964  # of a two-sided interval of 95 %


def compare(first: Metrics, second: Metrics, class_names: Sequence[str]) -> dict[str, Any]:
    """Compares a second classifier with a first one, on the same images in the same order.

    Args:
        first: the float network's.
        second: the int8 network's.
        class_names: of the labels, in order.

    Returns:
        Plain data: ``images``; ``accuracy`` of both with Wilson's intervals; ``change`` in points,
        with its interval and the exact McNemar ``p``; ``verdict``; ``classes``, ``confusions``,
        ``reliability`` and ``disagreements``. Shares are 0..1.

    Raises:
        QatTricksError: they were measured on other images.
    """
    share = agreement(first.predictions, second.predictions)
    rights = [metrics.predictions == metrics.labels for metrics in (first, second)]
    change = paired_change(*rights)
    return {
        "images": len(first.labels),
        "agreement": share,
        "accuracy": {
            name: _share(int(right.sum()), len(right))
            for name, right in zip(("fp32", "int8"), rights, strict=True)
        },
        "change": change,
        "verdict": verdict(change),
        "classes": _classes(rights[0], rights[1], first.labels, class_names),
        "confusions": _confusions(first, second, class_names),
        "reliability": {"fp32": _reliability(first), "int8": _reliability(second)},
        "disagreements": _disagreements(first, second, class_names),
    }


def paired_change(before: Tensor, after: Tensor) -> dict[str, float]:
    """The change of accuracy between two classifiers on the same images.

    The interval is Wald's with half an image added to each cell of the table of both, which holds
    its confidence with few images too, and with none on which they differ: Agresti and Min 2005,
    "Simple improved confidence intervals for comparing matched proportions". It reaches at least as
    far as Clopper and Pearson's of the images on which they differ, so that it holds 0 where the
    exact test tells no difference.

    Args:
        before: whether each image is classified rightly, bool ``[N]``.
        after: the same of the other classifier.

    Returns:
        ``points`` with ``low`` and ``high``, -100..100; ``lost`` and ``gained``, the images that
        only the first, and only the other, has right; and McNemar's exact ``p``.
    """
    images = len(before)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    b, c, n = lost + 0.5, gained + 0.5, images + 2
    centre = (c - b) / n
    error = _Z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    differ = lost + gained
    low, high = centre - error, centre + error
    if differ:
        exact = binomtest(gained, differ).proportion_ci(CONFIDENCE, method="exact")
        low = min(low, (2 * exact.low - 1) * differ / images)
        high = max(high, (2 * exact.high - 1) * differ / images)
    return {
        "points": 100 * (gained - lost) / images,
        "low": float(100 * max(low, -1.0)),
        "high": float(100 * min(high, 1.0)),
        "lost": lost,
        "gained": gained,
        "p": float(binomtest(lost, differ, 0.5).pvalue) if differ else 1.0,
    }


def verdict(change: dict[str, float]) -> str:
    """``worse``, ``better``, or ``no difference shown``, of a ``paired_change``."""
    if change["p"] >= SIGNIFICANT:
        return "no difference shown"
    return "worse" if change["points"] < 0 else "better"


def show_change(change: Mapping[str, float], say: Language) -> str:
    """A ``paired_change`` in points, with its interval."""
    shown = {key: show(change[key], "points") for key in ("points", "low", "high")}
    return say("%(points)s points (%(low)s to %(high)s)", **shown)


def _share(count: int, of: int) -> dict[str, float]:
    """A share with Wilson's interval."""
    interval = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return {"share": count / of, "low": float(interval.low), "high": float(interval.high)}


def _classes(
    before: Tensor, after: Tensor, labels: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Each class that the images hold, the worst change first.

    Among many classes some change by chance: ``q`` is the share of such among those with a ``q``
    at most as large (Benjamini and Hochberg 1995).
    """
    rows = []
    for label in labels.unique().tolist():
        own = labels == label
        change = paired_change(before[own], after[own])
        shares = {"fp32": int(before[own].sum()), "int8": int(after[own].sum())}
        of_both = {name: _share(count, int(own.sum())) for name, count in shares.items()}
        rows.append({"name": _name(label, names), "images": int(own.sum()), **of_both, **change})
    for row, q in zip(rows, false_discovery_control([row["p"] for row in rows]), strict=True):
        row["q"] = float(q)
    return sorted(rows, key=lambda row: (row["points"], row["p"]))


def _confusions(first: Metrics, second: Metrics, names: Sequence[str]) -> list[dict[str, Any]]:
    """The mistakes that became more or fewer, those that changed most first."""
    counts: dict[tuple[int, int], list[int]] = {}
    for place, metrics in enumerate((first, second)):
        wrong = metrics.predictions != metrics.labels
        pairs = torch.stack([metrics.labels[wrong], metrics.predictions[wrong]], dim=1)
        found, numbers = pairs.unique(dim=0, return_counts=True)
        for (label, predicted), number in zip(found.tolist(), numbers.tolist(), strict=True):
            counts.setdefault((label, predicted), [0, 0])[place] = number
    changed: list[dict[str, Any]] = [
        {"label": _name(label, names), "predicted": _name(predicted, names), "fp32": a, "int8": b}
        for (label, predicted), (a, b) in sorted(counts.items())
        if a != b
    ]
    return sorted(changed, key=lambda row: -abs(row["int8"] - row["fp32"]))[:MOST_SHOWN]


def _reliability(metrics: Metrics) -> list[dict[str, float]]:
    """How often a classifier is right where it is so sure: a row for each bin with images.

    ``share`` of them is right, with Wilson's interval.
    """
    right = metrics.predictions == metrics.labels
    bins = (metrics.confidences * RELIABILITY_BINS).long().clamp(max=RELIABILITY_BINS - 1)
    return [
        {
            "confidence": metrics.confidences[own].double().mean().item(),
            "images": int(own.sum()),
            **_share(int(right[own].sum()), int(own.sum())),
        }
        for index in bins.unique().tolist()
        for own in [bins == index]
    ]


def _disagreements(first: Metrics, second: Metrics, names: Sequence[str]) -> list[dict[str, Any]]:
    """Images that get another class, those on which the second is surest first.

    ``image`` is the place of an image among the test images.
    """
    differ = (first.predictions != second.predictions).nonzero().flatten()
    order = second.confidences[differ].argsort(descending=True, stable=True)
    return [
        {
            "image": index,
            "label": _name(int(first.labels[index]), names),
            "fp32": _name(int(first.predictions[index]), names),
            "fp32_confidence": float(first.confidences[index]),
            "int8": _name(int(second.predictions[index]), names),
            "int8_confidence": float(second.confidences[index]),
        }
        for index in differ[order][:MOST_SHOWN].tolist()
    ]


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)
