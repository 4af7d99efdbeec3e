"""Makes the pools of an exported graph compute what PyTorch computes.

Four things go wrong on the way from PyTorch to ONNX Runtime. The exporter leaves out an average's
own divisor. It knows no adaptive max pool. With ``ceil_mode``, PyTorch and ONNX Runtime drop a last
window that would begin in the padding, and the shapes that ONNX gives to such a pool have it:
integer pools then fail. And of a window that reaches behind the padding, an integer average counts
the places that are not there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

_RANKS = {F.avg_pool2d: 2, F.avg_pool3d: 3}
_SOURCE = "pkg.torch.onnx.fx_node"  # the exporter's key for the node that it translated


def _adaptive_max_pool(*args: Any, **kwargs: Any) -> Any:
    """The exporter knows it neither with nor without indices; without them there is a way."""
    if kwargs.get("return_indices", False):
        return F.adaptive_max_pool2d(*args, **kwargs)
    return _adaptive_max(args[0], args[1] if len(args) > 1 else kwargs["output_size"])


def _average_pool(pool: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    # A seventh argument, or one by name, is the divisor.
    divisor = args[6] if len(args) > 6 else kwargs.get("divisor_override")
    if divisor is None:
        return pool(*args, **kwargs)
    return _with_divisor(pool, *args[:6], **{**kwargs, "divisor_override": divisor})


EXPORTABLE_POOLS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.adaptive_max_pool2d: _adaptive_max_pool,
    **{pool: partial(_average_pool, pool) for pool in _RANKS},
}
"""Pools that the exporter does not know, each with what computes it by what it knows."""


def _adaptive_max(input: Tensor, output_size: Any) -> Tensor:
    """The largest value of each window, whose sizes differ by one where they do not divide."""
    sizes = [output_size] * 2 if isinstance(output_size, int) else list(output_size)
    rows, columns = (
        [
            slice(place * size // count, -(-(place + 1) * size // count))  # rounded up
            for place in range(count)
        ]
        for size, count in zip(
            input.shape[-2:],
            (given or size for given, size in zip(sizes, input.shape[-2:], strict=True)),
            strict=True,
        )
    )
    # Rows first, and then columns of them: fewer windows than those of both at once.
    bands = torch.cat([input[..., row, :].amax(-2, keepdim=True) for row in rows], -2)
    return torch.cat([bands[..., column].amax(-1, keepdim=True) for column in columns], -1)


def _with_divisor(
    pool: Callable[..., Tensor],
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,  # a divisor of its own counts nothing
    *,
    divisor_override: int,
) -> Tensor:
    rank = _RANKS[pool]
    kernel, step, padded = (
        [value] * rank if isinstance(value, int) else list(value) * (rank // len(value))
        for value in (kernel_size, stride or kernel_size, padding)
    )
    missing = []
    for size, window, by, around in zip(input.shape[-rank:], kernel, step, padded, strict=True):
        places = (size + 2 * around - window) / by
        count = (math.ceil(places) if ceil_mode else math.floor(places)) + 1
        # No window begins behind the input and the padding before it.
        count -= (count - 1) * by >= size + around
        missing.append(max(0, (count - 1) * by + window - size - 2 * around))
    if any(missing):  # zeros at the ends, the last dimension first
        input = F.pad(input, [amount for end in reversed(missing) for amount in (0, end)])
    return pool(input, kernel, step, padded) * (math.prod(kernel) / divisor_override)


class _Pool(NamedTuple):
    """A pool of ONNX that rounds sizes up; its numbers have an entry a dimension."""

    node: onnx.NodeProto
    begins: list[int]  # padding before
    ends: list[int]  # padding behind
    onnx_sizes: list[int]  # of the output, by ONNX's formula
    torch_sizes: list[int]
    missing: list[int]  # places behind the padding that PyTorch's last window reaches


def mend_pools(graph: onnx.GraphProto, program: torch.export.ExportedProgram) -> None:
    """Changes the pools of ``graph`` that would compute something else than those of ``program``.

    Args:
        graph: as the exporter wrote it.
        program: that it was written from.
    """
    dequantized = {
        name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output
    }
    for pool in _pools(graph, program):
        if pool.onnx_sizes != pool.torch_sizes:
            # A window was dropped, so that rounding up is rounding down.
            _set(pool.node, ceil_mode=0)
        elif (
            any(pool.missing)
            and _attribute(pool.node, "count_include_pad", 0)
            and pool.node.input[0] in dequantized
        ):
            _count_what_is_there(graph, pool)


def _pools(graph: onnx.GraphProto, program: torch.export.ExportedProgram) -> list[_Pool]:
    """The pools that round sizes up; of those of three dimensions, ONNX Runtime has no integer
    ones.
    """
    traced = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    pools = []
    for node in graph.node:
        if node.op_type not in ("AveragePool", "MaxPool") or not _attribute(node, "ceil_mode", 0):
            continue
        # the exporter notes the node, "%name : ...", and may rename its output
        notes = {entry.key: entry.value for entry in node.metadata_props}
        source = traced.get(notes.get(_SOURCE, "").partition(" ")[0].removeprefix("%"))
        kernel = _attribute(node, "kernel_shape", ())
        if source is None:
            continue
        inputs, outputs = (_sizes(value, len(kernel)) for value in (source.args[0], source))
        # sizes that depend on the input are symbols
        if all(isinstance(size, int) for size in (*inputs, *outputs)):
            pools.append(_pool(node, inputs, outputs))
    return pools


def _sizes(node: Any, rank: int) -> list[Any]:
    value = node.meta["val"]
    # a max pool may yield indices as well
    return list((value[0] if isinstance(value, (list, tuple)) else value).shape)[-rank:]


def _pool(node: onnx.NodeProto, inputs: Sequence[int], outputs: Sequence[int]) -> _Pool:
    kernel = _attribute(node, "kernel_shape", ())
    rank = len(kernel)
    steps, dilations = (_attribute(node, name, [1] * rank) for name in ("strides", "dilations"))
    pads = list(_attribute(node, "pads", [0] * 2 * rank))
    onnx_sizes, missing = [], []
    for axis, size in enumerate(inputs):
        window = dilations[axis] * (kernel[axis] - 1) + 1
        padded = size + pads[axis] + pads[rank + axis]
        onnx_sizes.append(math.ceil((padded - window) / steps[axis]) + 1)
        missing.append(max(0, (outputs[axis] - 1) * steps[axis] + window - padded))
    return _Pool(node, pads[:rank], pads[rank:], onnx_sizes, list(outputs), missing)


def _count_what_is_there(graph: onnx.GraphProto, pool: _Pool) -> None:
    """Makes the places that are missing a padding that is not counted, and pads the rest before."""
    node = pool.node
    if any((*pool.begins, *pool.ends)):
        amounts = np.array([0, 0, *pool.begins, 0, 0, *pool.ends], np.int64)
        padded = f"{node.output[0]}_padded"
        graph.initializer.append(numpy_helper.from_array(amounts, f"{padded}_by"))
        pad = helper.make_node("Pad", [node.input[0], f"{padded}_by"], [padded], padded)
        graph.node.insert(list(graph.node).index(node), pad)
        node.input[0] = padded
    _set(node, ceil_mode=0, count_include_pad=0, pads=[0] * len(pool.ends) + pool.missing)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _set(node: onnx.NodeProto, **values: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    node.ClearField("attribute")
    node.attribute.extend([*kept, *(helper.make_attribute(*item) for item in values.items())])
