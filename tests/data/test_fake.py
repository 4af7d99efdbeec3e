"""Made-up images that a network can learn."""

import pytest
import torch

from qat_tricks.data import build_data
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.datamodule import ImageDataModule
from tests.helpers.lightning import pl


def test_all_counts_out_of_range_are_named():
    counts = {"train_images": 0, "num_classes": 10**9, "batch_size": 0, "seed": 2**64}
    with pytest.raises(QatTricksError) as caught:
        build_data("fake", **counts)
    for name, value in counts.items():
        assert f"data.{name}={value} is not allowed: give " in str(caught.value)


def test_fake_images_can_be_learned_in_a_real_trainer():
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def test_step(self, batch, index):
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    data, lit = ImageDataModule(build_data("fake")), Lit()
    trainer.fit(lit, data)
    assert trainer.test(lit, data, verbose=False)[0]["accuracy"] > 0.9
