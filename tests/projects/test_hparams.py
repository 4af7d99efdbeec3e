"""Hyperparameters as one argument, a namespace, as older projects have them."""

from argparse import Namespace

import torch
from torch.nn import functional as F

import qat_tricks
from tests.helpers.lightning import pl
from tests.projects.journey import Ran, batches, check_journey, convnet


class Classifier(pl.LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = convnet(self.hparams.width)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("acc", (self(x).argmax(1) == y).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        return batches("train")

    def val_dataloader(self):
        return batches("val")

    def test_dataloader(self):
        return batches("test")


HPARAMS = Namespace(width=12, lr=2e-3, gpus=0)


def main(weights, folder, ckpt_path):
    pl.seed_everything(2, verbose=False)
    model = Classifier(HPARAMS)
    model.load_state_dict(weights)
    checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[checkpoint, *qat_tricks.recipe("int8_prune50")],  # adopted
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return Ran(trainer, model, batches("test"), folder / "epoch=0.ckpt")


def test_hyperparameters_as_one_argument(tmp_path, float_weights):
    weights = float_weights(lambda: Classifier(HPARAMS))
    check_journey(lambda *where: main(weights, *where), tmp_path, network="net")
