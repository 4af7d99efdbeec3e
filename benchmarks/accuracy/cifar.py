"""CIFAR-10 as uint8 tensors, from a file of tensors or from the folders of JPEG images."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def load_cifar10(path: Path) -> dict[str, Tensor]:
    """Returns ``train_x``, ``test_x`` uint8 ``[N, 3, 32, 32]`` and ``train_y``, ``test_y``.

    Args:
        path: a file that ``torch.load`` reads as such a dictionary, or a folder with ``train`` and
            ``test``, each with one folder of JPEG images a class; the sorted names of the folders
            are the classes.

    Raises:
        FileNotFoundError: neither is there.
    """
    if path.is_file():
        tensors = torch.load(path, weights_only=True)
        return {name: tensors[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    tensors = {}
    for part in ("train", "test"):
        images, labels = zip(*_images(path / part), strict=True)
        tensors[f"{part}_x"] = torch.stack(images)
        tensors[f"{part}_y"] = torch.tensor(labels)
    return tensors


def _images(folder: Path) -> Iterator[tuple[Tensor, int]]:
    import numpy as np  # these two only where the images are files
    from PIL import Image

    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for number, class_folder in enumerate(classes):
        for file in sorted(class_folder.glob("*.jpg")):
            with Image.open(file) as image:
                values = np.array(image.convert("RGB"))
            yield torch.from_numpy(values).permute(2, 0, 1), number
