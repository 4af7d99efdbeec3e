"""The handwritten digits that scikit-learn ships: 1,797 grey images of 8x8 pixels."""

from functools import partial

import torch

from qat_tricks.data.images import Splits, memory_splits
from qat_tricks.data.module import ImageData
from qat_tricks.data.preprocessing import Preprocessing, pair
from qat_tricks.data.splits import stratified_split

SHARES = (0.6, 0.15, 0.25)  # train, val, test
SPLIT_SEED = 0  # the option seed does not change the split


def digits(
    *,
    image_size: int = 16,
    shift: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Builds the digits: square images, 1 channel, 10 classes.

    Args:
        image_size: pixels a side, to which the stored images are resized.
        shift: train images are moved by up to this many pixels each way.
        batch_size: images in a batch.
        num_workers: processes that load.
        seed: decides the order of the train images, their shifts and the calibration images.

    Raises:
        QatTricksError: a number is out of range.
    """
    size = pair("image_size", image_size)
    assert size is not None
    preprocessing = Preprocessing(
        image_size=size, channels=1, resize=size, mean=(0.3,), std=(0.35,)
    )
    return ImageData(
        partial(_load, shift),
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
    )


def _load(shift: int, preprocessing: Preprocessing) -> Splits:
    from sklearn.datasets import load_digits  # slow to load

    source = load_digits()
    values = torch.from_numpy(source.images).float()  # [1797, 8, 8], 0..16
    images = (values * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target).long()
    parts = stratified_split(labels, SHARES, SPLIT_SEED)
    return memory_splits(
        [images[part] for part in parts],
        [labels[part] for part in parts],
        class_names=[str(name) for name in source.target_names],
        preprocessing=preprocessing,
        shift=shift,
        flip=False,
    )
