"""A task class of another library, batches that are mappings, and metrics in collections."""

import torch

import qat_tricks
from tests.helpers.lightning import pl
from tests.projects.journey import Ran, check_journey
from tests.projects.task import ClassificationTask, DictDataModule


def main(weights, folder, ckpt_path):
    pl.seed_everything(4, verbose=False)
    task, datamodule = ClassificationTask(model="medium"), DictDataModule()
    task.load_state_dict(weights)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[
            pl.callbacks.EarlyStopping("val_loss", patience=5),
            pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
            qat_tricks.Recipe("int8_qat"),  # adopted
        ],
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=datamodule, ckpt_path=ckpt_path)
    return Ran(trainer, task, datamodule, folder / "epoch=0.ckpt")


def test_a_task_class_with_batches_that_are_mappings(tmp_path, float_weights):
    weights = float_weights(lambda: ClassificationTask(model="medium"), DictDataModule())
    ran = check_journey(lambda *where: main(weights, *where), tmp_path, network="model")
    predicted = torch.cat(ran.trainer.predict(ran.module, ran.data))
    assert predicted.shape == (256, 10)
