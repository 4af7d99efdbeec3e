"""CIFAR-10, decoded once into memory, from torchvision's own files or from folders of images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from qat_tricks.data.folders import existing_root, scan
from qat_tricks.data.images import Splits, memory_splits, read_image
from qat_tricks.data.module import ImageData
from qat_tricks.data.preprocessing import Preprocessing
from qat_tricks.data.splits import stratified_split
from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.progress import track

SIDE = 32  # pixels
SPLIT_SEED = 0  # of train and val; the option seed does not change the split


def cifar10(
    *,
    root: str | None = None,
    download: bool = False,
    val_fraction: float = 0.1,
    shift: int = 4,
    flip: bool = True,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    batch_size: int = 128,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Builds CIFAR-10: images of 32x32 pixels, 3 channels, 10 classes.

    Args:
        root: holds ``cifar-10-batches-py``, or ``train/`` and ``test/`` with class folders.
        download: fetches torchvision's files into ``root`` where they are missing.
        val_fraction: share of the train images that are held out for validation, the same in each
            class.
        shift: train images are moved by up to this many pixels each way.
        flip: half of the train images are mirrored.
        mean: of R, G, B in 0..1.
        std: of R, G, B in 0..1.
        batch_size: images in a batch.
        num_workers: processes that load.
        seed: decides the order of the train images, their augmentation and the calibration images.

    Raises:
        QatTricksError: ``root`` is no folder; later, in ``setup``, it holds neither form.
    """
    folder = existing_root(root, "cifar10", may_be_made=download)
    if folder.name == CIFAR10.base_folder:  # the files' own folder was given
        folder = folder.parent
    preprocessing = Preprocessing(image_size=(SIDE, SIDE), mean=tuple(mean), std=tuple(std))
    return ImageData(
        partial(_load, folder, val_fraction, shift, flip),
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        prepare=partial(_download, folder) if download else None,
    )


def _load(
    folder: Path, val_fraction: float, shift: int, flip: bool, preprocessing: Preprocessing
) -> Splits:
    read = _read_batches if (folder / CIFAR10.base_folder).is_dir() else _read_folders
    # Labels are indices into the class names, so both parts must have the same.
    class_names, train, train_labels = read(folder, "train")
    test_names, test, test_labels = read(folder, "test")
    if test_names != class_names:
        raise QatTricksError(
            f"{folder}: train and test have different classes: {class_names} and {test_names}"
        )
    # CIFAR-10 has no validation images of its own.
    fractions = (1 - val_fraction, val_fraction)
    train_part, val_part = stratified_split(train_labels, fractions, SPLIT_SEED)
    return memory_splits(
        [train[train_part], train[val_part], test],
        [train_labels[train_part], train_labels[val_part], test_labels],
        class_names=class_names,
        preprocessing=preprocessing,
        shift=shift,
        flip=flip,
    )


def _download(folder: Path) -> None:
    try:
        CIFAR10(folder, download=True)
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        raise QatTricksError(
            f"cannot download CIFAR-10 into {folder} ({reason}): check the network, or put its "
            "files there"
        ) from error


def _read_batches(folder: Path, split: str) -> tuple[list[str], Tensor, Tensor]:
    """Reads torchvision's files.

    Returns:
        The class names, images uint8 ``[N, 3, 32, 32]``, and labels ``[N]``.
    """
    try:
        source = CIFAR10(folder, train=split == "train")
    except (OSError, RuntimeError) as error:
        raise QatTricksError(
            f"{folder / CIFAR10.base_folder} is incomplete or damaged: delete it and set "
            "data.download=true"
        ) from error
    # torchvision keeps channels last.
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return list(source.classes), images, torch.tensor(source.targets)


def _read_folders(folder: Path, split: str) -> tuple[list[str], Tensor, Tensor]:
    """Returns the same as ``_read_batches``, of class folders with images of 32x32 pixels."""
    if not (folder / split).is_dir():
        raise QatTricksError(
            f"{folder} holds neither {CIFAR10.base_folder}/ nor train/ and test/ with class "
            "folders: point data.root at a folder that does, or set data.download=true"
        )
    class_names, paths, labels = scan(folder / split)
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        decoded = pool.map(_decode, paths)
        for index in track(range(len(paths)), f"decode cifar10 {split}"):
            images[index] = next(decoded)
    return class_names, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _decode(path: str) -> np.ndarray:
    image = read_image(path, channels=3)
    if image.size != (SIDE, SIDE):
        raise QatTricksError(
            f"{path} is {image.width}x{image.height} pixels, CIFAR-10 has {SIDE}x{SIDE}"
        )
    return np.asarray(image)
