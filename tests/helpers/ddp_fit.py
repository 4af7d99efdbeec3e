"""A fit on one process or several, whose ends can be compared."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import qat_tricks
from tests.helpers.lightning import pl
from tests.helpers.lit import Lit, dataset, trainer

GLOBAL_BATCH = 16


class Counted(Dataset):
    """Counts what is read of it until training starts."""

    def __init__(self, fails=False):
        self.images, self.reads, self.fails = dataset(), 0, fails

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.fails:
            raise OSError("the disk is gone")
        return self.images[index]


class Data(pl.LightningDataModule):
    """The ``train`` batches, and all of ``data`` for calibration."""

    def __init__(self, data, train, shuffle):
        super().__init__()
        self.data, self.train, self.shuffle = data, train, shuffle

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return DataLoader(dataset(32, 4), batch_size=GLOBAL_BATCH)

    def calibration_loader(self, num_images):
        return DataLoader(self.data, batch_size=GLOBAL_BATCH, shuffle=self.shuffle)


class Watched(Lit):
    def __init__(self, data):
        super().__init__()
        self.data = data
        self.backbone.dropout.p = 0.0

    def on_train_start(self):
        self.read_before = self.data.reads
        self.start = {name: tensor.clone() for name, tensor in self.state_dict().items()}


def fit(folder, recipe, devices, steps, *, overrides=(), fails=False, shuffle=False, sync=True):
    """Fits on ``devices`` processes, of which this is one; it leaves its end in ``folder`` and
    returns it.
    """
    torch.set_num_threads(1)
    data = Counted(fails)
    lit = Watched(data).train()
    settings = {
        "strategy": "ddp",
        "devices": devices,
        "sync_batchnorm": sync,
        "use_distributed_sampler": False,
    }
    few = [] if recipe == "int8_ptq" else ["stages.ptq.tricks.calibrate.num_images=48"]
    run = trainer(
        qat_tricks.recipe(recipe, [*few, *overrides]),
        max_steps=steps,
        max_epochs=2,
        **(settings if devices > 1 else {}),
    )
    # Each rank would shuffle in an order of its own, were the images not those of the first.
    torch.manual_seed(run.global_rank)
    # What a step sees of all ranks together is what one process sees.
    sampler = DistributedSampler(data, devices, run.global_rank, shuffle=False)
    batches = DataLoader(data, batch_size=GLOBAL_BATCH // devices, sampler=sampler)
    run.fit(lit, datamodule=Data(data, batches, shuffle))
    end = {
        "state": lit.state_dict(),
        "start": lit.start,
        "read_before": lit.read_before,
        "spec": lit.backbone.meta["qat_tricks"],
    }
    torch.save(end, Path(folder) / f"rank{run.global_rank}of{devices}.pt")
    return end
