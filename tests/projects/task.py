"""A task of somebody else's library, for batches that are mappings; a project cannot edit it."""

import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from tests.helpers.lightning import pl
from tests.projects.journey import batches, convnet

MODELS = {"small": lambda classes: convnet(8), "medium": lambda classes: convnet(12)}


class ClassificationTask(pl.LightningModule):
    """Makes its model by name, its loss, and metrics for each split."""

    def __init__(self, model="small", num_classes=10, loss="ce", lr=2e-3, patience=10):
        super().__init__()
        self.save_hyperparameters()
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()

    def configure_models(self):
        self.model = MODELS[self.hparams["model"]](self.hparams["num_classes"])

    def configure_losses(self):
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

    def configure_metrics(self):
        classes = self.hparams["num_classes"]
        metrics = MetricCollection(
            {
                "Accuracy": MulticlassAccuracy(classes, average="micro"),
                "Jaccard": MulticlassJaccardIndex(classes),
            }
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch["image"], batch["label"]
        y_hat = self(x)
        loss = self.criterion(y_hat, y)
        self.log("train_loss", loss, batch_size=len(x))
        self.train_metrics(y_hat, y)
        self.log_dict(self.train_metrics, batch_size=len(x))
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        y_hat = self(batch["image"])
        self.log("val_loss", self.criterion(y_hat, batch["label"]), batch_size=len(y_hat))
        self.val_metrics(y_hat, batch["label"])
        self.log_dict(self.val_metrics, batch_size=len(y_hat))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        y_hat = self(batch["image"])
        self.test_metrics(y_hat, batch["label"])
        self.log_dict(self.test_metrics, batch_size=len(y_hat))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch["image"]).softmax(dim=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=self.hparams["patience"]
        )
        schedule = {"scheduler": plateau, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class _Samples(torch.utils.data.Dataset):
    def __init__(self, split):
        self.own = batches(split).dataset

    def __getitem__(self, index):
        image, label = self.own[index]
        return {"image": image * 255, "label": label, "place": torch.zeros(2)}

    def __len__(self):
        return len(self.own)


class DictDataModule(pl.LightningDataModule):
    """Scales images on the device, after they have been transferred."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(_Samples("train"), batch_size=64, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(_Samples("val"), batch_size=64)

    def test_dataloader(self):
        return torch.utils.data.DataLoader(_Samples("test"), batch_size=64)

    def predict_dataloader(self):
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": batch["image"] / 255}
