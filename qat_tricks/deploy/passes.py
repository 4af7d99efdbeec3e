"""Small rewrites of an exported graph, each towards operators that have integer kernels."""

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

COPY = "@"  # copies of the weight "<name>" are "<name>@1", "<name>@2", …
QUANTIZED = ".quantized"  # the integers of node "<name>" are the tensor "<name>.quantized"


def name_quantized(graph: onnx.GraphProto, calls: Mapping[str, Sequence[str | None]]) -> None:
    """Names the integers of each quantized tensor after its node in the simulated network.

    Args:
        graph: as the exporter wrote it.
        calls: for each quantizer by name, the node that each of its QuantizeLinear quantizes, in
            order; None gets no name.
    """
    # the exporter notes in which module each operator was emitted
    emitted: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scopes = next(
                (p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"),
                "[]",
            )
            emitted.setdefault(next(iter(ast.literal_eval(scopes)[-2:]), ""), []).append(node)
    for quantizer, names in calls.items():
        nodes = emitted.get(quantizer, [])
        if len(nodes) == len(names):  # else the exporter has merged some, and which is unknown
            for node, name in zip(nodes, names, strict=True):
                if name is not None:
                    _rename(graph, node.output[0], name + QUANTIZED)
                    node.output[0] = name + QUANTIZED


def tidy(model: onnx.ModelProto) -> None:
    """Applies every rewrite below to ``model`` in place."""
    # Pads that a conv takes over are gone before the others are moved to integers.
    _fold_pads(model.graph)
    _use_global_pools(model.graph)
    _pad_integers(model.graph)
    _drop_repeated_quantizers(model.graph)
    _clip_hard_sigmoids(model.graph)
    _keep_in_float(model.graph)
    _give_layers_their_own_weights(model.graph)
    _drop_unused(model.graph)
    for item in (*model.graph.node, *model.graph.value_info):
        item.ClearField("metadata_props")  # they hold paths of the source code


def _fold_pads(graph: onnx.GraphProto) -> None:
    """Pad with zeros, then Conv: the Conv pads itself. PyTorch's could not pad only one side."""
    values, producers = _initializers(graph), _producers(graph)
    for conv in graph.node:
        pad = producers.get(conv.input[0]) if conv.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or not _pads_zeros(pad, values):
            continue
        # begins of all dimensions, then ends
        amounts = [int(v) for v in values[pad.input[1]]]
        rank = len(amounts) // 2
        begin, end = amounts[:rank], amounts[rank:]
        # a conv pads height and width, and crops nothing
        own = next((a for a in conv.attribute if a.name == "pads"), None)
        if own is None or any(begin[:2] + end[:2]) or min(amounts) < 0:
            continue
        pads = [a + b for a, b in zip(own.ints, begin[2:] + end[2:], strict=True)]
        own.CopyFrom(helper.make_attribute("pads", pads))
        conv.input[0] = pad.input[0]


def _pads_zeros(pad: onnx.NodeProto, values: dict[str, np.ndarray]) -> bool:
    """Whether a Pad pads all dimensions by known amounts of zeros."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    value = pad.input[2] if len(pad.input) > 2 else ""
    axes = pad.input[3] if len(pad.input) > 3 else ""
    zero = not value or (value in values and not values[value].any())
    return mode == b"constant" and zero and not axes and pad.input[1] in values


def _pad_integers(graph: onnx.GraphProto) -> None:
    """Pads integers in place of floats between two grids that are the same.

    The operators are DequantizeLinear, Pad with zeros, QuantizeLinear.
    """
    values, producers = _initializers(graph), _producers(graph)
    for pad in graph.node:
        before = (
            producers.get(pad.input[0])
            if pad.op_type == "Pad" and _pads_zeros(pad, values)
            else None
        )
        users = [node for node in graph.node if pad.output[0] in node.input]
        if before is None or before.op_type != "DequantizeLinear":
            continue
        if any(
            user.op_type != "QuantizeLinear" or user.input[1:] != before.input[1:] for user in users
        ):
            continue
        pad.input[:] = [before.input[0], pad.input[1], before.input[2]]
        for user in users:
            _rename(graph, user.output[0], pad.output[0])
        # the shape noted for the padded tensor says float, and it is of integers now
        shapes = [value for value in graph.value_info if value.name != pad.output[0]]
        graph.ClearField("value_info")
        graph.value_info.extend(shapes)


def _clip_hard_sigmoids(graph: onnx.GraphProto) -> None:
    """DequantizeLinear, HardSigmoid, QuantizeLinear become a Clip of the integers.

    Only where that yields the same integer for each of the 256 (see ``graph.hard_sigmoids``).
    """
    values, producers = _initializers(graph), _producers(graph)
    for quantize in graph.node:
        function = (
            producers.get(quantize.input[0]) if quantize.op_type == "QuantizeLinear" else None
        )
        before = producers.get(function.input[0]) if function is not None else None
        if function is None or function.op_type != "HardSigmoid" or before is None:
            continue
        if before.op_type != "DequantizeLinear":
            continue
        # ONNX's own defaults, which the exporter does not write.
        alpha, beta = (
            next((a.f for a in function.attribute if a.name == name), default)
            for name, default in (("alpha", 0.2), ("beta", 0.5))
        )
        grids = [values.get(name) for name in (*before.input[1:], *quantize.input[1:])]
        known = [value for value in grids if value is not None and value.size == 1]
        bounds = _clip_of(*known, alpha=alpha, beta=beta) if len(known) == 4 else None
        if bounds is None:
            continue
        names = [f"{quantize.output[0]}_{end}" for end in ("least", "most")]
        graph.initializer.extend(map(numpy_helper.from_array, bounds, names))
        quantize.op_type = "Clip"
        quantize.input[:] = [before.input[0], *names]
        quantize.ClearField("attribute")


def _clip_of(
    scale: np.ndarray,
    zero: np.ndarray,
    scale_after: np.ndarray,
    zero_after: np.ndarray,
    *,
    alpha: float,
    beta: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The least and the most integer of a hardsigmoid that only clips; None if it does more."""
    if zero.dtype != zero_after.dtype:
        return None
    saturated = np.iinfo(zero.dtype)
    integers = np.arange(saturated.min, saturated.max + 1)
    inputs = (integers - zero.astype(int)).astype(np.float32) * scale
    outputs = np.clip(inputs * np.float32(alpha) + np.float32(beta), np.float32(0), np.float32(1))
    after = np.rint(outputs / scale_after).astype(int) + zero_after.astype(int)
    after = after.clip(saturated.min, saturated.max)
    least, most = after.min(), after.max()
    if (after != integers.clip(least, most)).any():
        return None
    return least.astype(zero.dtype), most.astype(zero.dtype)


def _keep_in_float(graph: onnx.GraphProto) -> None:
    """Puts a Sum of one input before a float layer or a softmax that takes dequantized values.

    Between quantizers, ONNX Runtime would otherwise quantize a float layer's weight by itself, per
    tensor, and compute a softmax from tables, which rounds some of its values to the other side.
    """
    values, producers = {tensor.name for tensor in graph.initializer}, _producers(graph)
    # backwards, so that inserting moves none of the nodes still to come
    for at, node in reversed(list(enumerate(graph.node))):
        before = (
            producers.get(node.input[0])
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "Softmax")
            else None
        )
        is_float = node.op_type == "Softmax" or (before is not None and node.input[1] in values)
        if before is not None and before.op_type == "DequantizeLinear" and is_float:
            # A Sum of one input changes no value, and no fusion looks through it.
            apart = f"{node.output[0]}_in_float"
            graph.node.insert(at, helper.make_node("Sum", [node.input[0]], [apart], apart))
            node.input[0] = apart


def _use_global_pools(graph: onnx.GraphProto) -> None:
    """ReduceMean over height and width becomes GlobalAveragePool, which has an integer kernel."""
    values = _initializers(graph)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    for node in list(graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or ranks.get(node.input[0]) != 4:
            continue
        # negative axes count from the end
        axes = values.get(node.input[1])
        if axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        nodes = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name)]
        if not keeps:
            # [N, C, 1, 1] to [N, C]: 0 keeps the size of the batch
            shape = numpy_helper.from_array(np.array([0, -1]), f"{pooled}_shape")
            graph.initializer.append(shape)
            name = f"{node.name}_reshape"
            nodes.append(helper.make_node("Reshape", [pooled, shape.name], [node.output[0]], name))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(nodes):
            graph.node.insert(at + offset, new)


def _drop_repeated_quantizers(graph: onnx.GraphProto) -> None:
    """DequantizeLinear, then QuantizeLinear with the same scale and zero point, changes nothing."""
    producers = _producers(graph)
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if (
            before is not None
            and before.op_type == "DequantizeLinear"
            and before.input[1:] == node.input[1:]
        ):
            _rename(graph, node.output[0], before.input[0])


def _give_layers_their_own_weights(graph: onnx.GraphProto) -> None:
    """Gives each layer a copy of a weight or zero point that it shares with others.

    Exporters merge equal ones, and ONNX Runtime fails on shared ones where it makes weights
    unsigned. Copies of a weight are called ``<weight>@1``, ``<weight>@2``, …
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producers = _producers(graph)

    def copy(name: str, new: str) -> str:
        if new not in tensors:
            tensors[new] = graph.initializer.add()
            tensors[new].CopyFrom(tensors[name])
            tensors[new].name = new
        return new

    uses: dict[str, int] = {}  # of each weight, so far, less one
    for at, node in reversed(list(enumerate(graph.node))):
        for i, name in enumerate(node.input):
            dequantize = producers.get(name)
            if (
                dequantize is None
                or dequantize.op_type != "DequantizeLinear"
                or len(dequantize.input) < 3
            ):
                continue
            # A copy's copy is named after the weight itself.
            weight = dequantize.input[0].partition(COPY)[0]
            if weight not in tensors:
                continue
            count = uses[weight] = uses.get(weight, -1) + 1
            if count == 0:  # the first use keeps the weight; only its zero point may be shared
                dequantize.input[2] = copy(dequantize.input[2], f"{weight}_zero_point")
                continue
            own = onnx.NodeProto()
            own.CopyFrom(dequantize)
            own.name = own.output[0] = node.input[i] = f"{name}{COPY}{count}"
            own.input[0] = copy(weight, f"{weight}{COPY}{count}")
            own.input[2] = copy(own.input[2], f"{weight}_zero_point{COPY}{count}")
            graph.node.insert(at, own)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes, initializers and shapes that nothing uses."""
    used = {output.name for output in graph.output}
    needed = []
    for node in reversed(graph.node):  # readers come after the nodes that they read
        if used.intersection(node.output):
            used.update(node.input)
            needed.append(node)
    values = {name for node in needed for name in node.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    shapes = [value for value in graph.value_info if value.name in values]
    for field, left in (
        ("node", needed[::-1]),
        ("initializer", initializers),
        ("value_info", shapes),
    ):
        graph.ClearField(field)
        getattr(graph, field).extend(left)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Makes all readers of the tensor ``old`` read ``new``."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _initializers(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The initializers of at most 16 values: axes, shapes, pads, and scalars."""
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if np.prod(t.dims) <= 16}


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each tensor, by the tensor's name."""
    return {output: node for node in graph.node for output in node.output}
