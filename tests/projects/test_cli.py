"""LightningCLI: the recipe is an entry of the config's callbacks."""

from importlib import import_module

import torch
from torch.nn import functional as F

from tests.helpers.lightning import NAME, pl
from tests.projects.journey import Ran, batches, check_journey, convnet

CONFIG = """
seed_everything: 5
model: {width: 12, lr: 0.002}
data: {batch_size: 64}
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: PACKAGE.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: "{epoch}", save_top_k: -1}
    - {class_path: qat_tricks.Recipe, init_args: {name: int8_qat}}  # adopted
""".replace("PACKAGE", NAME)


class DigitsModel(pl.LightningModule):
    def __init__(self, width: int = 8, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.network = convnet(width)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class DigitsData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()

    def train_dataloader(self):
        return batches("train")

    def val_dataloader(self):
        return batches("val")

    def test_dataloader(self):
        return batches("test")


def main(weights, folder, ckpt_path):
    folder.mkdir()
    config = folder / "in.yaml"
    config.write_text(CONFIG.replace("FOLDER", str(folder)))
    resume = [] if ckpt_path is None else [f"--ckpt_path={ckpt_path}"]
    cli = import_module(f"{NAME}.cli").LightningCLI

    class Started(cli):
        """Begins with trained weights, as other projects do in a subclass as well."""

        def before_fit(self):
            self.model.load_state_dict(weights)

    args = ["fit", f"--config={config}", f"--trainer.default_root_dir={folder}", *resume]
    done = Started(DigitsModel, DigitsData, args=args)
    return Ran(done.trainer, done.model, done.datamodule, folder / "epoch=0.ckpt")


def test_a_project_of_lightnings_command_line(tmp_path, float_weights):
    weights = float_weights(lambda: DigitsModel(width=12))
    check_journey(lambda *where: main(weights, *where), tmp_path, network="network")
