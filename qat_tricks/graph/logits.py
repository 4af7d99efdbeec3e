"""Logits of classifiers: a network of two classes may yield one logit an image in place of two.

One logit ``z`` says the same as the two logits ``(0, z)``: the second class is the likelier one
where ``z`` is positive, and its probability is ``sigmoid(z)``.
"""

from collections.abc import Mapping
from typing import Any

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


def rows_of_logits(output: Any) -> Tensor:
    """The logits in a network's output, float32 ``[N * positions, classes]``: a row a decision."""
    return class_logits(logits_of(output)).movedim(1, -1).flatten(0, -2).float()


def drawn_classes(rows: Tensor) -> Tensor:
    """A class for each of ``rows``, drawn from its own probabilities, int64 ``[rows]``."""
    return torch.multinomial(rows.detach().softmax(1), 1)[:, 0]


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


def part_with_logits(output: Any) -> Any:
    """What stands where logits do in an output, or in the arguments of a graph's output node."""
    if isinstance(output, Mapping) and output:
        return output[next((key for key in ("logits", "out") if key in output), next(iter(output)))]
    if isinstance(output, (list, tuple)) and output:
        return output[0]
    return output


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a network.

    Args:
        output: a tensor; a mapping with ``"logits"`` or ``"out"``, else its first value counts; or
            a tuple that begins with the logits, behind which those of auxiliary heads follow.

    Raises:
        QatTricksError: there is no tensor in that place.
    """
    logits = part_with_logits(output)
    if isinstance(logits, Tensor):
        return logits
    raise QatTricksError(
        f"a network that yields {type(output).__name__} has no logits: yield a tensor, a tuple "
        'that begins with one, or a mapping with "logits"'
    )
