"""Integer coverage: the share of a network's conv and linear MACs that ONNX Runtime runs in integer
kernels.

Read from the graph that ONNX Runtime optimizes and runs, not from the exported one: a convolution
between quantizers only counts where ONNX Runtime fused it into an integer kernel. The MACs come
from the shapes of one run. Their total must equal that of the exported graph, so a kernel that is
unknown here is an error and never an undercount.
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
from qat_tricks.deploy.runtimes.session import input_specs, open_session
from qat_tricks.errors import QatTricksError


class _Operator(NamedTuple):
    kind: str  # "conv", "conv_transpose" or "matmul"
    integer: bool
    operands: tuple[int, int]  # which inputs are multiplied; a convolution's weight is the second


_OPERATORS = {
    "Conv": _Operator("conv", False, (0, 1)),
    "FusedConv": _Operator("conv", False, (0, 1)),
    "ConvTranspose": _Operator("conv_transpose", False, (0, 1)),
    "Gemm": _Operator("matmul", False, (0, 1)),
    "FusedGemm": _Operator("matmul", False, (0, 1)),
    "MatMul": _Operator("matmul", False, (0, 1)),
    "FusedMatMul": _Operator("matmul", False, (0, 1)),
    "QLinearConv": _Operator("conv", True, (0, 3)),
    "ConvInteger": _Operator("conv", True, (0, 1)),
    "QGemm": _Operator("matmul", True, (0, 3)),
    "QLinearMatMul": _Operator("matmul", True, (0, 3)),
    "MatMulInteger": _Operator("matmul", True, (0, 1)),
    "MatMulIntegerToFloat": _Operator("matmul", True, (0, 1)),
    "DynamicQuantizeMatMul": _Operator("matmul", True, (0, 1)),
}
_UNCOUNTED = {"Einsum", "LSTM", "GRU", "RNN", "DeformConv", "If", "Loop", "Scan"}
_STANDARD_DOMAINS = {"", "ai.onnx"}


class Kernel(NamedTuple):
    """One conv or linear operator as ONNX Runtime runs it."""

    name: str
    op_type: str
    macs: int  # of the whole run, one image unless the network's batch is fixed
    integer: bool


@dataclass(frozen=True, kw_only=True)
class CoverageReport:
    """Which kernels do the multiplications. ``coverage`` is integer MACs over all MACs, 0..1."""

    coverage: float
    integer_macs: int
    total_macs: int
    kernels: list[Kernel]


def integer_coverage(path: str | PathLike[str], image_shape: Shapes) -> CoverageReport:
    """Reports which conv and linear operators of an ONNX file ONNX Runtime runs in integer kernels.

    Products of two activations, as in attention, are not linear layers and not counted.

    Args:
        path: the ONNX file.
        image_shape: (channels, height, width); of a network with several inputs one shape for each.

    Raises:
        QatTricksError: the file does not open, the images do not fit, the network has no conv or
            linear operator, or it holds an operator whose MACs are unknown here.
    """
    written = load_model(path)
    with TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        # The blocked float layout (NCHWc) pads channels, which would count products nobody asked
        # for.
        session = open_session(
            path, optimized_path=optimized_path, disabled_optimizers=["NchwcTransformer"]
        )
        specs = input_specs(session)
        given = feed(specs, random_batch(specs, image_shape, specs[0].shape[0] or 1))
        optimized = load_model(optimized_path)
        expected = sum(
            kernel.macs for kernel in _kernels(written, given, Path(folder) / "shapes.onnx")
        )
        kernels = _kernels(optimized, given, Path(folder) / "shapes.onnx")
    total = sum(kernel.macs for kernel in kernels)
    if total != expected:
        types = ", ".join(sorted({node.op_type for node in optimized.graph.node}))
        raise QatTricksError(
            f'integer coverage of "{path}" is unknown: {expected} MACs in the file but {total} in '
            f"the kernels known here, ONNX Runtime's graph has ({types}); report it, or leave this "
            "measurement out"
        )
    if total == 0:
        raise QatTricksError(
            f'"{path}" has no conv or linear operator, so integer coverage has no meaning for it'
        )
    integer = sum(kernel.macs for kernel in kernels if kernel.integer)
    return CoverageReport(
        coverage=integer / total, integer_macs=integer, total_macs=total, kernels=kernels
    )


def _kernels(model: onnx.ModelProto, given: dict[str, np.ndarray], scratch: Path) -> list[Kernel]:
    constants = constant_tensors(model.graph)
    nodes = [node for node in model.graph.node if _multiplies_weights(node, constants)]
    names = {name for node in nodes for name in (*_operand_names(node), node.output[0])}
    shapes = _shapes(model, names, given, scratch)
    return [
        Kernel(
            node_label(node),
            node.op_type,
            _macs(node, shapes, constants),
            _OPERATORS[node.op_type].integer,
        )
        for node in nodes
    ]


def _multiplies_weights(node: onnx.NodeProto, constants: set[str]) -> bool:
    if node.op_type in _OPERATORS:
        constant = [name in constants for name in _operand_names(node)]
        return not all(constant) and (any(constant) or _OPERATORS[node.op_type].kind != "matmul")
    foreign = node.op_type in _UNCOUNTED and any(name in constants for name in node.input)
    if foreign or any(attribute.HasField("g") for attribute in node.attribute):
        raise QatTricksError(
            f'integer coverage is unknown: the MACs of "{node_label(node)}" ({node.op_type}) '
            f"cannot be counted; counted are {', '.join(sorted(_OPERATORS))}"
        )
    return False


def _operand_names(node: onnx.NodeProto) -> tuple[str, str]:
    first, second = _OPERATORS[node.op_type].operands
    return node.input[first], node.input[second]


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], constants: set[str]) -> int:
    left, right = _operand_names(node)
    kind = _OPERATORS[node.op_type].kind
    if kind == "conv":  # weight [out, in / groups, *kernel]: so many products for each output value
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[right][1:])
    # weight [in, out / groups, *kernel]: so many products for each input value
    if kind == "conv_transpose":
        return math.prod(shapes[left]) * math.prod(shapes[right][1:])
    if right in constants:
        depth = shapes[left][-2 if int_attribute(node, "transA", 0) else -1]
    else:
        shape = shapes[right]
        depth = shape[-1] if len(shape) == 1 or int_attribute(node, "transB", 0) else shape[-2]
    return math.prod(shapes[node.output[0]]) * depth


def _shapes(
    model: onnx.ModelProto, names: set[str], given: dict[str, np.ndarray], scratch: Path
) -> dict[str, tuple[int, ...]]:
    """Runs the graph as it stands, once, with the named tensors as outputs, and returns their
    shapes.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    wanted = sorted(names - set(shapes) - set(given))
    present = {value.name for value in model.graph.output}
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in wanted if name not in present
    )
    onnx.save(probe, str(scratch))
    session = open_session(scratch, optimize=False)
    measured = session.run(wanted, given) if wanted else []
    return (
        shapes
        | {name: values.shape for name, values in given.items()}
        | {name: value.shape for name, value in zip(wanted, measured, strict=True)}
    )
