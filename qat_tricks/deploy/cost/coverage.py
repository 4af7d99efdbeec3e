"""Integer coverage: the share of conv and linear MACs that ONNX Runtime runs in integer kernels.

It is read from the graph that ONNX Runtime optimizes and runs, not from the exported one: a
convolution between quantizers only counts where ONNX Runtime fused it into an integer operator. The
MACs come from the shapes of one run. Their total must equal that of the exported graph, so an
operator that is unknown here is an error and never an undercount.
"""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import onnx

from qat_tricks.deploy.onnx_graph import constant_tensors, int_attribute, load_model, node_label
from qat_tricks.deploy.runtimes.network import Shapes, feed, random_batch
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_session
from qat_tricks.errors import QatTricksError


class _Product(NamedTuple):
    """How a type of operator multiplies."""

    kind: str  # "conv", "conv_transpose" or "matmul"
    integer: bool
    operands: tuple[int, int]  # which inputs are multiplied; a convolution's weight is the second


_PRODUCTS = {
    "Conv": _Product("conv", False, (0, 1)),
    "FusedConv": _Product("conv", False, (0, 1)),
    "ConvTranspose": _Product("conv_transpose", False, (0, 1)),
    "Gemm": _Product("matmul", False, (0, 1)),
    "FusedGemm": _Product("matmul", False, (0, 1)),
    "MatMul": _Product("matmul", False, (0, 1)),
    "FusedMatMul": _Product("matmul", False, (0, 1)),
    "QLinearConv": _Product("conv", True, (0, 3)),
    "ConvInteger": _Product("conv", True, (0, 1)),
    "QGemm": _Product("matmul", True, (0, 3)),
    "QLinearMatMul": _Product("matmul", True, (0, 3)),
    "MatMulInteger": _Product("matmul", True, (0, 1)),
    "MatMulIntegerToFloat": _Product("matmul", True, (0, 1)),
    "DynamicQuantizeMatMul": _Product("matmul", True, (0, 1)),
}
_UNCOUNTED = {"Einsum", "LSTM", "GRU", "RNN", "DeformConv", "If", "Loop", "Scan"}
_STANDARD_DOMAINS = {"", "ai.onnx"}


class Operator(NamedTuple):
    """One conv or linear operator of the graph that ONNX Runtime runs."""

    name: str
    op_type: str
    macs: int  # of the whole run, one image unless the network's batch is fixed
    integer: bool


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """The operators that multiply. ``coverage`` is integer MACs over all MACs, 0..1."""

    coverage: float
    integer_macs: int
    total_macs: int
    operators: list[Operator]


def integer_coverage(path: str | PathLike[str], image_shape: Shapes) -> CoverageReport:
    """Measures which convs and linears of an ONNX file run in integer kernels of ONNX Runtime.

    Products of two activations, as in attention, are no linear layers and not counted.

    Args:
        path: the ONNX file.
        image_shape: (channels, height, width), or one shape for each of several inputs.

    Raises:
        QatTricksError: the file does not open, the images do not fit, the network has no conv or
            linear operator, or it holds an operator whose MACs are unknown here.
    """
    written = load_model(path)
    with TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        # The blocked float layout (NCHWc) pads channels, and products with padding would count.
        session = open_session(
            path, optimized_path=optimized_path, disabled_optimizers=["NchwcTransformer"]
        )
        specs = input_specs(session)
        batch_size = specs[0].shape[0] or 1  # one image, unless the network's batch is fixed
        batch = feed(specs, random_batch(specs, image_shape, batch_size))
        optimized = load_model(optimized_path)
        scratch = Path(folder) / "shapes.onnx"
        # Shapes and so MACs do not depend on optimization: the two sums must agree.
        expected = sum(operator.macs for operator in _operators(written, batch, scratch))
        operators = _operators(optimized, batch, scratch)
    total = sum(operator.macs for operator in operators)
    if total != expected:
        types = ", ".join(sorted({node.op_type for node in optimized.graph.node}))
        raise QatTricksError(
            f'integer coverage of "{path}" is unknown: {expected} MACs in the file but {total} in '
            f"the operators known here, ONNX Runtime's graph has ({types}); report it, or leave "
            "this measurement out"
        )
    if total == 0:
        raise QatTricksError(
            f'"{path}" has no conv or linear operator, so integer coverage has no meaning for it'
        )
    integer = sum(operator.macs for operator in operators if operator.integer)
    return CoverageReport(
        coverage=integer / total, integer_macs=integer, total_macs=total, operators=operators
    )


def _operators(
    model: onnx.ModelProto, batch: dict[str, np.ndarray], scratch: Path
) -> list[Operator]:
    """The operators of a graph that multiply by weights, with the MACs of ``batch``."""
    constants = constant_tensors(model.graph)
    nodes = [node for node in model.graph.node if _multiplies_weights(node, constants)]
    # One run yields all shapes that the products need.
    names = {name for node in nodes for name in (*_operand_names(node), node.output[0])}
    shapes = _shapes(model, names, batch, scratch)
    return [
        Operator(
            node_label(node),
            node.op_type,
            _macs(node, shapes, constants),
            _PRODUCTS[node.op_type].integer,
        )
        for node in nodes
    ]


def _multiplies_weights(node: onnx.NodeProto, constants: set[str]) -> bool:
    """Whether ``node`` is a conv or linear on values that depend on the input.

    Raises:
        QatTricksError: its MACs are unknown.
    """
    if node.op_type in _PRODUCTS:
        constant = [name in constants for name in _operand_names(node)]
        # a matmul without a constant multiplies two activations, as attention does
        return not all(constant) and (any(constant) or _PRODUCTS[node.op_type].kind != "matmul")
    # operators with a graph of their own may hide products too
    foreign = node.op_type in _UNCOUNTED and any(name in constants for name in node.input)
    if foreign or any(attribute.HasField("g") for attribute in node.attribute):
        raise QatTricksError(
            f'integer coverage is unknown: the MACs of "{node_label(node)}" ({node.op_type}) '
            f"cannot be counted; counted are {', '.join(sorted(_PRODUCTS))}"
        )
    return False


def _operand_names(node: onnx.NodeProto) -> tuple[str, str]:
    first, second = _PRODUCTS[node.op_type].operands
    return node.input[first], node.input[second]


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], constants: set[str]) -> int:
    left, right = _operand_names(node)
    kind = _PRODUCTS[node.op_type].kind
    # weight [out, in / groups, *size]: the products of each output value
    if kind == "conv":
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[right][1:])
    # weight [in, out / groups, *size]: the products of each input value
    if kind == "conv_transpose":
        return math.prod(shapes[left]) * math.prod(shapes[right][1:])
    if right in constants:
        depth = shapes[left][-2 if int_attribute(node, "transA", 0) else -1]
    else:
        shape = shapes[right]
        depth = shape[-1] if len(shape) == 1 or int_attribute(node, "transB", 0) else shape[-2]
    return math.prod(shapes[node.output[0]]) * depth


def _shapes(
    model: onnx.ModelProto, names: set[str], batch: dict[str, np.ndarray], scratch: Path
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the named tensors, from one run that has them as outputs."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    # A name that is an initializer or an input has its shape already.
    wanted = sorted(names - set(shapes) - set(batch))
    present = {value.name for value in model.graph.output}
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in present
    )
    onnx.save(probe, str(scratch))
    # Unoptimized: this graph is to run as it stands.
    session = open_session(scratch, optimize=False)
    measured = run_session(session, wanted, batch) if wanted else []
    return (
        shapes
        | {name: values.shape for name, values in batch.items()}
        | {name: value.shape for name, value in zip(wanted, measured, strict=True)}
    )
