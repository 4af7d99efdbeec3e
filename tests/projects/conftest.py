"""A project's module trained in float, as it is when a recipe is taken up."""

import copy

import pytest
import torch

from tests.helpers.lightning import pl
from tests.projects.journey import batches


@pytest.fixture
def float_weights(tmp_path):
    """Trains a new module for a few epochs, and returns its weights."""

    def train(make, data=None, epochs=4):
        torch.set_num_threads(1)
        pl.seed_everything(0, verbose=False)
        module = make()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, *((batches("train"), batches("val")) if data is None else (data,)))
        return copy.deepcopy(module.state_dict())

    return train
