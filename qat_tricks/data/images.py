"""Labelled images as torch data sets: those kept in memory, drawn and augmented a batch at a time,
and those on disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

from qat_tricks.data.preprocessing import Preprocessing
from qat_tricks.errors import QatTricksError, one_line

Transform = Callable[[Any], Tensor]


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose labels are known without reading its images: ``labels`` is int64 ``[N]``."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One batch: images ``[B, C, H, W]``, float32 or uint8; labels int64 ``[B]``."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a loader asks for: the images and labels of one batch, drawn together."""
        return list(zip(*self.batch(indices), strict=True))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([index])
        return images[0], labels[0]


class MemoryImages(ImageSet):
    """Images held in memory as uint8 ``[N, C, H, W]``; ``transform`` takes a uint8 batch and
    returns the one to hand out.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.transform(self.images[chosen]), self.labels[chosen]


class FolderImages(ImageSet):
    """Image files; ``transform`` takes one PIL image and returns a float32 or uint8 ``[C, H, W]``.

    A file that cannot be decoded, or comes out in another shape than those before it, raises
    ``UnreadableImageError`` naming it.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, channels: int, transform: Transform
    ) -> None:
        self.paths, self.labels, self.channels, self.transform = (
            list(paths),
            labels,
            channels,
            transform,
        )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [self.transform(read_image(self.paths[index], self.channels)) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise UnreadableImageError(
                    f"{self.paths[index]} has the shape {tuple(image.shape)} and the others "
                    f"{tuple(images[0].shape)}: give a resize or a crop, or images of one size"
                )
        return torch.stack(images), self.labels[torch.as_tensor(indices)]


class SeededImages(ImageSet):
    """``source`` with its random transforms drawn from a stream of this object's own, begun at
    ``seed``.

    Augmentation is thus the same in every run, and takes nothing from PyTorch's global stream. In a
    worker process the loader's generator has already seeded that process's global stream, which is
    used as it is.
    """

    def __init__(self, source: ImageSet, seed: int) -> None:
        self.source, self.labels = source, source.labels
        self._state = torch.Generator().manual_seed(seed).get_state()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if get_worker_info() is not None:
            return self.source.batch(indices)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            batch = self.source.batch(indices)
            self._state = torch.get_rng_state()
        return batch


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A loaded data set. ``calibration`` holds the images of ``train`` without augmentation, in the
    same order; ``pixels`` those of ``test`` before normalization, uint8.
    """

    train: ImageSet
    calibration: ImageSet
    val: ImageSet
    test: ImageSet
    pixels: ImageSet
    class_names: tuple[str, ...]


class UnreadableImageError(QatTricksError):
    """A file that is no image. Stays one line when a loader's worker process wraps it in a
    traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition("UnreadableImageError: ")[2].strip())


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Decodes ``path`` as RGB (``channels=3``) or grey (1). Raises ``UnreadableImageError`` naming
    the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = one_line(error)
        raise UnreadableImageError(
            f"cannot read the image {path} ({reason}): replace or delete it"
        ) from error


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Pads ``[B, C, H, W]`` with zeros and crops each image at its own random place, up to
    ``pixels`` away each way.
    """
    if pixels == 0:
        return images
    height, width = images.shape[-2:]
    windows = F.pad(images, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * pixels + 1, (2, len(images)))
    return windows[torch.arange(len(images)), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image of ``[B, C, H, W]`` left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The train transform of images in memory: shift, flip, ``normalize``. Uint8 ``[B, C, H, W]``
    to float32.
    """

    shift: int  # pixels, each way
    flip: bool
    normalize: Transform

    def __call__(self, images: Tensor) -> Tensor:
        shifted = random_shift(images, self.shift)
        return self.normalize(random_flip(shifted) if self.flip else shifted)


def _as_they_are(images: Tensor) -> Tensor:
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
    """``Splits`` of uint8 images ``[N, C, H, W]`` and labels ``[N]``, each given for train, val and
    test.

    The geometry of ``preprocessing`` is applied here, once.
    """
    if shift < 0:
        raise QatTricksError(f"shift={shift}: give a number of pixels, 0 or greater")
    geometry, normalize = preprocessing.geometry(), preprocessing.normalize()
    train, val, test = (geometry(split) for split in images)
    return Splits(
        train=MemoryImages(train, labels[0], Augment(shift=shift, flip=flip, normalize=normalize)),
        calibration=MemoryImages(train, labels[0], normalize),
        val=MemoryImages(val, labels[1], normalize),
        test=MemoryImages(test, labels[2], normalize),
        pixels=MemoryImages(test, labels[2], _as_they_are),
        class_names=tuple(class_names),
    )
