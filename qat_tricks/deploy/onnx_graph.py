"""Reads an ONNX file as a graph: loads it, and says which of its tensors are constant."""

from os import PathLike
from pathlib import Path

import onnx
from onnx import inliner

from qat_tricks.errors import QatTricksError, one_line


def load_model(path: str | PathLike[str]) -> onnx.ModelProto:
    """Loads an ONNX file with its external data, model-local functions inlined.

    Raises:
        QatTricksError: the file is missing, truncated or not an ONNX network.
    """
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(
            f'no ONNX file at "{path}": give the path of a model.onnx that an export wrote'
        )
    try:
        model = onnx.load(str(path))
    # protobuf's, onnx's and the file system's exceptions share no narrower base class
    except Exception as error:
        raise QatTricksError(
            f'"{path}" cannot be read as ONNX ({one_line(error)}): the file is truncated or '
            "foreign; export it again"
        ) from error
    if not model.graph.node:
        raise QatTricksError(f'"{path}" holds no ONNX network: export it again')
    # A function would hide the operators that are looked for.
    return inliner.inline_local_functions(model) if model.functions else model


def constant_tensors(graph: onnx.GraphProto) -> set[str]:
    """Returns the names of the tensors that do not depend on the input.

    They are initializers, and tensors computed from initializers.
    """
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # ONNX graphs are sorted topologically
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
    return constants


def node_label(node: onnx.NodeProto) -> str:
    """Returns the node's name, or its first output's where it has none."""
    return node.name or node.output[0]


def int_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Returns an integer attribute of a node, or the default that ONNX gives it."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
