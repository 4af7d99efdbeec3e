"""Small ONNX networks made by hand, float and QDQ, whose answers are known."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path, nodes: list[Any], inits: dict[str, np.ndarray], shape: list[Any], **metadata: str
) -> Path:
    """Saves a graph from the float input ``x`` of a shape to the float output ``y``."""
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in inits.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    helper.set_model_props(model, metadata)
    onnx.save(model, str(path))
    return path


def qdq_layer(
    path: Path,
    weight: np.ndarray,
    *,
    linear: bool = False,
    per_channel: bool = True,
    quantized_output: bool = True,
    zero_point: int = 0,
    **metadata: str,
) -> Path:
    """Saves a conv or linear layer with an int8 weight [out, in, ...] and uint8 activations of
    scale 0.01.
    """
    out, depth = weight.shape[:2]
    scale = np.full(out, 0.01, np.float32) if per_channel else np.array(0.01, np.float32)
    zeros = np.full(scale.shape, zero_point, np.int8)
    largest = np.float32(np.abs(weight.astype(np.int64)).reshape(out, -1).sum(1).max() * 255 * 1e-4)
    inits = {
        "w": weight,
        "w_scale": scale,
        "w_zero": zeros,
        "x_scale": np.array(0.01, np.float32),
        "x_zero": np.array(0, np.uint8),
        "y_scale": np.array(largest / 100, np.float32),
        "y_zero": np.array(128, np.uint8),
    }
    layer = (
        helper.make_node("Gemm", ["xd", "wd"], ["f"], "layer", transB=1)
        if linear
        else helper.make_node("Conv", ["xd", "wd"], ["f"], "layer", pads=[weight.shape[2] // 2] * 4)
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        layer,
    ]
    if quantized_output:
        nodes += [
            helper.make_node("QuantizeLinear", ["f", "y_scale", "y_zero"], ["fq"]),
            helper.make_node("DequantizeLinear", ["fq", "y_scale", "y_zero"], ["y"]),
        ]
    else:
        nodes[-1].output[0] = "y"
    return save(
        path, nodes, inits, ["batch", depth] if linear else ["batch", depth, 8, 8], **metadata
    )


def float_conv(path: Path, weight: np.ndarray, *, groups: int = 1) -> Path:
    """Saves a float convolution with a weight [out, in / groups, k, k] on images of 8 by 8."""
    pads = [weight.shape[2] // 2] * 4
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", group=groups, pads=pads)
    return save(
        path, [node], {"w": weight.astype(np.float32)}, ["batch", weight.shape[1] * groups, 8, 8]
    )
