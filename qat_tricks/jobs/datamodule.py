"""The Lightning data module around ``ImageData``."""

from typing import TYPE_CHECKING

from qat_tricks.data.module import Batches, ImageData
from qat_tricks.trainer.framework import default_package

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = default_package()


class ImageDataModule(pl.LightningDataModule):
    """Hands the batches of ``images`` to a trainer; each of its processes augments in its own way."""

    def __init__(self, images: ImageData) -> None:
        super().__init__()
        self.images = images

    def prepare_data(self) -> None:
        self.images.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Loads the data once, whatever ``stage`` asks."""
        self.images.setup()

    def train_dataloader(self) -> Batches:
        return self.images.train_dataloader(
            self.trainer.global_rank if self.trainer is not None else 0
        )

    def val_dataloader(self) -> Batches:
        return self.images.val_dataloader()

    def test_dataloader(self) -> Batches:
        return self.images.test_dataloader()

    def calibration_loader(self, num_images: int) -> Batches:
        """Training images without augmentation, which the tricks prefer to the training loader."""
        return self.images.calibration_loader(num_images)
