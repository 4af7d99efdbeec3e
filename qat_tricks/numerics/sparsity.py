"""Which weights may go, and how many of them at which time: schedules and granularities.

* schedule: cubic, ``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (t_1 - t_0))^3`` (Zhu and Gupta
  2017, "To prune, or not to prune", arXiv 1710.01878, equation 1);
* granularity: single weights, or 2:4 (two of every four along the input channels, Mishra et al.
  2021, arXiv 2104.08378).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def cubic_schedule(
    progress: float, *, initial: float, final: float, start: float, end: float
) -> float:
    """The sparsity at ``progress`` of the training.

    It is ``initial`` until ``start`` and ``final`` from ``end`` on.
    """
    if progress >= end:
        return final
    if progress <= start:
        return initial
    remaining = 1 - (progress - start) / (end - start)
    return final + (initial - final) * remaining**3


def single_weights(score: Tensor) -> Tensor | None:
    """Lets any weight go."""
    return score


def two_of_four(score: Tensor) -> Tensor | None:
    """Keeps the two largest scores of every four consecutive input channels.

    A layer whose input channels are no multiple of four does not fit.
    """
    if score.shape[1] % 4:
        return None
    # The input channels go last, where neighbours in fours are one row.
    channels_last = score.transpose(1, -1)
    fours = channels_last.reshape(*channels_last.shape[:-1], -1, 4)
    largest = fours.topk(2, dim=-1).indices
    # Infinite scores are never the smallest, so these two stay.
    fours = fours.scatter(-1, largest, float("inf"))
    return fours.reshape(channels_last.shape).transpose(1, -1)


# A schedule gives the sparsity at a time. A granularity gives the scores back, infinite where a
# weight must stay, or None for a weight that it does not fit.
SCHEDULES: Mapping[str, Callable[..., float]] = {"cubic": cubic_schedule}
GRANULARITIES: Mapping[str, Callable[[Tensor], Tensor | None]] = {
    "weight": single_weights,
    "2:4": two_of_four,
}


def largest_sparsity(granularity: str) -> float:
    """The largest share of weights that a granularity lets go, 0..1."""
    # Tried on a conv's weight of distinct scores: the finite ones may go.
    score = GRANULARITIES[granularity](torch.arange(8.0 * 32 * 9).view(8, 32, 3, 3))
    return 1.0 if score is None else float(score.isfinite().float().mean())


def without_smallest(score: Tensor, count: int) -> Tensor:
    """A mask of the shape of ``score``: 0 for the ``count`` smallest, 1 for the others."""
    keep = torch.ones_like(score).flatten()
    # A full order: ties never change the count.
    keep[score.flatten().argsort(stable=True)[:count]] = 0
    return keep.view_as(score)
