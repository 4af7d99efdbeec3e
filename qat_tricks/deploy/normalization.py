"""Builds the normalization of pixels into an ONNX file, which then takes uint8 images of 0 to 255.

Cast, Mul (1/255), Sub (mean) and Div (std) go in front of the graph, in float32 and in the order in
which torchvision computes them: the network behind sees the same values to the last bit.
"""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qat_tricks.deploy.onnx_graph import load_model
from qat_tricks.deploy.parity.logits import check_agreement, compare_logits
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.errors import QatTricksError
from qat_tricks.files import replacing

NORMALIZATION_KEY = "qat_tricks.normalization"
BUILT_IN = "built in"
"""Value, as JSON text, of the property ``NORMALIZATION_KEY`` of a file that takes pixels."""

_PREFIX = "normalize"  # of the names that are added


def build_in_normalization(
    path: str | PathLike[str],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: str = "0..1",
    min_top1_agreement: float = 0.99,
) -> dict[str, Any]:
    """Changes the file at ``path`` so that it takes pixels, and compares it with the file before.

    Args:
        path: an ONNX file that takes normalized float images; it stays as it is if the new one
            does not agree.
        batches: to compare on: pixels, uint8 ``[N, C, H, W]``, and the same images normalized,
            float32.
        mean: of each channel, in units of ``scale``.
        std: of each channel, in units of ``scale``.
        scale: the range of a pixel before mean and std, ``0..1`` or ``0..255``.
        min_top1_agreement: least share of the images, 0..1, that must get the same class; one
            differing image is always tolerated unless it is 1.

    Returns:
        The figures of ``compare_logits`` for the new file against the old one.

    Raises:
        QatTricksError: the file takes pixels already, does not agree, or cannot be written.
    """
    path = Path(path)
    model = load_model(path)
    before = open_network(path, threads=1)
    if before.spec.dtype == np.uint8:
        raise QatTricksError(f'"{path}" takes uint8 images: its normalization is built in already')
    _prepend(model.graph, mean, std, scale)
    # ``set_model_props`` drops all properties that it is not given.
    properties = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**properties, NORMALIZATION_KEY: f'"{BUILT_IN}"'})
    # Compared before it replaces the file.
    with replacing(path) as draft:
        onnx.save(model, str(draft))
        onnx.checker.check_model(str(draft))
        after = open_network(draft, threads=1)
        report = compare_logits(
            (before.prepare(floats)(), after.prepare(pixels)()) for pixels, floats in batches
        )
        check_agreement(
            report,
            "with its normalization built in, the ONNX file does not run as before",
            min_top1_agreement=min_top1_agreement,
            remedy="leave export.normalize=false",
        )
    return report


def _prepend(
    graph: onnx.GraphProto, mean: Sequence[float], std: Sequence[float], scale: str
) -> None:
    """Puts the normalization between the graph's input and its readers."""
    (images,) = graph.input
    # The input keeps its name, and takes pixels.
    images.type.tensor_type.elem_type = TensorProto.UINT8
    steps = [("Mul", np.array(1 / 255, np.float32))] if scale == "0..1" else []
    steps += [("Sub", _by_channel(mean)), ("Div", _by_channel(std))]
    value = f"{_PREFIX}_cast"
    nodes = [helper.make_node("Cast", [images.name], [value], value, to=TensorProto.FLOAT)]
    for operator, operand in steps:
        name = f"{_PREFIX}_{operator.lower()}"
        graph.initializer.append(numpy_helper.from_array(operand, f"{name}_by"))
        nodes.append(helper.make_node(operator, [value, f"{name}_by"], [name], name))
        value = name
    # the network behind takes the last step's value in place of the images
    for node in graph.node:
        node.input[:] = [value if name == images.name else name for name in node.input]
    behind = list(graph.node)
    graph.ClearField("node")  # protobuf cannot insert at the front, and ONNX wants sorted nodes
    graph.node.extend([*nodes, *behind])


def _by_channel(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32).reshape(-1, 1, 1)
