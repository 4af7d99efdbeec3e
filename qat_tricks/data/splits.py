"""Seeded choices of images by their labels: stratified splits and class-balanced subsets."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qat_tricks.errors import QatTricksError


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Splits images into parts that hold each class in the same proportions.

    Args:
        labels: int64 ``[N]``.
        fractions: share of each part, above 0, with a sum of 1.
        seed: with the other arguments, decides the result.

    Returns:
        A sorted int64 index tensor for each part; together they hold every image once.

    Raises:
        QatTricksError: the fractions are not as above, or leave a part without an image.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        shares = [round(float(fraction), 6) for fraction in fractions]
        raise QatTricksError(
            f"the shares of the splits are {shares}: each must be in (0, 1), and their sum 1"
        )
    order, rank = _shuffled_ranks(labels, seed)
    class_size = torch.bincount(labels)[labels[order]]  # [N]: of each image's class
    bounds = torch.tensor(fractions, dtype=torch.float64).cumsum(0)[:-1]
    # [parts - 1, N]: the rank within its class at which the next part begins
    limits = (bounds[:, None] * class_size).round()
    part = (rank >= limits).sum(0)
    parts = [order[part == index].sort().values for index in range(len(fractions))]
    if any(len(indices) == 0 for indices in parts):
        raise QatTricksError(
            f"{len(labels)} images are too few for splits of "
            f"{[round(float(f), 3) for f in fractions]}: they would hold "
            f"{[len(indices) for indices in parts]}; give more images, or larger shares"
        )
    return parts


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Chooses random images, taking the classes in turn, so that none is over-represented.

    Args:
        labels: int64 ``[N]``.
        count: number of images.
        seed: of the choice.

    Returns:
        int64 indices ``[min(count, N)]``; a smaller choice is the beginning of a larger one.

    Raises:
        QatTricksError: the choice would be empty.
    """
    if count < 1 or len(labels) == 0:
        raise QatTricksError(
            f"{count} of {len(labels)} images chosen, which is none: choose at least one"
        )
    order, rank = _shuffled_ranks(labels, seed)
    # all first images of the classes, then all second ones, and so on
    return order[rank.sort(stable=True).indices][:count]


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Checks that there are labels, and that all of them lie in 0..num_classes-1.

    Args:
        labels: int64 ``[N]``.
        num_classes: number of classes.
        where: the name of the split or the data in the error.

    Raises:
        QatTricksError: they do not.
    """
    if len(labels) == 0:
        raise QatTricksError(f"{where}: no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise QatTricksError(
            f"{where}: labels run from {low} to {high}, {num_classes} classes allow 0 to "
            f"{num_classes - 1}"
        )


def _shuffled_ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Returns a seeded permutation of the images and their ranks in it, both ``[N]``.

    The rank of an image is the number of images of its class before it.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order].numpy()
    by_class = np.argsort(shuffled, kind="stable")  # places in the permutation, class by class
    starts = np.concatenate([[0], np.bincount(shuffled).cumsum()])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts[shuffled[by_class]]
    return order, torch.from_numpy(rank)
