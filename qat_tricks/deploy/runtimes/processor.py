"""What ONNX Runtime's integer kernels do on this processor with products that are large."""

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 64  # of the probe, enough for every kernel's widest vectors


@cache
def products_saturate() -> bool:
    """Whether products of uint8 activations and int8 weights are cut off at 16 bits.

    They are on x86 without VNNI, whose ``vpmaddubsw`` adds two of them. Asked is the processor
    itself, by a conv and a matrix product of the largest activations and weights: names of
    processors, and their flags, do not say which kernels a release of ONNX Runtime takes.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(_probe(), options, providers=["CPUExecutionProvider"])
    images = np.full((1, CHANNELS, 3, 3), 255, np.uint8)
    rows = np.full((CHANNELS, CHANNELS), 255, np.uint8)
    conv, product = session.run(None, {"images": images, "rows": rows})
    # The conv's output has a scale by which its middle, of nine whole positions, is 200.
    return bool((conv[0, :, 1, 1] != 200).any() or (product != 255 * 127 * CHANNELS).any())


def _probe() -> bytes:
    """A QLinearConv and a MatMulInteger, without a fusion that could change them."""
    largest = 255 * 127 * CHANNELS * 9
    values = {
        "kernel": np.full((CHANNELS, CHANNELS, 3, 3), 127, np.int8),
        "columns": np.full((CHANNELS, CHANNELS), 127, np.int8),
        "one": np.float32(1),
        "ones": np.ones(CHANNELS, np.float32),
        "scale": np.float32(largest / 200),
        "zero": np.uint8(0),
        "zeros": np.zeros(CHANNELS, np.int8),
    }
    names = ["images", "one", "zero", "kernel", "ones", "zeros", "scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QLinearConv", names, ["conv"], pads=[1] * 4),
            helper.make_node("MatMulInteger", ["rows", "columns"], ["product"]),
        ],
        "probe",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, [1, CHANNELS, 3, 3]),
            helper.make_tensor_value_info("rows", TensorProto.UINT8, [CHANNELS, CHANNELS]),
        ],
        [
            helper.make_tensor_value_info("conv", TensorProto.UINT8, None),
            helper.make_tensor_value_info("product", TensorProto.INT32, None),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
