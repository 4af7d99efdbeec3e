"""The data of a run: loaded, and as a Lightning data module."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from qat_tricks.data import build_data
from qat_tricks.data.module import Batches, ImageData
from qat_tricks.trainer.framework import default_package

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = default_package()


def load_data(settings: DictConfig) -> ImageData:
    """Loads the data set of the config group ``data``.

    Raises:
        QatTricksError: its files are missing or damaged.
    """
    options: Any = OmegaConf.to_container(settings, resolve=True)
    data = build_data(**options)
    data.prepare_data()
    data.setup()
    return data


class ImageDataModule(pl.LightningDataModule):
    """Hands the batches of ``images`` to a trainer, each of whose processes augments differently.

    Args:
        images: loaded here if they are not yet.
    """

    def __init__(self, images: ImageData) -> None:
        super().__init__()
        self.images = images

    def prepare_data(self) -> None:
        """Downloads the data, if the settings ask for it."""
        self.images.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Loads the data once, for every ``stage``."""
        self.images.setup()

    def train_dataloader(self) -> Batches:
        """Returns train images, augmented for this process."""
        # Each process draws its own augmentation.
        rank = self.trainer.global_rank if self.trainer is not None else 0
        return self.images.train_dataloader(rank)

    def val_dataloader(self) -> Batches:
        """Returns validation images."""
        return self.images.val_dataloader()

    def test_dataloader(self) -> Batches:
        """Returns test images."""
        return self.images.test_dataloader()

    def calibration_loader(self, num_images: int) -> Batches:
        """Returns training images without augmentation; tricks prefer them to the train loader."""
        return self.images.calibration_loader(num_images)
