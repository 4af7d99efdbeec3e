"""The data of a run, as a trainer takes them."""

from types import SimpleNamespace

import pytest
import torch

from qat_tricks.data import build_data
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.datamodule import ImageDataModule, load_data
from tests.helpers.configs import job_config

# images that are augmented, so that processes can differ
FEW = ["data=digits", "data.batch_size=16"]


def of_rank(rank):
    module = ImageDataModule(load_data(job_config(*FEW).data))
    module.trainer = SimpleNamespace(global_rank=rank)
    return module


def first(loader):
    return next(iter(loader))


def test_settings_of_the_config_reach_the_data_which_are_loaded():
    data = load_data(job_config("data=fake", "data.num_classes=3", "data.batch_size=5").data)
    images, labels = first(data.test_dataloader())
    assert (len(images), data.num_classes) == (5, 3)
    assert set(labels.tolist()) <= {0, 1, 2}


def test_the_module_loads_what_is_not_loaded_yet():
    data = build_data("fake")
    module = ImageDataModule(data)
    with pytest.raises(QatTricksError, match="not loaded yet"):
        module.val_dataloader()
    module.prepare_data()
    module.setup("test")
    for own, of_data in (
        (module.val_dataloader(), data.val_dataloader()),
        (module.test_dataloader(), data.test_dataloader()),
        (module.calibration_loader(40), data.calibration_loader(40)),
        (module.train_dataloader(), data.train_dataloader(0)),  # without a trainer, as the first
    ):
        assert torch.equal(first(own)[0], first(of_data)[0])


def test_each_process_augments_the_same_images_in_its_own_way():
    batches = [first(of_rank(rank).train_dataloader()) for rank in (0, 1, 1)]
    assert torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[1][0], batches[2][0])
