"""Sessions: exact integer products on any processor, and bad files refused in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

import qat_tricks
from qat_tricks.deploy.runtimes import session
from qat_tricks.deploy.runtimes.processor import products_saturate
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_batch
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv, qdq_layer, save
from tests.helpers.nets import images, small_net


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "conv"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("saturate", [True, False])
def test_largest_products_do_not_saturate(
    tmp_path, monkeypatch, per_channel, linear, sign, saturate
):
    if not saturate and products_saturate():
        pytest.skip("without the option this processor's products are wrong")
    monkeypatch.setattr(session, "products_saturate", lambda: saturate)
    shape = (16, 64) if linear else (16, 64, 3, 3)
    weight = np.full(shape, sign * 127, np.int8)
    path = qdq_layer(tmp_path / "m.onnx", weight, linear=linear, per_channel=per_channel)
    images = np.full((1, 64) if linear else (1, 64, 8, 8), 2.55, np.float32)
    written = run_batch(open_session(path, optimize=False), images)
    np.testing.assert_allclose(run_batch(open_session(path), images), written, rtol=1e-5)


@pytest.mark.parametrize("saturate", [True, False])
def test_weights_are_stored_as_unsigned_only_where_products_saturate(
    tmp_path, monkeypatch, saturate
):
    monkeypatch.setattr(session, "products_saturate", lambda: saturate)
    options = open_session(float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3))))
    key = "session.x64quantprecision"
    if saturate:
        assert options.get_session_options().get_session_config_entry(key) == "1"
    else:
        with pytest.raises(RuntimeError, match=key):
            options.get_session_options().get_session_config_entry(key)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="tells the processor's flags")
def test_a_processor_with_vnni_is_found_to_be_exact():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if "avx2" not in flags:
        pytest.skip("no x86 of the last ten years")
    has_vnni = not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(flags)
    assert products_saturate() == (not has_vnni)


@pytest.mark.parametrize("part", ["conv", "product"])
def test_one_saturated_kernel_is_enough(monkeypatch, part):
    """Of a processor that is not here: its answers, with one sum cut off."""
    true = ort.InferenceSession

    class Saturating:
        def __init__(self, *args, **settings):
            self.true = true(*args, **settings)

        def run(self, names, inputs):
            conv, product = self.true.run(names, inputs)
            if part == "conv":
                conv[0, 5] //= 2
            else:
                product[3, 2] = 32767 * 32
            return conv, product

    monkeypatch.setattr(ort, "InferenceSession", Saturating)
    assert products_saturate.__wrapped__()


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
