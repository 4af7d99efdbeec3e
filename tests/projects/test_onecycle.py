"""A small ResNet, log_softmax in the forward, SGD with OneCycle, as projects for CIFAR-10 are."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional import accuracy

import qat_tricks
from tests.helpers.lightning import pl
from tests.helpers.nets import Block
from tests.projects.journey import CLASSES, Ran, batches, check_journey


def create_model():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        Block(12),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 16, CLASSES),
    )


class LitResnet(pl.LightningModule):
    def __init__(self, lr=0.05, epochs=4):
        super().__init__()
        self.save_hyperparameters()
        self.model = create_model()

    def forward(self, x):
        return F.log_softmax(self.model(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.nll_loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def evaluate(self, batch, stage=None):
        x, y = batch
        logits = self(x)
        acc = accuracy(logits.argmax(1), y, task="multiclass", num_classes=CLASSES)
        if stage:
            self.log(f"{stage}_loss", F.nll_loss(logits, y), prog_bar=True)
            self.log(f"{stage}_acc", acc, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(weights, folder, ckpt_path):
    pl.seed_everything(7, verbose=False)
    model = LitResnet()
    model.load_state_dict(weights)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[
            pl.callbacks.LearningRateMonitor(logging_interval="step"),
            pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
            *qat_tricks.recipe("int8_qat"),  # adopted
        ],
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches("train"), batches("val"), ckpt_path=ckpt_path)
    return Ran(trainer, model, batches("test"), folder / "epoch=0.ckpt")


def test_log_softmax_in_forward_with_onecycle(tmp_path, float_weights):
    weights = float_weights(LitResnet)
    check_journey(lambda *where: main(weights, *where), tmp_path, network="model")
