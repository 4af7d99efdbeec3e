"""Calibration images against test images, by their classes and by a network's activations."""

import pytest
import torch

from qat_tricks.graph import trace
from qat_tricks.jobs.calibration import calibration_figures
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.image_data import batches, ready
from tests.helpers.nets import SmallNet


@pytest.fixture(scope="module")
def data():
    return ready("fake", num_classes=4)


def test_classes_are_compared_by_their_share(data):
    net = SmallNet(num_classes=4, in_channels=data.in_channels)
    _, own = batches(data.calibration_loader(256))
    found = calibration_figures(net, data, torch.full((50,), 2))
    assert found["images"] == len(own)
    assert found["class"] == data.class_names[2]
    assert found["class_gap"] == pytest.approx(1 - float((own == 2).double().mean()))
    assert found["shift"] is found["tensor"] is None
    assert calibration_figures(net, data, own)["class_gap"] == 0


def test_the_tensor_whose_mean_lies_farthest_apart_is_named(data, monkeypatch):
    images, labels = batches(data.test_dataloader())
    net = SmallNet(num_classes=4, in_channels=data.in_channels)
    traced = calibrate(quantize(trace(net.eval())), [images])
    found = calibration_figures(traced, data, labels)
    assert 0 <= found["shift"] < 0.1  # drawn alike
    assert found["tensor"]
    brighter = [(images + 3, labels)]
    monkeypatch.setattr(data, "test_sample", lambda num_images: brighter)
    assert calibration_figures(traced, data, labels)["shift"] > 0.3
