"""Weights: zeros counted where they are stored, bytes at the bits that the metadata states."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper

from qat_tricks.deploy.cost.weights import (
    WEIGHT_BITS_KEY,
    compressed_bytes,
    file_bytes,
    weight_size,
    weight_sparsity,
)
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv, qdq_layer, save

F32 = np.float32


def _half_zero(shape: tuple[int, ...], zero: int = 0) -> np.ndarray:
    weight = np.arange(1, np.prod(shape) + 1).reshape(shape) % 100 + 2
    weight.reshape(-1)[::2] = zero
    return weight.astype(np.int8)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "conv"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_zero_is_the_zero_point(tmp_path, linear, per_channel, zero_point):
    shape = (4, 6) if linear else (4, 6, 3, 3)
    weight = _half_zero(shape, zero=zero_point)
    path = qdq_layer(
        tmp_path / "m.onnx", weight, linear=linear, per_channel=per_channel, zero_point=zero_point
    )
    assert weight_sparsity(path) == 0.5


def test_float_weights_count_alike(tmp_path):
    weight = _half_zero((4, 3, 3, 3))
    assert weight_sparsity(float_conv(tmp_path / "f.onnx", weight)) == 0.5
    assert weight_sparsity(float_conv(tmp_path / "d.onnx", np.ones((4, 3, 3, 3)))) == 0.0


def test_layers_count_by_their_size_and_biases_and_activations_not_at_all(tmp_path):
    inits = {
        "w": np.zeros((2, 2, 1, 1), F32),
        "bias": np.zeros(2, F32),
        "shift": np.zeros((1, 2, 1, 1), F32),
        "q": np.ones((12, 8), np.int8),
        "scale": np.array(0.5, F32),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"]),
        helper.make_node("Add", ["a", "shift"], ["b"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "wt"], ["c"]),
        helper.make_node("Transpose", ["c"], ["ct"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["ct", "c"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, inits, ["batch", 2, 8, 8])
    assert weight_sparsity(path) == 4 / 100


def test_a_shared_weight_counts_once(tmp_path):
    inits = {"w": np.zeros((2, 2, 1, 1), F32), "v": np.ones((2, 2, 1, 1), F32)}
    nodes = [helper.make_node("Conv", [a, w], [b]) for a, w, b in ["xwa", "awb", "bvy"]]
    assert weight_sparsity(save(tmp_path / "m.onnx", nodes, inits, ["batch", 2, 8, 8])) == 0.5


def test_constant_nodes_hold_weights_too(tmp_path):
    value = onnx.numpy_helper.from_array(_half_zero((2, 2, 1, 1)).astype(F32), "value")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    assert weight_sparsity(save(tmp_path / "m.onnx", nodes, {}, ["batch", 2, 8, 8])) == 0.5


def test_a_computed_weight_is_an_error_not_a_guess(tmp_path):
    inits = {"w": np.ones((2, 2, 1, 1), F32), "two": np.array(2, F32)}
    nodes = [
        helper.make_node("Mul", ["w", "two"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"], "conv"),
    ]
    with pytest.raises(QatTricksError, match=r'"conv".*computed by Mul'):
        weight_sparsity(save(tmp_path / "m.onnx", nodes, inits, ["batch", 2, 8, 8]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_size_follows_the_stated_bits(tmp_path, bits):
    weight = np.ones((16, 8, 3, 3), np.int8)
    path = qdq_layer(tmp_path / "m.onnx", weight, **{WEIGHT_BITS_KEY: json.dumps({"w": bits})})
    size = weight_size(path)
    assert size.on_disk == path.stat().st_size
    assert size.on_disk - size.packed == weight.size * (8 - bits) // 8


def test_without_stated_bits_the_file_is_what_the_weights_need(tmp_path):
    size = weight_size(qdq_layer(tmp_path / "m.onnx", np.ones((16, 8, 3, 3), np.int8)))
    assert size.on_disk == size.packed


@pytest.mark.parametrize("text", ['{"ww": 4}', '{"w": "four"}', '{"w": 0}', "[4]", "four"])
def test_bits_that_say_nothing_true_are_refused(tmp_path, text):
    path = qdq_layer(
        tmp_path / "m.onnx", np.ones((16, 8, 3, 3), np.int8), **{WEIGHT_BITS_KEY: text}
    )
    with pytest.raises(QatTricksError, match="weight_bits"):
        weight_size(path)


def test_external_data_counts_and_its_absence_is_an_error(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((16, 8, 3, 3)))
    inside = file_bytes(path)
    model = onnx.load(str(path))
    onnx.save(
        model, str(path), save_as_external_data=True, location="m.onnx.data", size_threshold=0
    )
    assert path.stat().st_size < inside <= file_bytes(path)
    assert compressed_bytes(path) < inside / 4  # all weights are 1
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(QatTricksError, match=r"m\.onnx"):
        file_bytes(path)


@pytest.mark.parametrize("content", [None, b"", b"poem"])
def test_a_file_that_is_no_network_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QatTricksError, match=r"m\.onnx"):
        weight_sparsity(path)


def test_zeros_make_a_compressed_file_smaller_and_the_file_itself_not(tmp_path):
    drawn = np.random.default_rng(0).integers(-127, 128, (64, 64, 3, 3)).astype(np.int8)
    pruned = np.where(np.abs(drawn) < 64, 0, drawn).astype(np.int8)
    dense, sparse = (
        qdq_layer(tmp_path / f"{name}.onnx", weight)
        for name, weight in (("dense", drawn), ("sparse", pruned))
    )
    assert file_bytes(dense) == file_bytes(sparse)
    assert compressed_bytes(sparse) < 0.8 * compressed_bytes(dense)
