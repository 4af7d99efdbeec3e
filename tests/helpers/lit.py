"""LightningModules as users write them: they have never heard of us."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.lightning import pl
from tests.helpers.nets import images, small_net


def dataset(count=64, seed=3):
    """Random images whose class is the quadrant that was made brighter."""
    x = images(count, seed=seed)
    y = torch.arange(count) % 4
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 2
    return TensorDataset(x, y)


def loader(count=64, seed=3, shuffle=False):
    return DataLoader(dataset(count, seed), batch_size=16, shuffle=shuffle)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(64, shuffle=True)

    def val_dataloader(self):
        return loader(32, seed=4)

    test_dataloader = val_dataloader


class OrderedData(Data):
    """Training images in one order, so that their batches are the same each time."""

    def train_dataloader(self):
        return loader(64)


class Lit(pl.LightningModule):
    """A classifier with its network under a name of its own, and preprocessing in ``forward``."""

    def __init__(self, optimizer="sgd", gain=0.5, seed=0):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = small_net(seed, num_classes=4)

    def forward(self, x):
        return self.backbone(x * self.hparams.gain)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        if self.hparams.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rated(Lit):
    """A module with a learning rate that a stage can set."""

    def __init__(self, optimizer="sgd", scale=1.0):
        super().__init__(optimizer)
        self.lr = 0.5
        with torch.no_grad():
            self.backbone.head.weight.mul_(scale)

    def configure_optimizers(self):
        kind = torch.optim.SGD if self.hparams.optimizer == "sgd" else torch.optim.AdamW
        optimizer = kind(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def trainer(callbacks=(), **settings):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        **quiet,
        **settings,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


class ResumableLoader(DataLoader):
    """Batches in an order of its own for each epoch; Lightning saves and restores how far it has
    come.
    """

    def __init__(self, count=64, seed=3):
        super().__init__(dataset(count, seed), batch_size=16)
        self.epoch, self.given, self.resumed = -1, 0, False

    def __iter__(self):
        torch.randint(9, ())  # as torch's own loaders draw the seed of their workers
        return self._batches()

    def _batches(self):
        if not self.resumed or self.given == len(self):
            self.epoch, self.given = self.epoch + 1, 0
        self.resumed = False
        order = torch.randperm(
            len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)
        )
        for indices in order.split(self.batch_size)[self.given :]:
            self.given += 1
            yield [
                torch.stack(column)
                for column in zip(*(self.dataset[i] for i in indices), strict=True)
            ]

    def state_dict(self):
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state):
        self.epoch, self.given, self.resumed = state["epoch"], state["given"], True


def differences(a, b, where=""):
    """Where two nested states differ, in any tensor or number, to the last bit."""
    if isinstance(a, torch.Tensor):
        return (
            []
            if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
            else [where]
        )
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: lengths"]
        return [
            found
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differences(x, y, f"{where}[{i}]")
        ]
    return [] if a == b else [where]
