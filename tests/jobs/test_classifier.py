"""The LightningModule of ``train.py``: its schedule, and what a checkpoint needs of it."""

from types import SimpleNamespace

import pytest
import torch

from qat_tricks.jobs.classifier import Classifier, make_classifier
from qat_tricks.jobs.datamodule import load_data
from tests.helpers.configs import job_config

MODEL = {"name": "custom", "factory": "tests.helpers.nets.SmallNet", "num_classes": 4}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 50])
def test_the_rate_rises_to_its_peak_and_falls_to_nearly_zero(steps, monkeypatch):
    module = Classifier(MODEL, lr=0.1)
    monkeypatch.setattr(
        Classifier, "trainer", SimpleNamespace(estimated_stepping_batches=steps), raising=False
    )
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) <= 0.1
    if steps > 3:
        assert max(rates) > 0.09
        assert rates[-1] < 1e-3
    assert configured["lr_scheduler"]["interval"] == "step"


def test_a_checkpoint_can_rebuild_the_network_and_find_its_data():
    config = job_config("data=fake", "data.num_classes=3", "model=resnet20", "baseline.lr=0.3")
    data = load_data(config.data)
    module = make_classifier(config, data)
    again = Classifier(**module.hparams)
    assert again.network.state_dict().keys() == module.network.state_dict().keys()
    assert module(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert module.hparams["data"]["num_classes"] == 3
    assert module.hparams["preprocessing"] == data.preprocessing.described()
    assert module.lr == 0.3
    assert module.hparams["momentum"] == config.optimizer.momentum
