"""Compares the logits of two ways to run a network, and judges the difference."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB, decibels

# The limit of an export catches faults, and not rounding: a value that float arithmetic puts on the
# other side of a rounding boundary than integer arithmetic does spreads through a deep network.
# Trained networks stay above it all the same; of those with random weights, some with LayerNorms
# and attention do not (docs/results/coverage.md).
MIN_SQNR_DB = 30.0


def compare_logits(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Compares logits ``[batch, classes]``, or one logit an image, with those of a reference.

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
        with np.errstate(invalid="ignore"):  # of two infinities: NaN, which is told below
            difference = other.astype(np.float64) - reference
        images += len(reference)
        # the mean, and not the sum, also where each image has logits at several positions
        agreeing += len(reference) * _share_of_same_class(reference, other)
        # NaN is no number to be the largest: it counts as an infinite error
        errors = np.where(np.isnan(difference), np.inf, np.abs(difference))
        largest = max(largest, float(errors.max()))
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


def _share_of_same_class(reference: np.ndarray, other: np.ndarray) -> float:
    # The rule of ``graph.logits``, without torch: of one logit the sign is the class.
    if reference.ndim > 1 and reference.shape[1] > 1:
        return float((reference.argmax(1) == other.argmax(1)).mean())
    # A network that ends in a sigmoid yields one probability, of which no sign tells the class.
    is_probability = bool(((reference >= 0) & (reference <= 1)).all())
    between = 0.5 if is_probability else 0.0
    return float(((reference > between) == (other > between)).mean())


def check_agreement(
    comparison: Mapping[str, Any],
    fault: str,
    *,
    min_top1_agreement: float,
    min_sqnr_db: float = -LARGEST_SQNR_DB,
    remedy: str,
) -> None:
    """Refuses logits that differ more from those of the reference than is allowed.

    Logits that are NaN or infinite are refused whatever is allowed.

    Args:
        comparison: the figures of ``compare_logits``.
        fault: begins the error: which network does not run as which other.
        min_top1_agreement: least share of images, 0..1, with the same class (see ``agrees``).
        min_sqnr_db: least ratio of the logits to their error, in dB; by default any ratio will do.
        remedy: ends the error: how to mend it.

    Raises:
        QatTricksError: one line with the figures.
    """
    agreement, images = comparison["top1_agreement"], comparison["images"]
    sqnr_db = comparison["sqnr_db"]
    if not math.isfinite(comparison["max_abs_error"]):
        raise QatTricksError(
            f"{fault}: of {images} images, some have logits that are NaN or infinite: check the "
            "network's weights and the images for NaN and infinity"
        )
    if agrees(agreement, images, min_top1_agreement) and sqnr_db >= min_sqnr_db:
        return
    least_sqnr = f" (at least {min_sqnr_db:g})" if min_sqnr_db > -LARGEST_SQNR_DB else ""
    raise QatTricksError(
        f"{fault}: on {images} images top-1 agreement {agreement:.4f} (at least "
        f"{min_top1_agreement}), SQNR {sqnr_db:.1f} dB{least_sqnr}, largest error of a logit "
        f"{comparison['max_abs_error']:.3g}; {remedy}"
    )


def agrees(top1_agreement: float, images: int, least: float) -> bool:
    """Whether agreement reaches ``least``.

    One differing image is always tolerated unless ``least`` is 1.
    """
    differing = round((1 - top1_agreement) * images)
    return differing <= max((1 - least) * images, float(least < 1))
