"""Loaded data sets, their batches, and folders of images."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qat_tricks.data import ImageData, build_data
from qat_tricks.data.module import Batches


def ready(name: str, **options) -> ImageData:
    """The data set ``name``, loaded."""
    data = build_data(name, **options)
    data.setup()
    return data


def batches(loader: Batches) -> tuple[Tensor, Tensor]:
    """All images and all labels of a loader."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def make_folders(root: Path, counts: dict[str, int], size=(40, 30)) -> Path:
    """``counts`` images in each class folder, each class of its own grey value (20, 60, 100, …)."""
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", size, (20 + 40 * index,) * 3).save(root / name / f"{image:03}.png")
    return root
