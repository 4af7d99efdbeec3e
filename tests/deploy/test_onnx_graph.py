"""An ONNX file as a graph: which of its tensors are constant, and files that are none."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qat_tricks.deploy.onnx_graph import constant_tensors, int_attribute, load_model, node_label
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import qdq_layer


def test_constant_is_what_does_not_depend_on_the_input(tmp_path):
    graph = load_model(qdq_layer(tmp_path / "m.onnx", np.ones((4, 3, 3, 3), np.int8))).graph
    constants = constant_tensors(graph)
    assert {"w", "x_scale", "wd"} <= constants  # the dequantized weight too
    assert not constants & {"x", "xq", "xd", "f", "y"}


def test_a_node_without_a_name_is_called_after_its_output_and_has_its_defaults():
    gemm = helper.make_node("Gemm", ["a", "b"], ["out", "other"], transB=1)
    assert (node_label(gemm), int_attribute(gemm, "transB", 0)) == ("out", 1)
    assert int_attribute(gemm, "transA", 7) == 7
    gemm.name = "fc"
    assert node_label(gemm) == "fc"


def test_functions_of_the_file_are_written_out(tmp_path):
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    call = helper.make_node("Twice", ["x"], ["y"], domain="own")
    graph = helper.make_graph([call], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    onnx.save(
        helper.make_model(graph, functions=[twice], opset_imports=opsets), tmp_path / "f.onnx"
    )
    assert [node.op_type for node in load_model(tmp_path / "f.onnx").graph.node] == ["Add"]


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match=r'no ONNX file at ".*none'):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(QatTricksError, match="holds no ONNX network"):
        load_model(tmp_path / "empty.onnx")
    (tmp_path / "text.onnx").write_text("this is a poem")
    with pytest.raises(QatTricksError, match="cannot be read as ONNX"):
        load_model(tmp_path / "text.onnx")
