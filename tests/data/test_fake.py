"""Made-up images that a network can learn."""

import torch

from qat_tricks.data import build_data
from qat_tricks.jobs.datamodule import ImageDataModule
from tests.helpers.lightning import pl


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
