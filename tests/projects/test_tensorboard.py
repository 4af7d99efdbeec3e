"""Layers on the module itself, as in first tutorials, with TensorBoard and its graph."""

import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from tests.helpers.lightning import pl
from tests.projects.journey import CLASSES, Ran, batches, check_journey


class LitDigits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.fc1 = nn.Linear(24 * 4, 48)
        self.fc2 = nn.Linear(48, CLASSES)
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.dropout(F.relu(self.fc1(torch.flatten(x, 1))))
        return self.fc2(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean())

    def on_train_epoch_end(self):
        for name, parameter in self.named_parameters():
            self.logger.experiment.add_histogram(name, parameter, self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def main(weights, folder, ckpt_path):
    pl.seed_everything(1, verbose=False)
    model = LitDigits()
    model.load_state_dict(weights)
    logger = pl.loggers.TensorBoardLogger(folder, log_graph=True)
    callbacks = [
        pl.callbacks.LearningRateMonitor(),
        pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
    ]
    callbacks += qat_tricks.recipe("int8_qat")  # adopted
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=4,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.fit(model, batches("train"), batches("val"), ckpt_path=ckpt_path)
    return Ran(trainer, model, batches("test"), folder / "epoch=0.ckpt")


def test_layers_on_the_module_with_tensorboard_and_its_graph(tmp_path, float_weights, monkeypatch):
    with monkeypatch.context() as context:
        context.delattr(LitDigits, "on_train_epoch_end")
        weights = float_weights(LitDigits, epochs=8)
    check_journey(lambda *where: main(weights, *where), tmp_path)
    events = next((tmp_path / "whole").glob("**/events*")).read_bytes()
    assert b"activation_quantizers" in events
    assert b"conv2" in events
