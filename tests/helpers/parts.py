"""LightningModules that are the network themselves: backbone and head, or layers of their own."""

import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from tests.helpers.lightning import pl
from tests.helpers.nets import Block


class Parts(pl.LightningModule):
    """A backbone and a head, a loss and a metric, and a step that calls ``self(x)``."""

    def __init__(self, call="self", rate=0.02, seed=0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Block(8),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(8, 4)
        self.criterion = nn.CrossEntropyLoss()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)

    def forward(self, x):
        return self.head(self.backbone(x).flatten(1))

    def logits(self, x):
        if self.hparams.call == "parts":
            return self.head(self.backbone(x).flatten(1))
        return self(x) if self.hparams.call == "self" else self.forward(x)

    def training_step(self, batch, _):
        loss = self.criterion(self.logits(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.accuracy(self.logits(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self):
        trained = filter(lambda parameter: parameter.requires_grad, self.parameters())
        return torch.optim.SGD(trained, lr=self.hparams.rate, momentum=0.9, weight_decay=1e-3)


class Layers(pl.LightningModule):
    """Layers on the module itself, called partly as functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.norm(self.conv2(x)))
        return F.log_softmax(self.fc(x.mean((2, 3))), dim=1)

    def training_step(self, batch, _):
        return F.nll_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
