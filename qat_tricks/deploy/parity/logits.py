"""Whether two ways to run a network give the same logits."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from qat_tricks.errors import QatTricksError

# stands for logits without any difference, so that a report stays plain JSON
LARGEST_SQNR_DB = 200.0


def compare_logits(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Compares logits ``[batch, classes]`` with those of a reference.

    Args:
        pairs: the reference's logits and the others, a batch each.

    Returns:
        ``top1_agreement`` (0..1), ``max_abs_error``, ``sqnr_db`` (power of the reference over that
        of the difference, within 200 dB) and ``images``.

    Raises:
        QatTricksError: no images, or logits of different shapes.
    """
    images = 0
    agreeing = largest = signal = noise = 0.0
    for reference, other in pairs:
        if reference.shape != other.shape:
            raise QatTricksError(
                f"logits of shapes {reference.shape} and {other.shape} cannot be compared: run the "
                "same images"
            )
        difference = other.astype(np.float64) - reference
        images += len(reference)
        agreeing += len(reference) * float((reference.argmax(1) == other.argmax(1)).mean())
        largest = max(largest, float(np.nan_to_num(np.abs(difference), nan=np.inf).max()))
        noise += float(np.square(difference).sum())
        signal += float(np.square(reference, dtype=np.float64).sum())
    if images == 0:
        raise QatTricksError("there are no images to compare logits on: give at least one batch")
    return {
        "top1_agreement": agreeing / images,
        "max_abs_error": largest,
        "sqnr_db": decibels(signal, noise),
        "images": images,
    }


def agrees(top1_agreement: float, images: int, least: float) -> bool:
    """Whether so many of ``images`` got the same class as ``least``, a share, asks; below 1, one
    image alone is never held against it.
    """
    return round((1 - top1_agreement) * images) <= max((1 - least) * images, float(least < 1))


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB, from -200 to 200."""
    if noise == 0.0:
        return LARGEST_SQNR_DB
    if not math.isfinite(noise) or not math.isfinite(signal):
        return -LARGEST_SQNR_DB
    return min(max(10 * math.log10(max(signal, 1e-300) / noise), -LARGEST_SQNR_DB), LARGEST_SQNR_DB)
