"""Synthetic images that a network can learn, for smoke tests: a pattern a class, and noise."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qat_tricks.data.images import Splits, memory_splits
from qat_tricks.data.module import ImageData
from qat_tricks.data.preprocessing import Preprocessing, pair


def fake(
    *,
    num_classes: int = 4,
    image_size: int = 16,
    channels: int = 3,
    train_images: int = 256,
    val_images: int = 64,
    test_images: int = 64,
    noise: float = 0.2,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Builds images of classes in turn, each the pattern of its class plus Gaussian noise.

    Args:
        num_classes: number of patterns.
        image_size: pixels a side.
        channels: 1 (grey) or 3 (RGB).
        train_images: number of images.
        val_images: number of images.
        test_images: number of images.
        noise: standard deviation, as a fraction of the pixel range.
        batch_size: images in a batch.
        num_workers: processes that load.
        seed: decides the patterns, the noise, the order of the batches and the calibration images.

    Raises:
        QatTricksError: a number is out of range.
    """
    size = pair("image_size", image_size)
    assert size is not None
    preprocessing = Preprocessing(
        image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels
    )
    load = partial(
        _load, (channels, *size), num_classes, (train_images, val_images, test_images), noise, seed
    )
    return ImageData(
        load, preprocessing=preprocessing, batch_size=batch_size, num_workers=num_workers, seed=seed
    )


def _load(
    shape: tuple[int, int, int],
    num_classes: int,
    counts: tuple[int, ...],
    noise: float,
    seed: int,
    preprocessing: Preprocessing,
) -> Splits:
    # One stream for patterns and noise: a seed decides all images.
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    # 4x4 values a class, drawn out to the size of the images
    coarse = torch.rand(num_classes, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=[height, width], mode="bilinear")
    # Classes in turn, so that each split holds all of them.
    labels = [torch.arange(count) % num_classes for count in counts]

    def draw(split: Tensor) -> Tensor:
        clean = patterns[split]
        noisy = clean + noise * torch.randn(clean.shape, generator=generator)
        return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)

    return memory_splits(
        [draw(split) for split in labels],
        labels,
        class_names=[f"class{index}" for index in range(num_classes)],
        preprocessing=preprocessing,
        shift=0,
        flip=False,
    )
