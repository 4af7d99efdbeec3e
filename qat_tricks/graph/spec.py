"""The spec: what was done to a network, as plain data that travels in its checkpoint, and the way
back from it.

::

    whole        [pattern, ...]                submodules that were not traced through
    folded       [[layer, batchnorm], ...]     BatchNorms folded into the layer, or concatenated layers, before them
    convs        [batchnorm, ...]              BatchNorms that became depthwise convs
    uncapped     [node, ...]                   ReLU6 that became ReLU for equalization
    layers       {name: {"weight": scheme, "scale": bool, "mask": bool}}
    activations  {name: {"scheme": scheme, "activation": "relu" | "relu6" | None, "nodes": [node, ...], "learned": bool}}
    applied      [trick, ...]                  tricks done in the current stage
    history      [trick, ...]                  tricks done in all stages

``node`` is a node's name in the traced graph, ``layer`` and ``name`` in ``layers`` a submodule's.
Values (weights, scales, zero points, masks) are in the state dict, under the keys that ``rebuild``
recreates.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.functional import install
from qat_tricks.graph.integer_ops import Mean
from qat_tricks.graph.layers import Layer, as_layer
from qat_tricks.graph.trace import replace_with_module, trace
from qat_tricks.numerics import ActivationQuantizer, Scheme, WeightQuantizer

QUANTIZERS, KERNELS = "activation_quantizers", "kernels"


def spec_of(traced: fx.GraphModule) -> dict[str, Any]:
    """The spec of a network traced by us, to read and to add to."""
    if "qat_tricks" not in traced.meta:
        raise QatTricksError(
            "this network was not traced by qat_tricks: call qat_tricks.graph.trace(network) first"
        )
    return traced.meta["qat_tricks"]


def rebuild(network: nn.Module, spec: dict[str, Any]) -> fx.GraphModule:
    """Gives a float ``network`` the structure that ``spec`` describes, ready for
    ``load_state_dict(strict=True)``.

    Raises:
        QatTricksError: the spec is of another network.
    """
    traced = trace(network, spec.get("whole", ()))
    traced.meta["qat_tricks"] = copy.deepcopy(spec)
    names = {node.name for node in traced.graph.nodes}
    modules = dict(traced.named_modules())
    wanted = [name for entry in spec.get("activations", {}).values() for name in entry["nodes"]]
    missing = [name for name in wanted if name not in names]
    missing += [name for pair in spec.get("folded", []) for name in pair if name not in modules]
    missing += [name for name in spec.get("convs", []) if name not in modules]
    missing += [name for name in spec.get("layers", {}) if name not in modules]
    if missing:
        raise QatTricksError(
            f"the checkpoint is of another network than {type(network).__name__}: it has no "
            f"{', '.join(missing[:3])}; build the network that was trained"
        )
    for layer, _ in spec.get("folded", []):
        give_bias(traced.get_submodule(layer))
    for batchnorm in dict.fromkeys(batchnorm for _, batchnorm in spec.get("folded", [])):
        erase_batchnorm(traced, batchnorm)
    for batchnorm in spec.get("convs", []):
        batchnorm_to_conv(traced, batchnorm)
    uncap(traced, spec.get("uncapped", []))
    for name, entry in spec.get("layers", {}).items():
        layer_module = as_layer(traced.get_submodule(name))
        if entry.get("mask"):
            layer_module.weight_mask = torch.ones_like(layer_module.weight)
    insert_quantizers(traced)
    return traced


def give_bias(layer: nn.Module) -> None:
    """Makes sure that a conv or linear has a bias, of zeros if it had none."""
    assert isinstance(layer.weight, torch.Tensor)
    if layer.bias is None:
        layer.bias = nn.Parameter(
            torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
        )


def erase_batchnorm(traced: fx.GraphModule, batchnorm: str) -> None:
    """Takes a BatchNorm out of the graph, its values aside; the caller recompiles."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target == batchnorm:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    parts = dict(traced.get_submodule(batchnorm).named_children())
    traced.delete_submodule(batchnorm)
    for name, part in parts.items():  # an activation that it held
        traced.add_submodule(f"{batchnorm}.{name}", part)


def batchnorm_to_conv(traced: fx.GraphModule, name: str) -> nn.Conv2d:
    """Puts a depthwise conv of one weight a channel in the place of a BatchNorm, with its
    parameters; values are not set.
    """
    batchnorm: Any = traced.get_submodule(name)
    channels, of_statistics = batchnorm.num_features, batchnorm.running_var
    conv = nn.Conv2d(
        channels,
        channels,
        1,
        groups=channels,
        device=of_statistics.device,
        dtype=of_statistics.dtype,
    )
    if batchnorm.affine:
        # an optimizer keeps these very parameters
        batchnorm.weight.data = batchnorm.weight.data.view(conv.weight.shape)
        conv.weight, conv.bias = batchnorm.weight, batchnorm.bias
    conv.requires_grad_(batchnorm.affine and batchnorm.weight.requires_grad).train(
        batchnorm.training
    )
    install(traced, name, conv)
    return conv


def uncap(traced: fx.GraphModule, names: list[str]) -> None:
    """Replaces the ReLU6 nodes of these names by ReLU; the new nodes keep the names."""
    for node in list(traced.graph.nodes):
        if node.name in names:
            traced.add_submodule(f"relus.{node.name}", nn.ReLU())
            node.op, node.target = "call_module", f"relus.{node.name}"
            node.args, node.kwargs = (node.all_input_nodes[0],), {}
    traced.recompile()


def insert_quantizers(traced: fx.GraphModule) -> None:
    """Inserts the quantizers that the spec of ``traced`` describes."""
    spec = spec_of(traced)
    by_name = {node.name: node for node in traced.graph.nodes}
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    for name, entry in spec.get("activations", {}).items():
        quantizer = ActivationQuantizer(
            Scheme(**entry["scheme"]), activation=entry["activation"]
        ).to(device)
        quantizer.scale.requires_grad_(entry.get("learned", False))
        target = f"{QUANTIZERS}.{name}"
        traced.add_submodule(target, quantizer)
        for node_name in entry["nodes"]:
            node = by_name[node_name]
            if entry["activation"] is not None:
                replace_with_module(traced, node, target, quantizer, node.all_input_nodes[:1])
                continue
            with traced.graph.inserting_after(node):
                call = traced.graph.call_module(target, (node,))
            node.replace_all_uses_with(
                call, delete_user_cb=lambda user, call=call: user is not call
            )
    for name, entry in spec.get("layers", {}).items():
        if "weight" in entry:
            layer = traced.get_submodule(name)
            assert isinstance(layer, Layer)
            layer.weight_quantizer = WeightQuantizer(
                Scheme(**entry["weight"]), channel_axis=layer.channel_axis
            ).to(device)
            if entry.get("scale"):
                layer.weight_quantizer.own_scale(layer.weight).requires_grad_(
                    entry.get("learned", False)
                )
    _connect(traced)


def share_quantizer(traced: fx.GraphModule, names: Sequence[str]) -> None:
    """Puts one quantizer, the first of those called ``names`` (of ``activations`` in the spec), in
    the place of all.
    """
    kept, *gone = (f"{QUANTIZERS}.{name}" for name in names)
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target in gone:
            node.target = kept
    entries = spec_of(traced)["activations"]
    for name in names[1:]:
        entries[names[0]]["nodes"] += entries.pop(name)["nodes"]
        traced.delete_submodule(f"{QUANTIZERS}.{name}")
    _connect(traced)


def _connect(traced: fx.GraphModule) -> None:
    """Tells each layer, add, product and mean which quantizers its inputs and its output are on."""
    calls: dict[Layer, list[tuple[ActivationQuantizer | None, ActivationQuantizer | None]]] = {}
    for node in traced.graph.nodes:
        layer = n.module_of(node, traced)
        if isinstance(layer, Layer) and layer.weight_quantizer is not None:
            found = calls.setdefault(layer, [])
            if found:
                node.kwargs = {**node.kwargs, "call": len(found)}
            found.append((n.input_quantizer_of(node, traced), n.output_quantizer_of(node, traced)))
        elif kind := n.elementwise_of(node, traced):
            tensors = [n.quantizer_of(arg, traced) for arg in node.args]
            grids = [
                grid for grid in (*tensors, n.output_quantizer_of(node, traced)) if grid is not None
            ]
            if len(grids) == 3:
                name = f"{KERNELS}.{node.name}"
                traced.add_submodule(name, kind(*grids))
                node.op, node.target = "call_module", name
        elif mean := n.mean_of(node, traced):
            before, after = n.input_quantizer_of(node, traced), n.output_quantizer_of(node, traced)
            if before is not None and after is not None:
                name = f"{KERNELS}.{node.name}"
                traced.add_submodule(name, Mean(*mean, before, after))
                node.op, node.target, node.args, node.kwargs = (
                    "call_module",
                    name,
                    (node.all_input_nodes[0],),
                    {},
                )
    for layer, found in calls.items():
        layer.calls = tuple(found)
        layer.input_quantizer = tuple(
            dict.fromkeys(before for before, _ in found if before is not None)
        )
    traced.recompile()
