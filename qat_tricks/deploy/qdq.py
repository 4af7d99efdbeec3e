"""Turns the simulated network into one that has QuantizeLinear and DequantizeLinear.

The integers are those of the simulation: int8 weights with a zero point a channel (ONNX Runtime
needs it spelled out to keep products exact on x86 without VNNI) and, in most layouts, an int32 bias
in steps of input scale times weight scale. ``deploy.layouts`` has the operators around them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_tricks.deploy.emitters import EmitActivation, EmitLayer
from qat_tricks.deploy.layouts import DEFAULT_LAYOUT, Layout, layout_named
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.grids import grid_of, input_grid_of
from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import Layer, activation_quantizers
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer

WEIGHT = "weight"  # an integer layer's int8 weight is the initializer "<layer>.weight"

Quantizers = Mapping[str, ActivationQuantizer]  # by name


class Emitted(NamedTuple):
    """The weights and quantizers that the ONNX file will hold."""

    bits: dict[str, int]  # of each int8 weight, by the name that its initializer will have
    # of each quantizer by name, in order: the node quantized, None for a repetition
    calls: dict[str, list[str | None]]


class _LayerCall(NamedTuple):
    """A call of a quantized layer, and the quantizer of its input if it has one."""

    node: fx.Node
    layer: Layer
    input_quantizer: ActivationQuantizer | None


def to_qdq(traced: fx.GraphModule, layout: str = DEFAULT_LAYOUT) -> Emitted:
    """Turns ``traced``, in place, into a network for ``torch.onnx.export``.

    Quantizers and quantized layers become modules that emit ONNX operators. An operation that only
    moves values gets a quantizer of the same grid behind it: it changes no value, and the operation
    that follows finds its integers.

    Args:
        traced: a network of ours, calibrated.
        layout: a name of ``deploy.layouts.LAYOUTS``.

    Raises:
        QatTricksError: a quantizer in use has no range, or the layout is unknown or cannot have its
            integers.
    """
    wanted = layout_named(layout)
    enabled = _enabled(traced)
    if wanted.int8_symmetric_only:
        _check_int8_symmetric(enabled)
    # The graph is read completely before its first change.
    layer_calls = _layer_calls(traced)
    names = {quantizer: name for name, quantizer in enabled.items()}
    repetitions = [
        (node, names[grid])
        for node in traced.graph.nodes
        if (grid := _grid_to_repeat(node, traced)) is not None
    ]
    quantized_nodes = {
        node: node.all_input_nodes[0].name for node in traced.graph.nodes if node.target in enabled
    }
    if wanted.relu_before_quantizer:
        _put_relus_first(traced, enabled)
    emitters = {
        name: EmitActivation(name, quantizer, wanted) for name, quantizer in enabled.items()
    }
    # Before the layers are replaced, whose parameters it copies.
    _keep_what_is_read(traced, {str(call.node.target) for call in layer_calls})
    # Layers know their quantizers as objects, and not by name.
    by_quantizer = {quantizer: emitters[name] for name, quantizer in enabled.items()}
    bits = _emit_layers(traced, layer_calls, by_quantizer, wanted)
    for name, emitter in emitters.items():
        traced.add_submodule(name, emitter)
    _repeat_quantizers(traced, repetitions)
    _call_functions(traced)
    traced.recompile()
    calls: dict[str, list[str | None]] = {name: [] for name in enabled}
    for node in traced.graph.nodes:
        if node.target in calls:
            calls[node.target].append(quantized_nodes.get(node))
    return Emitted(bits, calls)


def _check_int8_symmetric(enabled: Quantizers) -> None:
    """Refuses quantizers of any other kind."""
    for name, quantizer in enabled.items():
        scheme = quantizer.scheme
        if (scheme.bits, scheme.signed, scheme.symmetric) == (8, True, True):
            continue
        sign = "signed" if scheme.signed else "unsigned"
        kind = "symmetric" if scheme.symmetric else "affine"
        raise QatTricksError(
            f'"{name}" is {sign} {kind} with {scheme.bits} bits, and TensorRT only takes int8 '
            "activations with zero point 0: quantize with activations=signed_symmetric and "
            "activation_bits=8"
        )


def _layer_calls(traced: fx.GraphModule) -> list[_LayerCall]:
    """The calls of quantized layers, in order."""
    calls = []
    for node in traced.graph.nodes:
        layer = module_of(node, traced)
        if isinstance(layer, Layer) and layer.is_quantizing:
            calls.append(_LayerCall(node, layer, input_grid_of(node, traced)))
    return calls


def _put_relus_first(traced: fx.GraphModule, enabled: Quantizers) -> None:
    """Puts the ReLU that a quantizer stands in for before it.

    The cap of a ReLU6 needs no operator: the integers end there.
    """
    for node in traced.graph.nodes:
        if node.target in enabled and enabled[node.target].activation is not None:
            with traced.graph.inserting_before(node):
                node.args = (traced.graph.call_function(F.relu, node.args),)


def _emit_layers(
    traced: fx.GraphModule,
    layer_calls: list[_LayerCall],
    emitters: Mapping[ActivationQuantizer, EmitActivation],
    layout: Layout,
) -> dict[str, int]:
    """Puts an ``EmitLayer`` in the place of each layer, and returns the bits of their weights."""
    bits: dict[str, int] = {}
    # A layer called on two grids has two biases, and becomes two modules.
    names: dict[tuple[Layer, ActivationQuantizer | None], str] = {}
    for node, layer, quantizer in layer_calls:
        if (layer, quantizer) not in names:
            assert layer.weight_quantizer is not None
            name = str(node.target)
            if f"{name}.{WEIGHT}" in bits:
                name = f"{name}.on.{node.name}"
            emitter = None if quantizer is None else emitters.get(quantizer)
            traced.add_submodule(name, EmitLayer(layer, emitter, layout))
            bits[f"{name}.{WEIGHT}"] = layer.weight_quantizer.scheme.bits
            names[layer, quantizer] = name
        node.target = names[layer, quantizer]
        # The argument ``call`` chose the grids, which the new module has built in.
        node.args, node.kwargs = (node.all_input_nodes[0],), {}
    return bits


def _repeat_quantizers(traced: fx.GraphModule, repetitions: list[tuple[fx.Node, str]]) -> None:
    """Calls each quantizer again behind a node whose values are on its grid."""
    for node, grid in repetitions:
        with traced.graph.inserting_after(node):
            call = traced.graph.call_module(grid, (node,))

        def is_other(user: fx.Node, call: fx.Node = call) -> bool:
            return user is not call

        node.replace_all_uses_with(call, delete_user_cb=is_other)  # the call itself reads on


def _call_functions(traced: fx.GraphModule) -> None:
    """Turns modules that simulate integer operations back into float functions.

    A runtime fuses these itself.
    """
    for node in traced.graph.nodes:
        module = module_of(node, traced)
        if isinstance(module, Elementwise):
            node.op, node.target = "call_function", module.function
        elif isinstance(module, Mean):
            node.op, node.target = "call_function", torch.mean
            node.args, node.kwargs = (*node.args, module.dims), {"keepdim": module.keepdim}


def _keep_what_is_read(traced: fx.GraphModule, layers: set[str]) -> None:
    """Copies the parameters of ``layers`` that the network also reads itself.

    The layers' own become integers; the network may read even the dtype only.
    """
    for node in traced.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in layers:
            value = getattr(traced.get_submodule(owner), name)
            node.target = f"{node.name}_as_read"
            traced.register_buffer(node.target, value.detach())


def _enabled(traced: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    """The quantizers in use."""
    return {
        name: quantizer
        for name, quantizer in activation_quantizers(traced).items()
        if quantizer.enabled
    }


def _grid_to_repeat(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer to call again behind ``node``, because its values are on that grid, or None."""
    operation = n.operation_of(node, traced)
    # A quantizer takes a tensor, and not a tuple of them.
    if operation.yields_parts or not (n.is_passthrough(node, traced) or operation.concatenates):
        return None
    # Before the output or a folded pad, a quantizer would be of no use.
    if all(user.op == "output" or _is_folded_pad(node, user, traced) for user in node.users):
        return None
    return grid_of(node, traced, accepts=lambda quantizer: quantizer.enabled)


def _is_folded_pad(node: fx.Node, user: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` pads for the conv ``user``, which will do it (see ``deploy.passes``)."""
    conv = module_of(user, traced)
    can_pad = isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros"
    return can_pad and n.pads_with_zeros(node, traced)
