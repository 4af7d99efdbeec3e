"""Logits of classifiers: a network of two classes may yield one logit an image in place of two.

One logit ``z`` says the same as the two logits ``(0, z)``: the second class is the likelier one
where ``z`` is positive, and its probability is ``sigmoid(z)``.
"""

import torch
from torch import Tensor

from qat_tricks.errors import QatTricksError


def has_one_logit(logits: Tensor) -> bool:
    """Whether a network yields one logit an image: ``[N]``, ``[N, 1]`` or ``[N, 1, ...]``."""
    return logits.dim() == 1 or (logits.dim() > 1 and logits.shape[1] == 1)


def class_logits(logits: Tensor) -> Tensor:
    """The logits of each class.

    Args:
        logits: of a network, ``[N, classes, ...]``, or one an image: ``[N]``, ``[N, 1, ...]``.

    Returns:
        ``[N, classes, ...]``, of one logit ``z`` the two ``(0, z)``.
    """
    if not has_one_logit(logits):
        return logits
    one = logits.unsqueeze(1) if logits.dim() == 1 else logits
    return torch.cat([torch.zeros_like(one), one], 1)


def classes_of(logits: Tensor) -> Tensor:
    """The likeliest class, int64 ``[N, ...]``: of one logit the second where it is positive."""
    return class_logits(logits).argmax(1)


def check_batch_first(logits: Tensor, images: int) -> None:
    """Refuses logits whose first dimension is not the batch.

    Args:
        logits: what a network yields for a batch.
        images: of the batch.

    Raises:
        QatTricksError: one line that says which dimension is lost.
    """
    if logits.dim() == 0 or len(logits) != images:
        raise QatTricksError(
            f"the network yields logits of shape {tuple(logits.shape)} for {images} image"
            f"{'' if images == 1 else 's'}, allowed: the batch as the first dimension; squeeze one "
            "dimension, squeeze(1) and not squeeze(), and flatten from the second on, flatten(1)"
        )
