"""A file in one runtime against the same file in another."""

import numpy as np
import pytest
import torch

from qat_tricks.deploy.parity.runtimes import PARITY_BATCHES, check_parity, parity, predictor
from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB
from tests.helpers.handmade import float_conv


@pytest.fixture
def predict(tmp_path):
    """The sums of three channels in turn, as logits of a batch ``[N, 3, 8, 8]``."""
    weight = np.eye(3).reshape(3, 3, 1, 1) * [[[[1.0]]], [[[2.0]]], [[[4.0]]]]
    path = float_conv(tmp_path / "m.onnx", weight)
    run = predictor(path, 1, "onnxruntime")
    return lambda images: run(images).mean((2, 3))


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.rand(4, 3, 8, 8, generator=generator), torch.zeros(4)


def test_tensors_go_through_the_file_and_come_back(predict):
    images = torch.rand(2, 3, 8, 8)
    expected = images.mean((2, 3)) * torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(predict(images), expected)


def test_only_the_first_batches_are_compared(predict):
    loader = batches(PARITY_BATCHES + 3)
    compared = parity(predict, predict, loader, against="itself")
    assert (compared["top1_agreement"], compared["sqnr_db"]) == (1.0, LARGEST_SQNR_DB)
    assert (compared["images"], compared["against"]) == (4 * PARITY_BATCHES, "itself")
    assert len(list(loader)) == 3


def test_the_reference_is_the_signal_and_the_other_is_judged(predict):
    compared = parity(lambda images: 3 * predict(images), predict, batches(2), against="it")
    assert compared["sqnr_db"] == pytest.approx(-6.0206, abs=1e-3)  # an error of twice the signal


def test_a_runtime_that_gives_other_classes_is_refused_by_name(predict):
    compared = parity(lambda images: -predict(images), predict, batches(2), against="onnxruntime")
    with pytest.raises(QatTricksError, match="openvino does not run the file as ONNX Runtime does"):
        check_parity("openvino", compared, 0.99)
    check_parity("openvino", parity(predict, predict, batches(2), against="onnxruntime"), 1.0)
