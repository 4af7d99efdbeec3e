"""A backbone and a head, fine-tuned by milestones, as Lightning's transfer learning shows."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import qat_tricks
from tests.helpers.lightning import pl
from tests.projects.journey import CLASSES, Ran, batches, check_journey, convnet


class MilestonesFinetuning(pl.callbacks.BaseFinetuning):
    def __init__(self, milestones=(1, 2), train_bn=False):
        super().__init__()
        self.milestones, self.train_bn = milestones, train_bn

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.feature_extractor, train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch, optimizer):
        last, first = pl_module.feature_extractor[-4:], pl_module.feature_extractor[:-4]
        for milestone, modules in zip(self.milestones, (last, first), strict=True):
            if epoch == milestone:
                self.unfreeze_and_add_param_group(modules, optimizer, train_bn=self.train_bn)


class TransferLearning(pl.LightningModule):
    def __init__(self, lr=0.01, milestones=(1, 2)):
        super().__init__()
        self.save_hyperparameters()
        self.feature_extractor = nn.Sequential(*list(convnet().children())[:-1])
        self.fc = nn.Sequential(nn.Linear(384, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.loss_func = F.cross_entropy
        self.train_acc, self.valid_acc = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)

    def forward(self, x):
        return self.fc(self.feature_extractor(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_logits = self.forward(x)
        self.log("train_acc", self.train_acc(y_logits, y), prog_bar=True)
        return self.loss_func(y_logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", self.valid_acc(self.forward(x), y), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.hparams.milestones, 0.5)
        return [optimizer], [scheduler]


def main(weights, folder, ckpt_path):
    pl.seed_everything(1, verbose=False)
    model = TransferLearning()
    model.load_state_dict(weights)
    checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    callbacks = [MilestonesFinetuning(), checkpoint]
    callbacks += qat_tricks.recipe("int8_qat")  # adopted
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches("train"), batches("val"), ckpt_path=ckpt_path)
    return Ran(trainer, model, batches("test"), folder / "epoch=0.ckpt")


def test_a_backbone_and_a_head_with_milestones(tmp_path, float_weights):
    weights = float_weights(TransferLearning)
    frozen = []

    def train(folder, ckpt_path):
        ran = main(weights, folder, ckpt_path)
        frozen[:] = [name for name, p in ran.module.named_parameters() if not p.requires_grad]
        return ran

    check_journey(train, tmp_path)
    assert frozen == ["activation_quantizers.x.scale"]  # the images do not change
