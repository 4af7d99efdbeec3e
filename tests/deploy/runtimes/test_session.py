"""Sessions: exact integer products on any processor, and bad files refused in one line."""

import subprocess
import sys

import numpy as np
import pytest
from onnx import helper

import qat_tricks
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_batch
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv, qdq_layer, save
from tests.helpers.nets import images, small_net


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "conv"])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_products_do_not_saturate(tmp_path, per_channel, linear, sign):
    shape = (16, 64) if linear else (16, 64, 3, 3)
    weight = np.full(shape, sign * 127, np.int8)
    path = qdq_layer(tmp_path / "m.onnx", weight, linear=linear, per_channel=per_channel)
    images = np.full((1, 64) if linear else (1, 64, 8, 8), 2.55, np.float32)
    written = run_batch(open_session(path, optimize=False), images)
    np.testing.assert_allclose(run_batch(open_session(path), images), written, rtol=1e-5)


def test_input_spec_tells_the_dynamic_batch_from_the_fixed_image(tmp_path):
    (spec,) = input_specs(open_session(float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))))
    assert (spec.name, spec.shape, spec.dtype) == ("x", (None, 3, 8, 8), np.float32)


def test_threads_reach_the_session(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    assert open_session(path, threads=2).get_session_options().intra_op_num_threads == 2
    with pytest.raises(QatTricksError, match="threads is 0"):
        open_session(path, threads=0)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "folder"])
def test_a_file_that_is_no_network_is_one_line(tmp_path, damage):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    whole = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.touch()
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("this is a poem")
        case "folder":
            path.mkdir()
    with pytest.raises(QatTricksError, match=r"m\.onnx") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tensor", "scale"), [("mean", 1e-9), ("relu", 1e6), ("relu", 1e-15)])
def test_an_average_between_scales_far_apart_is_named_with_the_way_out(tmp_path, tensor, scale):
    network = qat_tricks.quantize(small_net(num_classes=4), [images(16)])
    network.get_submodule(f"activation_quantizers.{tensor}").scale.data.fill_(scale)
    with pytest.raises(QatTricksError, match=r'average "mean": the scales .* lower lear') as caught:
        qat_tricks.export_onnx(network, tmp_path / "m.onnx", images(2))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "run",
    [
        lambda path, values: run_batch(open_session(path), values),
        lambda path, values: open_network(path, threads=1).prepare(values)(),
    ],
    ids=["session", "network"],
)
def test_an_operation_that_fails_is_one_line_wherever_it_runs(tmp_path, run, capfd):
    node = helper.make_node("Reshape", ["x", "sizes"], ["y"], name="node_view")
    path = save(tmp_path / "m.onnx", [node], {"sizes": np.array([7, 7])}, [None, None])
    with pytest.raises(QatTricksError, match=r'cannot run "view" \(input_shape_size') as caught:
        run(path, np.ones((2, 3), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # and ONNX Runtime does not tell it too


def test_measuring_needs_no_torch():
    measuring = ("runtimes.session", "runtimes.registry", "cost.latency", "cost.memory")
    measuring += ("cost.coverage", "cost.weights", "cost.device")
    modules = ", ".join(f"qat_tricks.deploy.{module}" for module in measuring)
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
