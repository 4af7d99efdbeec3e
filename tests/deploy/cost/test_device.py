"""Costs of a float and an int8 file side by side."""

import numpy as np
import onnxruntime as ort
import pytest

from qat_tricks.deploy.cost.device import measure_device, measure_runtime
from tests.helpers.handmade import float_conv, qdq_layer

SETTINGS = {"batch_size": 2, "threads": 1, "runs": 5, "max_seconds": 0.05}
SHAPE = (32, 8, 8)


@pytest.fixture
def paths(tmp_path):
    weight = np.ones((64, 32, 3, 3), np.int8)
    weight[::4] = 0
    return {
        "fp32": float_conv(tmp_path / "fp32.onnx", np.ones_like(weight)),
        "int8": qdq_layer(tmp_path / "int8.onnx", weight),
    }


def test_each_figure_stands_under_the_name_of_its_file(paths):
    costs = measure_device(paths, SHAPE, **SETTINGS)
    assert costs["size_bytes"] == {name: path.stat().st_size for name, path in paths.items()}
    assert costs["size_bytes"]["int8"] < costs["size_bytes"]["fp32"] / 3
    assert costs["compressed_bytes"]["int8"] < costs["size_bytes"]["int8"]
    assert costs["packed_bytes"] <= costs["size_bytes"]["int8"]
    assert (costs["sparsity"], costs["int8_coverage"]) == (0.25, 1.0)
    assert (costs["batch_size"], costs["threads"]) == (2, 1)
    assert all(costs["load_ms"][name] > 0 for name in paths)
    assert all(costs["latency_ms"][name]["p50"] > 0 for name in paths)


def test_a_runtime_says_its_version_and_a_file_that_is_missing_has_no_figures(paths):
    costs = measure_runtime("onnxruntime", {"int8": paths["int8"]}, SHAPE, **SETTINGS)
    assert ort.__version__.startswith(costs["version"])
    assert costs["latency_ms"]["fp32"] is costs["load_ms"]["fp32"] is None
    assert costs["latency_ms"]["int8"]["p50"] > 0
    assert costs["int8_layers"] is None  # ONNX Runtime does not say


def test_the_dearest_operators_are_named_only_when_asked_for(paths):
    assert "profile" not in measure_device(paths, SHAPE, **SETTINGS)
    costs = measure_device({"int8": paths["int8"]}, SHAPE, **SETTINGS, profile=True)
    assert costs["profile"]["fp32"] is costs["conversions"]["fp32"] is None
    assert {row["op_type"] for row in costs["profile"]["int8"]} >= {"QLinearConv"}
