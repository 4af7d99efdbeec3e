"""Labelled images as torch data sets: in memory, augmented a batch at a time, or on disk."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

from qat_tricks.data.preprocessing import Preprocessing
from qat_tricks.errors import QatTricksError, one_line

Transform = Callable[[Any], Tensor]

_BITS_PER_SAMPLE = 258  # the tag of a TIFF


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose labels are known without reading its images."""

    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns a batch: images ``[B, C, H, W]``, float32 or uint8, and labels int64 ``[B]``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the images, as they are stored, and of their labels."""
        digest = hashlib.sha256(self.labels.contiguous().numpy().tobytes())
        self._add_images(digest.update)
        return digest.hexdigest()

    def _add_images(self, add: Callable[[bytes], None]) -> None:
        """Adds what tells the images from others to a hash."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Returns the images and labels of one batch, drawn together; torch's loader calls this."""
        return list(zip(*self.batch(indices), strict=True))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([index])
        return images[0], labels[0]


class MemoryImages(ImageSet):
    """Images in memory.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        transform: from a uint8 batch to the one that a loader gets.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the transformed images at ``indices``, and their labels."""
        rows = torch.as_tensor(indices)
        return self.transform(self.images[rows]), self.labels[rows]

    def _add_images(self, add: Callable[[bytes], None]) -> None:
        for image in self.images:
            add(image.contiguous().numpy().tobytes())


class FolderImages(ImageSet):
    """Images in files, decoded with each batch.

    Args:
        paths: of the files.
        labels: int64 ``[N]``.
        channels: 1 (grey) or 3 (RGB).
        transform: from a PIL image to float32 or uint8 ``[C, H, W]``.

    Raises:
        UnreadableImageError: when a batch is drawn, a file cannot be decoded, or its shape is not
            that of the others.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, channels: int, transform: Transform
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.channels = channels
        self.transform = transform

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reads and transforms the images at ``indices``."""
        images = [self.transform(read_image(self.paths[index], self.channels)) for index in indices]
        for index, image in zip(indices, images, strict=True):
            # Stacking would name neither the file nor the remedy.
            if image.shape != images[0].shape:
                raise UnreadableImageError(
                    f"{self.paths[index]} has the shape {tuple(image.shape)} and the others "
                    f"{tuple(images[0].shape)}: give a resize or a crop, or images of one size"
                )
        return torch.stack(images), self.labels[torch.as_tensor(indices)]

    def _add_images(self, add: Callable[[bytes], None]) -> None:
        # To read all of them would take as long as an epoch.
        for path in self.paths:
            file = os.stat(path)
            add(f"{path} {file.st_size} {file.st_mtime_ns}\n".encode())


class SeededImages(ImageSet):
    """A data set whose random transforms draw from a stream of their own.

    Augmentation is thus the same in every run, and takes nothing from PyTorch's global stream.

    Args:
        source: the data set.
        seed: where the stream begins.
    """

    def __init__(self, source: ImageSet, seed: int) -> None:
        self.source, self.labels = source, source.labels
        self._state = torch.Generator().manual_seed(seed).get_state()

    def _add_images(self, add: Callable[[bytes], None]) -> None:
        self.source._add_images(add)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns a batch of the source, drawn from its own random stream."""
        if get_worker_info() is not None:  # a worker's global stream is seeded by its loader
            return self.source.batch(indices)
        # Transforms draw from the global stream, so it is lent to them and put back.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            batch = self.source.batch(indices)
            self._state = torch.get_rng_state()
        return batch


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A loaded data set."""

    train: ImageSet
    calibration: ImageSet  # the images of train without augmentation, in the same order
    val: ImageSet
    test: ImageSet
    pixels: ImageSet  # the images of test before normalization, uint8
    val_pixels: ImageSet  # the images of val before normalization, uint8
    class_names: tuple[str, ...]


class UnreadableImageError(QatTricksError):
    """A file is no image, or not one of 8 or 16 bits.

    The text stays one line when a loader's worker process puts a traceback before it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition("UnreadableImageError: ")[2].strip())


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Decodes an image file as RGB (``channels=3``) or grey (1), 8 bits a channel.

    Grey values of 16 bits are scaled to 8.

    Raises:
        UnreadableImageError: it cannot be decoded, or its grey values have no known range.
    """
    try:
        with Image.open(path) as image:
            return _eight_bits(image, path).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = one_line(error)
        raise UnreadableImageError(
            f"cannot read the image {path} ({reason}): replace or delete it"
        ) from error


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Returns the image with its grey values as bytes, where they are wider."""
    # Pillow's own conversion of these modes clips the values at 255.
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        reason = "its grey values are floats, whose range is not known"
    elif getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,):
        reason = "its grey values have 12 bits"  # Pillow opens it as one of 16 bits
    # Of PNG and PGM Pillow opens 16 bits so; a TIFF has 32, of which nobody knows the range.
    elif image.mode == "I" and image.format == "TIFF":
        if values.min() >= 0 and values.max() <= 255:
            return Image.fromarray(values.astype(np.uint8))
        reason = f"its grey values are integers of 32 bits, {values.min()} to {values.max()}"
    else:
        # 257 is 65535 / 255, and half of it rounds to the nearest.
        return Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
    raise UnreadableImageError(
        f"cannot read the image {path} ({reason}): save it with 8 or 16 bits a channel"
    )


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Moves each image of ``[B, C, H, W]`` by up to ``pixels`` each way; zeros fill the border."""
    if pixels == 0:
        return images
    height, width = images.shape[-2:]
    # all windows of the padded images as a view, of which each image gets one
    windows = F.pad(images, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * pixels + 1, (2, len(images)))
    return windows[torch.arange(len(images)), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image of ``[B, C, H, W]`` left to right with probability one half."""
    # One draw for each image, broadcast over its pixels.
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The train transform of images in memory, uint8 ``[B, C, H, W]`` to float32.

    It shifts, flips, then normalizes. A class, because worker processes pickle it.
    """

    shift: int  # pixels, each way
    flip: bool  # mirror half of the images
    normalize: Transform

    def __call__(self, images: Tensor) -> Tensor:
        shifted = random_shift(images, self.shift)
        return self.normalize(random_flip(shifted) if self.flip else shifted)


def _unchanged(images: Tensor) -> Tensor:
    return images


def memory_splits(
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    shift: int,
    flip: bool,
) -> Splits:
    """Builds ``Splits`` of images in memory.

    Args:
        images: uint8 ``[N, C, H, W]``, of train, val and test.
        labels: int64 ``[N]``, of train, val and test.
        class_names: in the order of the labels.
        preprocessing: its geometry is applied here, once.
        shift: train images are moved by up to this many pixels each way.
        flip: half of the train images are mirrored.

    Raises:
        QatTricksError: ``shift`` is negative.
    """
    if shift < 0:
        raise QatTricksError(f"shift={shift}: give a number of pixels, 0 or greater")
    geometry, normalize = preprocessing.geometry(), preprocessing.normalize()
    # Resizing is the slow part, and the same in every epoch.
    train, val, test = (geometry(split) for split in images)
    return Splits(
        train=MemoryImages(train, labels[0], Augment(shift=shift, flip=flip, normalize=normalize)),
        calibration=MemoryImages(train, labels[0], normalize),
        val=MemoryImages(val, labels[1], normalize),
        test=MemoryImages(test, labels[2], normalize),
        pixels=MemoryImages(test, labels[2], _unchanged),
        val_pixels=MemoryImages(val, labels[1], _unchanged),
        class_names=tuple(class_names),
    )
