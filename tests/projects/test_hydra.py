"""Everything instantiated from a Hydra config: network, partial optimizer, data, callbacks."""

import hydra
import torch
from omegaconf import OmegaConf
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.lightning import NAME, pl
from tests.projects.journey import CLASSES, Ran, batches, check_journey

CONFIG = """
seed: 12
ckpt_path: null
model:
  _target_: tests.projects.test_hydra.LitModule
  net: {_target_: tests.projects.journey.convnet, width: 12}
  optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.002}
  scheduler: {_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1, gamma: 0.5}
data: {_target_: tests.projects.test_hydra.DigitsDataModule, batch_size: 64}
callbacks:
  model_checkpoint:
    _target_: PACKAGE.callbacks.ModelCheckpoint
    dirpath: ${folder}
    filename: "{epoch}"
    save_top_k: -1
  early_stopping: {_target_: PACKAGE.callbacks.EarlyStopping, monitor: val/acc, mode: max}
  quantize: {_target_: qat_tricks.Recipe, name: int8_qat}  # adopted
trainer:
  _target_: PACKAGE.Trainer
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
""".replace("PACKAGE", NAME)


class LitModule(pl.LightningModule):
    def __init__(self, net, optimizer, scheduler, compile=False):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = torch.nn.CrossEntropyLoss()
        self.train_acc, self.val_acc, self.test_acc = (
            MulticlassAccuracy(CLASSES, average="micro") for _ in range(3)
        )
        self.train_loss, self.val_acc_best = MeanMetric(), MaxMetric()

    def forward(self, x):
        return self.net(x)

    def on_train_start(self):
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch):
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch, batch_idx):
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        _, preds, targets = self.model_step(batch)
        self.val_acc(preds, targets)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self):
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        _, preds, targets = self.model_step(batch)
        self.test_acc(preds, targets)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True)

    def setup(self, stage):
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.save_hyperparameters(logger=False)

    def train_dataloader(self):
        return batches("train")

    def val_dataloader(self):
        return batches("val")

    def test_dataloader(self):
        return batches("test")


def instantiate_callbacks(config):
    return [hydra.utils.instantiate(entry) for entry in config.values() if "_target_" in entry]


def main(weights, folder, ckpt_path):
    cfg = OmegaConf.merge(OmegaConf.create(CONFIG), {"folder": str(folder)})
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = hydra.utils.instantiate(cfg.data)
    model = hydra.utils.instantiate(cfg.model)
    model.load_state_dict(weights)
    callbacks = instantiate_callbacks(cfg.callbacks)
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    trainer.fit(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    return Ran(trainer, model, datamodule, folder / "epoch=0.ckpt")


def test_a_hydra_project(tmp_path, float_weights):
    model = OmegaConf.create(CONFIG.replace("${folder}", "")).model
    weights = float_weights(lambda: hydra.utils.instantiate(model))
    # Partials and the network itself are among the hyperparameters.
    trusted = {"weights_only": False}
    check_journey(lambda *where: main(weights, *where), tmp_path, network="net", **trusted)
