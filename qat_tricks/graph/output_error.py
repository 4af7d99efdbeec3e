"""How far the outputs of a changed network are from those of the float one; no labels are needed.

The divergence of the class probabilities, ``KL(p || q) = sum_c p_c * (log p_c - log q_c)`` with
``p`` of the float network, is what a changed network loses of the log-likelihood, averaged over
labels that the float network itself would draw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat_tricks.graph.logits import class_logits, classes_of
from qat_tricks.numerics.decibels import decibels


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """The error of a classifier's outputs against the float network's, over all images."""

    kl: float  # of the class probabilities, nats, the mean over images
    sqnr_db: float  # of the logits
    agreement: float  # share of images with the same likeliest class, 0..1


@torch.no_grad()
def output_error(reference: Tensor, output: Tensor) -> OutputError:
    """Compares logits, ``[N, classes, ...]`` or one an image, with those of the float network."""
    expected, given = (class_logits(logits).double() for logits in (reference, output))
    difference = given - expected
    return OutputError(
        kl=float(divergences(reference, output).mean()),
        sqnr_db=decibels(float(expected.square().sum()), float(difference.square().sum())),
        agreement=float((classes_of(reference) == classes_of(output)).double().mean()),
    )


@torch.no_grad()
def divergences(reference: Tensor, output: Tensor) -> Tensor:
    """The divergence of the class probabilities of each image, nats, float64 ``[N]``.

    Where the logits have positions, it is the mean over them.
    """
    expected = class_logits(reference).double().log_softmax(1)
    given = class_logits(output).double().log_softmax(1)
    # One that is not finite has lost everything; NaN would compare as neither better nor worse.
    each = (expected.exp() * (expected - given)).sum(1).nan_to_num(torch.inf, posinf=torch.inf)
    # Rounding may take a divergence of nothing below zero.
    return each.flatten(1).mean(1).clamp_min(0) if each.dim() > 1 else each.clamp_min(0)
