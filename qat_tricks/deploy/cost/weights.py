"""Measures the weights of an ONNX file: the share of zeros, and the bytes at their own bits."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from zstandard import ZstdCompressor

from qat_tricks.deploy.onnx_graph import constant_tensors, load_model, node_label
from qat_tricks.errors import QatTricksError, did_you_mean

WEIGHT_BITS_KEY = "qat_tricks.weight_bits"
"""The ONNX metadata property that holds, as JSON, the bits of each weight initializer by its name.
"""

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# operators that move values and change none
_MOVES = {"Transpose", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_FOUR_BITS = {TensorProto.INT4, TensorProto.UINT4}


@dataclass(frozen=True, kw_only=True)
class WeightSize:
    """Bytes of an ONNX file."""

    on_disk: int  # with its external data
    packed: int  # as it would be with every weight at its own bits


class _Weight(NamedTuple):
    name: str  # of the initializer
    values: np.ndarray  # as stored
    zeros: int
    stored_bits: int  # of one value in the file


def weight_sparsity(path: str | PathLike[str]) -> float:
    """Returns the share, 0..1, of exact zeros among an ONNX file's conv and linear weights.

    Biases do not count. A quantized weight is zero where it equals its zero point. A weight that
    several layers share counts once.

    Raises:
        QatTricksError: the file does not load, has no such weights, or computes one by operators
            that are not known here.
    """
    weights = _weights(path, load_model(path))
    return sum(weight.zeros for weight in weights) / sum(weight.values.size for weight in weights)


def weight_size(path: str | PathLike[str]) -> WeightSize:
    """Returns the bytes of the file as it is, and with each weight packed at its own bits.

    The bits come from the metadata property ``WEIGHT_BITS_KEY``; a weight that it does not name
    keeps its stored width.

    Raises:
        QatTricksError: as ``weight_sparsity``; or the property is no such table, or names a tensor
            that is no weight.
    """
    model = load_model(path)
    weights = _weights(path, model)
    bits = _weight_bits(model)
    names = {weight.name for weight in weights}
    for name in bits:
        if name not in names:
            raise QatTricksError(
                f'{WEIGHT_BITS_KEY} in "{path}" names "{name}", no weight; '
                f"{did_you_mean(name, names)}"
            )
    on_disk = file_bytes(path)
    saved = sum(
        _bytes(weight.values.size, weight.stored_bits)
        - _bytes(weight.values.size, bits.get(weight.name, weight.stored_bits))
        for weight in weights
    )
    return WeightSize(on_disk=on_disk, packed=on_disk - saved)


def file_bytes(path: str | PathLike[str]) -> int:
    """Returns the bytes on disk of an ONNX file and of the external data that it refers to.

    Raises:
        QatTricksError: the file or its external data is missing or no ONNX.
    """
    return sum(part.stat().st_size for part in _parts(path))


def compressed_bytes(path: str | PathLike[str], level: int = 10) -> int:
    """Returns the bytes that the same files take compressed by Zstandard, each by itself.

    So much a download or an update sends. Zeros and low bits make it smaller, and no kernel faster.

    Raises:
        QatTricksError: as ``file_bytes``.
    """
    compressor = ZstdCompressor(level=level)
    return sum(len(compressor.compress(part.read_bytes())) for part in _parts(path))


def _parts(path: str | PathLike[str]) -> list[Path]:
    """An ONNX file, and those of its external data."""
    path = Path(path)
    load_model(path)  # refuses missing or foreign files, external data included
    # Loaded with its data, a file no longer says where they were.
    graph = onnx.load(str(path), load_external_data=False).graph
    locations = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(path.parent / location for location in sorted(locations))]


def _bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` values of ``bits`` each, packed, rounded up."""
    return (count * bits + 7) // 8


def _weight_bits(model: onnx.ModelProto) -> dict[str, int]:
    text = next(
        (entry.value for entry in model.metadata_props if entry.key == WEIGHT_BITS_KEY), "{}"
    )
    try:
        bits = json.loads(text)
    except json.JSONDecodeError:
        bits = None
    if not isinstance(bits, dict) or not all(
        isinstance(b, int) and 1 <= b <= 32 for b in bits.values()
    ):
        raise QatTricksError(
            f"the metadata {WEIGHT_BITS_KEY} is {text[:80]!r}, allowed: a JSON object of "
            "initializer name to bits, 1 to 32"
        )
    return bits


def _weights(path: str | PathLike[str], model: onnx.ModelProto) -> list[_Weight]:
    """Returns every conv and linear weight once."""
    graph = model.graph
    constants = constant_tensors(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    # a weight may also be the value of a Constant
    for node in graph.node:
        if node.op_type == "Constant":
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            tensors |= dict(zip(node.output, values, strict=False))
    producers = {output: node for node in graph.node for output in node.output}
    weights: dict[str, _Weight] = {}
    for node, operand in _weight_operands(graph, constants):
        name, dequantize = _trace(operand, tensors, producers)
        if name not in tensors:
            raise QatTricksError(
                f'the weight of "{node_label(node)}" in "{path}" is computed by '
                f"{producers[name].op_type}, allowed: an initializer, alone or behind "
                "DequantizeLinear; export with constant folding"
            )
        if name not in weights:
            weights[name] = _read(name, dequantize, tensors)
    if not weights:
        raise QatTricksError(
            f'"{path}" has no conv or linear weights with known values: is it a network of ours?'
        )
    return list(weights.values())


def _weight_operands(
    graph: onnx.GraphProto, constants: set[str]
) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in graph.node:
        if node.op_type in _LAYERS:
            constant = [name for name in node.input[:2] if name in constants]
            # none: a product of two activations; two: a constant
            if len(constant) == 1:
                yield node, constant[0]


def _trace(
    name: str, tensors: dict[str, TensorProto], producers: dict[str, onnx.NodeProto]
) -> tuple[str, onnx.NodeProto | None]:
    """Walks from a layer's weight to the tensor that stores its values.

    Returns:
        The tensor's name, and the DequantizeLinear on the way if there is one.
    """
    dequantize = None
    while name not in tensors:
        node = producers[name]
        if node.op_type == "DequantizeLinear":
            dequantize = node
        elif node.op_type not in _MOVES:
            break
        name = node.input[0]
    return name, dequantize


def _read(name: str, dequantize: onnx.NodeProto | None, tensors: dict[str, TensorProto]) -> _Weight:
    tensor = tensors[name]
    values = numpy_helper.to_array(tensor)
    bits = 4 if tensor.data_type in _FOUR_BITS else values.dtype.itemsize * 8
    if dequantize is None or len(dequantize.input) < 3 or not dequantize.input[2]:
        return _Weight(name, values, int(np.sum(values == 0)), bits)
    # A weight of zero is stored as its zero point.
    zero_point = numpy_helper.to_array(tensors[dequantize.input[2]])
    if zero_point.size > 1:
        axis = next(
            (attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1
        )
        shape = [1] * values.ndim
        shape[axis] = -1
        zero_point = zero_point.reshape(shape)
    return _Weight(name, values, int(np.sum(values == zero_point)), bits)
