"""OpenVINO runs the same file: nearly the same logits, in integers, and bad input refused in one
line.
"""

import numpy as np
import pytest

from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.parity.logits import compare_logits
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.scheme import ACTIVATIONS
from tests.helpers.handmade import float_conv, qdq_layer
from tests.helpers.networks import Residual, images, quantized

pytest.importorskip("openvino")


def opened(path, runtime="openvino"):
    return open_network(path, threads=1, runtime=runtime)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_residual_network_runs_in_integers_and_agrees_with_onnx_runtime(activations, tmp_path):
    export_onnx(quantized(Residual, activations=activations), tmp_path / "m.onnx", images()[:2])
    network, x = opened(tmp_path / "m.onnx"), images().numpy()
    assert network.integer_layers == 1
    assert (network.spec.name, network.spec.shape, network.spec.dtype) == (
        "images",
        (None, 3, 32, 32),
        np.float32,
    )
    found = compare_logits(
        [(opened(tmp_path / "m.onnx", "onnxruntime").prepare(x)(), network.prepare(x)())]
    )
    assert found["top1_agreement"] == 1
    assert found["sqnr_db"] > 30


def test_what_is_float_stays_float32(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.random.default_rng(0).standard_normal((4, 3, 3, 3)))
    network, x = (
        opened(path),
        np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32),
    )
    assert network.integer_layers == 0
    np.testing.assert_allclose(
        network.prepare(x)(), opened(path, "onnxruntime").prepare(x)(), atol=1e-4
    )


def test_a_result_outlives_the_next_run(tmp_path):
    network = opened(float_conv(tmp_path / "m.onnx", np.ones((1, 1, 1, 1))))
    first = network.prepare(np.ones((1, 1, 8, 8), np.float32))()
    network.prepare(np.zeros((1, 1, 8, 8), np.float32))()
    assert (first == 1).all()


def test_bad_files_and_images_are_one_line(tmp_path):
    path = qdq_layer(tmp_path / "m.onnx", np.ones((4, 3, 3, 3), np.int8))
    with pytest.raises(QatTricksError, match="images of shape"):
        opened(path).prepare(np.ones((1, 1, 8, 8)))
    path.write_bytes(path.read_bytes()[:100])
    for damaged in (path, tmp_path / "none.onnx"):
        with pytest.raises(QatTricksError, match=damaged.name) as caught:
            opened(damaged)
        assert "\n" not in str(caught.value)
