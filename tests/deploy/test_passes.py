"""Rewrites of a graph: the operators change, and what the graph computes does not."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qat_tricks.deploy.passes import COPY, QUANTIZED, name_quantized, tidy

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
GRID = {"s": np.array(0.05, np.float32), "z": np.array(128, np.uint8)}
OTHER = {"s2": np.array(0.04, np.float32)}
WEIGHT = {
    "w": np.random.default_rng(1).integers(-127, 128, (4, 3, 3, 3), np.int8),
    "ws": np.full(4, 0.01, np.float32),
    "wz": np.zeros(4, np.int8),
}


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs.split(), [output], output, **attributes)


def quantize(source, to, scale="s"):
    """The two nodes that put ``source`` on a grid; their result is ``to``."""
    grid = f"{scale} z"
    return [
        node("QuantizeLinear", f"{source} {grid}", f"{to}_q"),
        node("DequantizeLinear", f"{to}_q {grid}", to),
    ]


def model(nodes, initializers):
    """A graph from images ``x`` to ``y``, its shapes noted."""
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def run(network):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(network.SerializeToString(), options, providers=providers)
    return session.run(None, {"x": IMAGES})[0]


CASES = {
    "pads of a conv": (
        [
            node("Pad", "x pads", "p"),
            node("DequantizeLinear", "w ws wz", "wd", axis=0),
            node("Conv", "p wd", "y", pads=[0, 0, 0, 0]),
        ],
        {**WEIGHT, "pads": np.array([0, 0, 0, 1, 0, 0, 2, 0])},
        ["DequantizeLinear", "Conv"],
    ),
    "pads by another value": (
        [
            node("Pad", "x pads one", "p"),
            node("DequantizeLinear", "w ws wz", "wd", axis=0),
            node("Conv", "p wd", "y", pads=[0, 0, 0, 0]),
        ],
        {**WEIGHT, "pads": np.array([0, 0, 0, 1, 0, 0, 2, 0]), "one": np.array(1, np.float32)},
        ["Pad", "DequantizeLinear", "Conv"],
    ),
    "pads between one grid": (
        [*quantize("x", "d"), node("Pad", "d pads", "p"), *quantize("p", "y")],
        {**GRID, "pads": np.array([0, 1, 0, 0, 0, 2, 0, 0])},
        ["QuantizeLinear", "Pad", "DequantizeLinear"],
    ),
    "mean of images": (
        [node("Relu", "x", "r"), node("ReduceMean", "r axes", "y", keepdims=0)],
        {"axes": np.array([-1, -2])},
        ["Relu", "GlobalAveragePool", "Reshape"],
    ),
    "mean that keeps its dimensions": (
        [node("Relu", "x", "r"), node("ReduceMean", "r axes", "y", keepdims=1)],
        {"axes": np.array([2, 3])},
        ["Relu", "GlobalAveragePool"],
    ),
    "mean of channels": (
        [node("Relu", "x", "r"), node("ReduceMean", "r axes", "y")],
        {"axes": np.array([1, 2])},
        ["Relu", "ReduceMean"],
    ),
    "one grid twice": (
        [*quantize("x", "d"), *quantize("d", "y")],
        GRID,
        ["QuantizeLinear", "DequantizeLinear"],
    ),
    "two grids": (
        [*quantize("x", "d"), *quantize("d", "y", "s2")],
        {**GRID, **OTHER},
        ["QuantizeLinear", "DequantizeLinear"] * 2,
    ),
    "a softmax of integers": (
        [*quantize("x", "d"), node("Softmax", "d", "y", axis=1)],
        GRID,
        ["QuantizeLinear", "DequantizeLinear", "Sum", "Softmax"],
    ),
    "what nothing reads": (
        [node("Relu", "x", "y"), node("Exp", "x", "e"), node("Neg", "e", "n")],
        {"unread": np.ones(2, np.float32)},
        ["Relu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "initializers", "left"), CASES.values(), ids=CASES)
def test_a_rewritten_graph_computes_the_same(nodes, initializers, left):
    network = model(nodes, initializers)
    expected = run(network)
    tidy(network)
    assert [each.op_type for each in network.graph.node] == left
    np.testing.assert_allclose(run(network), expected, rtol=1e-6, atol=1e-6)
    onnx.checker.check_model(network)


def test_layers_that_share_a_weight_get_a_copy_each():
    network = model(
        [
            node("DequantizeLinear", "w ws wz", "wd", axis=0),
            node("Conv", "x wd", "a"),
            node("Relu", "x", "r"),
            node("Conv", "r wd", "b"),
            node("Add", "a b", "y"),
        ],
        WEIGHT,
    )
    expected = run(network)
    tidy(network)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    assert {name for name in stored if name.partition(COPY)[0] == "w"} == {"w", f"w{COPY}1"}
    assert np.array_equal(stored["w"], stored[f"w{COPY}1"])
    read = [each.input[2] for each in network.graph.node if each.op_type == "DequantizeLinear"]
    assert len(set(read)) == 2  # zero points too
    np.testing.assert_array_equal(run(network), expected)


def test_integers_are_named_after_their_nodes_unless_calls_were_merged():
    def network():
        made = model([*quantize("x", "d"), node("Relu", "d", "r"), *quantize("r", "y")], GRID)
        for each in made.graph.node:
            if each.op_type == "QuantizeLinear":
                scopes = str(["", "grid", each.name])
                each.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        return made

    def integers(made):
        return [each.output[0] for each in made.graph.node if each.op_type == "QuantizeLinear"]

    named, merged = network(), network()
    name_quantized(named.graph, {"grid": ["stem", None]})
    assert integers(named) == ["stem" + QUANTIZED, "y_q"]
    np.testing.assert_array_equal(run(named), run(network()))
    name_quantized(merged.graph, {"grid": ["stem", None, "last"]})  # which is missing is unknown
    assert integers(merged) == ["d_q", "y_q"]
