"""Peak memory: of the network's own process, whatever this one holds."""

import numpy as np
import pytest

from qat_tricks.deploy.cost.memory import peak_memory_mib
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv, qdq_layer


def test_larger_batches_need_more_and_the_caller_counts_for_nothing(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((64, 64, 3, 3)))
    small = peak_memory_mib(path, image_shape=(64, 8, 8), batch_size=1, threads=1)
    ballast = np.ones(60 * 2**20)  # 480 MiB, which ru_maxrss would report
    beside = peak_memory_mib(path, image_shape=(64, 8, 8), batch_size=1, threads=1)
    del ballast
    large = peak_memory_mib(path, image_shape=(64, 8, 8), batch_size=2000, threads=1)
    images_mib = 2000 * 64 * 8 * 8 * 4 / 2**20
    assert 15 < small < 400
    assert abs(beside - small) < 30
    assert large - small > 1.5 * images_mib  # input and output


def test_a_quantized_network_is_measured(tmp_path):
    path = qdq_layer(tmp_path / "m.onnx", np.ones((8, 4, 3, 3), np.int8))
    assert peak_memory_mib(path, image_shape=(4, 8, 8), threads=1) > 15


def test_images_that_do_not_fit_are_refused(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    with pytest.raises(QatTricksError, match="images of shape"):
        peak_memory_mib(path, image_shape=(1, 8, 8), threads=1)
