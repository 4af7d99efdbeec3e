"""A loaded data set in batches, without Lightning, so that a device can measure on it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from qat_tricks.data.images import ImageSet, SeededImages, Splits
from qat_tricks.data.preprocessing import MAX_SIDE, Preprocessing
from qat_tricks.data.splits import balanced_subset, check_labels
from qat_tricks.errors import QatTricksError

Batches = DataLoader[tuple[Tensor, Tensor]]

# Of the options that are counts, by name. Larger ones end in a traceback of torch.
_COUNTS = {
    "batch_size": (1, 10**6),
    "num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "split_seed": (0, 2**32 - 1),
    "shift": (0, MAX_SIDE),
    "num_classes": (1, 10**5),
    "train_images": (1, 10**6),
    "val_images": (1, 10**6),
    "test_images": (1, 10**6),
}


def check_counts(options: Mapping[str, Any]) -> list[str]:
    """Returns a message for each whole number of ``options`` that is out of its range."""
    return [
        f"data.{name}={options[name]} is not allowed: give {lowest} to {highest}"
        for name, (lowest, highest) in _COUNTS.items()
        if isinstance(options.get(name), int) and not lowest <= options[name] <= highest
    ]


class ImageData:
    """Batches of images float32 ``[B, C, H, W]`` and labels int64 ``[B]``.

    There are loaders for train, val, test and calibration. The same ``seed`` gives the same batches
    in every run.

    Args:
        load: returns the data set under a preprocessing; the first ``setup`` calls it.
        preprocessing: of the images.
        batch_size: images in a batch.
        num_workers: processes that load; 0 means this one.
        seed: of the order and the augmentation.
        prepare: a download, which only one process does, before ``load``.
        tests_on_val: whether the test images are the validation images, for want of others.

    Raises:
        QatTricksError: the batch size, the number of workers or the seed is out of range.
    """

    def __init__(
        self,
        load: Callable[[Preprocessing], Splits],
        *,
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        prepare: Callable[[], None] | None = None,
        tests_on_val: bool = False,
    ) -> None:
        problems = check_counts(
            {"batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        )
        if problems:
            raise QatTricksError("; ".join(problems))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.preprocessing, self.tests_on_val = preprocessing, tests_on_val
        # Not loaded yet: evaluations ask for options before they read images.
        self._load, self._prepare = load, prepare
        self._splits: Splits | None = None

    def with_preprocessing(self, preprocessing: Preprocessing) -> "ImageData":
        """Returns the same images under another preprocessing, not yet loaded."""
        other = copy.copy(self)  # shares the way to load, and not the loaded images
        other.preprocessing, other._splits = preprocessing, None
        return other

    def prepare_data(self) -> None:
        """Downloads the data, if they were asked for; one process does that."""
        if self._prepare is not None:
            self._prepare()

    def setup(self) -> None:
        """Loads the data once; later calls do nothing."""
        if self._splits is None:
            # Checked before they are kept: a later call must not find damaged data.
            splits = self._load(self.preprocessing)
            for name in ("train", "val", "test"):
                check_labels(
                    getattr(splits, name).labels, len(splits.class_names), f"{name} images"
                )
            self._splits = splits

    @property
    def splits(self) -> Splits:
        """The loaded data set.

        Raises:
            QatTricksError: ``setup`` was not called yet.
        """
        if self._splits is None:
            raise QatTricksError("the data is not loaded yet: call setup() first")
        return self._splits

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the labels."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """The channels that the network sees."""
        return self.preprocessing.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels, as the network sees them."""
        return self.preprocessing.image_size

    def train_dataloader(self, rank: int = 0) -> Batches:
        """Returns train images, augmented and shuffled, beginning at ``seed`` with each call.

        A last, smaller batch is dropped unless it is the only one.

        Args:
            rank: of this process; each augments differently.
        """
        images = SeededImages(self.splits.train, self.seed + rank)
        return self._loader(images, shuffle=True, drop_last=len(images) > self.batch_size)

    def val_dataloader(self) -> Batches:
        """Returns validation images."""
        return self._loader(self.splits.val)

    def test_dataloader(self) -> Batches:
        """Returns test images."""
        return self._loader(self.splits.test)

    def test_sample(self, num_images: int, *, pixels: bool = False) -> Batches:
        """Returns a few test images, balanced by class: a folder's are sorted by it.

        Args:
            num_images: number of images; all of them where the test split holds fewer.
            pixels: whether before normalization, as of ``test_pixels``.
        """
        images = self.splits.pixels if pixels else self.splits.test
        indices = balanced_subset(images.labels, num_images, self.seed)
        return self._loader(Subset(images, indices.tolist()))

    def test_pixels(self) -> Batches:
        """Returns the test images before normalization, uint8 ``[B, C, H, W]``."""
        return self._loader(self.splits.pixels)

    def val_pixels(self) -> Batches:
        """Returns the validation images before normalization, uint8 ``[B, C, H, W]``."""
        return self._loader(self.splits.val_pixels)

    def calibration_loader(self, num_images: int, batch_size: int | None = None) -> Batches:
        """Returns train images without augmentation, balanced by class, always in the same order.

        Args:
            num_images: number of images; all of them where the train split holds fewer.
            batch_size: None means that of the other loaders.

        Raises:
            QatTricksError: that would be no image.
        """
        images = self.splits.calibration
        # Balanced, so that the range of a rare class is seen too.
        indices = balanced_subset(images.labels, num_images, self.seed)
        return self._loader(Subset(images, indices.tolist()), batch_size=batch_size)

    def _loader(
        self,
        images: ImageSet | Subset[tuple[Tensor, Tensor]],
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> Batches:
        return DataLoader(
            images,
            batch_size=batch_size or self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,  # starting them takes long
            pin_memory=torch.cuda.is_available(),
            # of its own: the order depends on nothing that the run drew before
            generator=torch.Generator().manual_seed(self.seed),
        )
