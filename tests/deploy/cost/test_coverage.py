"""Integer coverage: read from what ONNX Runtime runs, every MAC accounted for."""

import numpy as np
import pytest
from onnx import helper

from qat_tricks.deploy.cost.coverage import integer_coverage
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv, qdq_layer, save

F32 = np.float32


def test_a_quantized_convolution_is_integer(tmp_path):
    report = integer_coverage(
        qdq_layer(tmp_path / "m.onnx", np.ones((16, 4, 3, 3), np.int8)), (4, 8, 8)
    )
    assert report.coverage == 1.0
    assert report.total_macs == report.integer_macs == 8 * 8 * 16 * 4 * 9
    assert [operator.op_type for operator in report.operators] == ["QLinearConv"]


@pytest.mark.parametrize("quantized_output", [True, False])
def test_a_quantized_linear_layer_is_integer(tmp_path, quantized_output):
    weight = np.ones((10, 32), np.int8)
    path = qdq_layer(tmp_path / "m.onnx", weight, linear=True, quantized_output=quantized_output)
    report = integer_coverage(path, (32,))
    assert (report.coverage, report.total_macs) == (1.0, 320)


def test_quantizers_do_not_count_where_the_kernel_is_float(tmp_path):
    weight = np.ones((16, 4, 3, 3), np.int8)
    path = qdq_layer(
        tmp_path / "m.onnx", weight, quantized_output=False
    )  # no output quantizer: no integer conv
    report = integer_coverage(path, (4, 8, 8))
    assert (report.coverage, report.integer_macs, report.total_macs) == (0.0, 0, 8 * 8 * 16 * 4 * 9)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (16, 1), (16, 4), (16, 16)])
def test_float_convolutions_count_their_own_channels_only(tmp_path, channels, groups):
    """Blocked layouts pad channels to 8 or 16; padding is no work."""
    path = float_conv(tmp_path / "m.onnx", np.ones((16, channels // groups, 3, 3)), groups=groups)
    report = integer_coverage(path, (channels, 8, 8))
    assert (report.coverage, report.total_macs) == (0.0, 8 * 8 * 16 * channels // groups * 9)


def test_the_share_of_a_mixed_network_is_by_macs(tmp_path):
    """A quantized convolution of 4 to 8 channels, then a float one of 8 to 2, fused with its
    activation.
    """
    inits = {
        "w": np.ones((8, 4, 3, 3), np.int8),
        "v": np.ones((2, 8, 1, 1), F32),
        "scale": np.array(0.01, F32),
        "w_zero": np.array(0, np.int8),
        "zero": np.array(0, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "w_zero"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["a"], "first"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["aq"]),
        helper.make_node("DequantizeLinear", ["aq", "scale", "zero"], ["ad"]),
        helper.make_node("Conv", ["ad", "v"], ["b"], "second"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    report = integer_coverage(
        save(tmp_path / "m.onnx", nodes, inits, ["batch", 4, 8, 8]), (4, 8, 8)
    )
    first, second = 36 * 8 * 4 * 9, 36 * 2 * 8
    assert report.coverage == pytest.approx(first / (first + second))
    assert {operator.macs: operator.integer for operator in report.operators} == {
        first: True,
        second: False,
    }


def test_transposed_convolutions_and_products_with_weights_count(tmp_path):
    inits = {"w": np.ones((4, 6, 2, 2), F32), "v": np.ones((16, 5), F32)}
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["a"], strides=[2, 2]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    report = integer_coverage(
        save(tmp_path / "m.onnx", nodes, inits, ["batch", 4, 8, 8]), (4, 8, 8)
    )
    macs = sorted(operator.macs for operator in report.operators)
    assert macs == [4 * 64 * 6 * 4, 6 * 16 * 5 * 16]


def test_products_of_activations_do_not_count(tmp_path):
    inits = {"w": np.ones((8, 8), F32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["a", "t"], ["y"]),
    ]
    report = integer_coverage(
        save(tmp_path / "m.onnx", nodes, inits, ["batch", 2, 8, 8]), (2, 8, 8)
    )
    assert [operator.macs for operator in report.operators] == [2 * 8 * 8 * 8]


def test_work_that_cannot_be_counted_is_an_error(tmp_path):
    node = helper.make_node("Einsum", ["x", "w"], ["y"], "mix", equation="bchw,cd->bdhw")
    path = save(tmp_path / "m.onnx", [node], {"w": np.ones((2, 3), F32)}, ["batch", 2, 8, 8])
    with pytest.raises(QatTricksError, match=r'"mix" \(Einsum\)'):
        integer_coverage(path, (2, 8, 8))


def test_an_operator_unknown_here_is_an_error(tmp_path, monkeypatch):
    from qat_tricks.deploy.cost import coverage

    monkeypatch.delitem(coverage._PRODUCTS, "QLinearConv")
    path = qdq_layer(tmp_path / "m.onnx", np.ones((16, 4, 3, 3), np.int8))
    with pytest.raises(QatTricksError, match="QLinearConv"):
        integer_coverage(path, (4, 8, 8))


def test_a_network_without_weights_is_an_error(tmp_path):
    path = save(
        tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, ["batch", 2, 8, 8]
    )
    with pytest.raises(QatTricksError, match="no conv or linear"):
        integer_coverage(path, (2, 8, 8))
