"""Spells out average pools in a form that ONNX has and its runtimes compute as PyTorch does.

ONNX's AveragePool has no divisor of one's own. And where ``ceil_mode`` lets a window reach beyond
the border, ONNX Runtime's integer kernel divides it by its whole size if it counts padding, where
PyTorch leaves out what lies beyond.
"""

import math
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_ARGUMENTS = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)
_DEFAULTS = {
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}


def spell_out_pools(traced: fx.GraphModule) -> None:
    """Rewrites the average pools of images that would run otherwise; the function stays the same.

    Args:
        traced: a network just traced; it is changed in place, the user's modules are not.
    """
    # Read before the first change: a module may be called several times.
    pools = {node: _arguments(node, traced) for node in traced.graph.nodes}
    for node, arguments in pools.items():
        if arguments is None:
            continue
        if arguments["divisor_override"] is not None:
            _spell_out_divisor(traced, node, arguments)
        elif arguments["ceil_mode"] and arguments["count_include_pad"]:
            _spell_out_padding(traced, node, arguments)
    traced.recompile()


def _spell_out_divisor(traced: fx.GraphModule, node: fx.Node, arguments: dict[str, Any]) -> None:
    """An average over whole windows, times a factor."""
    if arguments["ceil_mode"]:
        return  # windows at the border have fewer values, whose number is not known here
    _replace(traced, node, {**arguments, "count_include_pad": True})
    factor = math.prod(_pair(arguments["kernel_size"])) / arguments["divisor_override"]
    with traced.graph.inserting_after(node):
        product = traced.graph.call_function(torch.mul, (node, factor))
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def _spell_out_padding(traced: fx.GraphModule, node: fx.Node, arguments: dict[str, Any]) -> None:
    """A pad, and an average of what lies within the padded image."""
    sizes, padding = _pair(arguments["kernel_size"]), _pair(arguments["padding"])
    strides = _pair(arguments["stride"] or arguments["kernel_size"])
    # A window that begins behind the image is left out: not so where the padding is part of it.
    if any(p and p + s > k for p, s, k in zip(padding, strides, sizes, strict=True)):
        return
    if any(padding):
        rows, columns = padding
        image = node.all_input_nodes[0]
        with traced.graph.inserting_before(node):
            padded = traced.graph.call_function(F.pad, (image, (columns, columns, rows, rows)))
        node.replace_input_with(image, padded)
    _replace(traced, node, {**arguments, "padding": 0, "count_include_pad": False})


def _arguments(node: fx.Node, traced: fx.GraphModule) -> dict[str, Any] | None:
    """The arguments of an average pool of images by name; None of other nodes."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if type(module) is not nn.AvgPool2d:
            return None
        return {name: getattr(module, name) for name in _ARGUMENTS}
    if node.op != "call_function" or node.target is not F.avg_pool2d:
        return None
    given = dict(zip(_ARGUMENTS, node.args[1:], strict=False))
    return {**_DEFAULTS, **given, **{k: v for k, v in node.kwargs.items() if k in _ARGUMENTS}}


def _replace(traced: fx.GraphModule, node: fx.Node, arguments: dict[str, Any]) -> None:
    """Gives the pool that ``node`` calls other arguments, and no divisor."""
    arguments = {name: arguments[name] for name in _ARGUMENTS if name != "divisor_override"}
    if node.op == "call_module":
        traced.add_submodule(str(node.target), nn.AvgPool2d(**arguments))
    else:
        node.args, node.kwargs = (node.all_input_nodes[0],), arguments


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
