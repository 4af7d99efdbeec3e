"""The LightningModule that ``train.py`` trains; in Python, users bring their own."""

from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from qat_tricks.data import ImageData
from qat_tricks.graph.logits import class_logits
from qat_tricks.models.build import build_model
from qat_tricks.trainer.framework import default_package

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = default_package()


class Classifier(pl.LightningModule):
    """An image classifier trained by SGD with Nesterov momentum under a one-cycle schedule.

    Args:
        model: arguments of ``build_model`` as plain data; a checkpoint rebuilds its network from
            them.
        data: the settings of the data; an evaluation of the checkpoint reads them.
        preprocessing: from ``Preprocessing.described``, for an evaluation too.
        class_names: in the order of the logits, likewise.
        export: the target and the opset of the file that a run deploys, likewise.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        label_smoothing: of the cross entropy, 0 to 1.
    """

    def __init__(
        self,
        model: dict[str, Any],
        data: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        export: dict[str, Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # A checkpoint can so be loaded without the config.
        self.save_hyperparameters()
        self.network = build_model(**model)
        # A plain attribute: ``run_stages`` sets it before each stage.
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits ``[N, classes]``, or one an image, for images ``[N, C, H, W]``."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the cross entropy, with label smoothing."""
        images, labels = batch
        loss = F.cross_entropy(
            class_logits(self(images)),
            labels,
            label_smoothing=self.hparams["label_smoothing"],
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs the cross entropy and the accuracy."""
        images, labels = batch
        logits = class_logits(self(images))
        self.log("val/loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log(
            "val/accuracy",
            (logits.argmax(1) == labels).float().mean(),
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> Any:
        """Makes SGD under a one-cycle schedule, stepped with each batch."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            nesterov=self.hparams["momentum"] > 0,
        )
        # Fewer steps give OneCycleLR a phase of no length.
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        # of 5 steps a fifth is a phase from step 0 to step 0, by whose length OneCycleLR divides
        rise = 0.2 if steps != 5 else 0.4
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, pct_start=rise, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_classifier(config: DictConfig, data: ImageData) -> Classifier:
    """Makes the classifier of a composed config, with fresh weights.

    Args:
        config: composed from ``conf/train.yaml``; its ``model.weights`` are left to the baseline.
        data: loaded; decides the classes and the channels.
    """
    settings: Any = OmegaConf.to_container(config.data, resolve=True)
    return Classifier(
        model={
            "name": config.model.name,
            "factory": config.model.factory,
            "num_classes": data.num_classes,
            "in_channels": data.in_channels,
        },
        data=settings,
        preprocessing=data.preprocessing.described(),
        class_names=list(data.class_names),
        export={"target": config.target, "opset": config.export.opset},
        lr=config.baseline.lr,
        **config.optimizer,
    )
