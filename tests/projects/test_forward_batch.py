"""A module whose forward takes the whole batch, and yields the logits and the loss."""

import torch
from torch import nn

import qat_tricks
from tests.helpers.lightning import pl
from tests.projects.journey import Ran, batches, check_journey, convnet


class BatchClassifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = convnet()
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, batch):
        images, labels = batch
        logits = self.encoder(images)
        return {"logits": logits, "loss": self.loss_fn(logits, labels)}

    def shared_step(self, batch, stage):
        output = self(batch)
        right = (output["logits"].argmax(1) == batch[1]).float().mean()
        self.log_dict({f"{stage}/acc": right})
        return output["loss"]

    def training_step(self, batch, batch_idx):
        return self.shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self.shared_step(batch, "val")

    def test_step(self, batch, batch_idx):
        return self.shared_step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(weights, folder, ckpt_path):
    pl.seed_everything(3, verbose=False)
    model = BatchClassifier()
    model.load_state_dict(weights)
    checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[checkpoint, qat_tricks.Recipe("int8_qat")],  # adopted
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches("train"), batches("val"), ckpt_path=ckpt_path)
    return Ran(trainer, model, batches("test"), folder / "epoch=0.ckpt")


def test_a_forward_that_takes_the_batch(tmp_path, float_weights):
    weights = float_weights(BatchClassifier)
    check_journey(lambda *where: main(weights, *where), tmp_path, network="encoder")
