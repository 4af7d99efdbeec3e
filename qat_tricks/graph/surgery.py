"""Changes to a traced network's graph, and ``rebuild``, which repeats those that a spec records."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.channel_removal import missing_tensors, resize
from qat_tricks.graph.fingerprint import CODE, has_changed
from qat_tricks.graph.functional import call_instead, install
from qat_tricks.graph.gates import gate_of, split_gates
from qat_tricks.graph.grids import grid_of, input_grid_of, output_grid_of
from qat_tricks.graph.in_place import leave_input, works_in_place
from qat_tricks.graph.integer_ops import Kernel, Mean
from qat_tricks.graph.layers import OWN_BATCHNORMS, Folded, Layer, as_layer, layers
from qat_tricks.graph.spec import KERNELS, QUANTIZERS, spec_of
from qat_tricks.graph.stand_in import BatchNormStandIn
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.trace import replace_with_module, trace
from qat_tricks.graph.traceable import TraceSettings
from qat_tricks.numerics import ActivationQuantizer, Scheme, WeightQuantizer

# The quantizers before and behind one call of a layer, None where there is none.
Grids = tuple[ActivationQuantizer | None, ActivationQuantizer | None]


def rebuild(network: nn.Module, spec: dict[str, Any]) -> fx.GraphModule:
    """Gives a float ``network`` the structure that ``spec`` describes.

    Args:
        network: the float network, built as it was for training; its values do not matter.
        spec: as a checkpoint holds it.

    Returns:
        The traced network, ready for ``load_state_dict(strict=True)``.

    Raises:
        QatTricksError: the spec is of another network.
    """
    # The spec becomes the network's own, and tricks add to it.
    spec = copy.deepcopy(spec)
    if "whole" in spec:  # the key of older checkpoints
        spec["untraced"] = spec.pop("whole")
    traced = trace(network, spec.get("untraced", ()), settings=TraceSettings.of_spec(spec))
    if has_changed(traced, spec.get(CODE)):
        warnings.warn(
            f"the code of {type(network).__name__} has changed since the checkpoint was written: "
            "what is loaded may compute something else than what was saved",
            stacklevel=2,
        )
    traced.meta["qat_tricks"] = spec
    missing = _missing_names(traced, spec)
    if missing:
        raise QatTricksError(
            f"the checkpoint is of another network than {type(network).__name__}: it has no "
            f"{', '.join(missing[:3])}; build the network that was trained"
        )
    # In the order in which the tricks worked: each step finds the names that the last one left.
    resize(traced, spec.get("channels", {}).get("shapes", {}))
    folded = spec.get("folded", [])
    for layer, batchnorm in folded:
        note_folded(traced.get_submodule(layer), traced.get_submodule(batchnorm))
        give_bias(traced.get_submodule(layer), traced.get_submodule(batchnorm))
    for batchnorm in dict.fromkeys(batchnorm for _, batchnorm in folded):
        erase_batchnorm(traced, batchnorm, [layer for layer, of in folded if of == batchnorm])
    for batchnorm in spec.get("convs", []):
        batchnorm_to_conv(traced, batchnorm)
    for layer, batchnorm in spec.get("attached", []):
        attach_batchnorm(traced, layer, batchnorm)
    uncap(traced, spec.get("uncapped", []))
    for name, entry in spec.get("layers", {}).items():
        layer_module = as_layer(traced.get_submodule(name))
        if entry.get("mask"):
            layer_module.weight_mask = torch.ones_like(layer_module.weight)
        if "batchnorm" in entry:
            give_batchnorm(layer_module, **entry["batchnorm"])
        if entry.get("factors"):
            give_factors(layer_module)
    split_gates(traced, spec.get("gated", []))
    insert_quantizers(traced)
    return traced


def _missing_names(traced: fx.GraphModule, spec: Mapping[str, Any]) -> list[str]:
    """The nodes and submodules that ``spec`` names and ``traced`` does not have."""
    gated = spec.get("gated", [])
    nodes = {node.name for node in traced.graph.nodes} | set(map(gate_of, gated))
    modules = {name for name, _ in traced.named_modules()}
    activations = spec.get("activations", {}).values()
    quantized = [name for entry in activations for name in entry["nodes"]]
    quantized += [name for entry in activations for name in entry.get("readers", [])]
    pairs = [*spec.get("folded", []), *spec.get("attached", [])]
    submodules = [name for pair in pairs for name in pair]
    submodules += [*spec.get("convs", []), *spec.get("layers", {})]
    return [
        *(name for name in [*gated, *quantized] if name not in nodes),
        *(name for name in submodules if name not in modules),
        *missing_tensors(traced, spec.get("channels", {}).get("shapes", {})),
    ]


def give_bias(layer: nn.Module, batchnorm: Any = None) -> None:
    """Makes sure that a conv or linear has a bias, of zeros if it had none.

    What the user froze stays frozen: the bias trains if one of those that it stands for does, which
    are the layer's own and the BatchNorm's. Where neither has one, it follows the layer's weight.
    The weight itself goes on as it is, also where only the BatchNorm was trained: its factor is
    folded in and trains no more, for a frozen weight that moved would be the greater surprise.

    Args:
        layer: a conv or linear.
        batchnorm: that is folded into it.
    """
    assert isinstance(layer.weight, torch.Tensor)
    of_batchnorm = getattr(batchnorm, "bias", None)
    biases = [bias for bias in (layer.bias, of_batchnorm) if isinstance(bias, torch.Tensor)]
    trains = any(value.requires_grad for value in biases or [layer.weight])
    if layer.bias is None:
        layer.bias = nn.Parameter(
            torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
        )
    assert isinstance(layer.bias, torch.Tensor)
    layer.bias.requires_grad_(trains)


def note_folded(
    layer: nn.Module, batchnorm: Any, *, norms: torch.Tensor | None = None, is_frozen: bool = False
) -> None:
    """Notes on a conv or linear what ``restore_batchnorm`` asks of the BatchNorm folded into it.

    Args:
        layer: a conv or linear.
        batchnorm: that is about to be folded into it.
        norms: see ``Folded``.
        is_frozen: see ``Folded``.
    """
    layer.folded = Folded(  # type: ignore[assignment]
        eps=batchnorm.eps,
        momentum=batchnorm.momentum,
        # One without factors has nothing to train.
        weight_trains=batchnorm.weight is not None and batchnorm.weight.requires_grad,
        bias_trains=batchnorm.bias is not None and batchnorm.bias.requires_grad,
        is_frozen=is_frozen,
        norms=norms,
        module=batchnorm if _can_be_given_back(layer, batchnorm) else None,
    )


def _can_be_given_back(layer: nn.Module, batchnorm: Any) -> bool:
    """Whether a BatchNorm can be the own one of ``layer``, with a gain and bias to set."""
    is_plain = type(batchnorm) in OWN_BATCHNORMS
    assert isinstance(layer.weight, torch.Tensor)
    return is_plain and batchnorm.affine and batchnorm.num_features == layer.weight.shape[0]


_BATCHNORM_OF: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def give_batchnorm(layer: Layer, *, eps: float, momentum: float | None) -> Any:
    """Gives ``layer`` a BatchNorm of its own, in the place of its bias; the caller sets its values.

    It is the user's, where that was folded into the layer. What the user froze stays frozen.
    """
    norm: Any = None if layer.folded is None else layer.folded.module
    if norm is None:
        kind = next(of for base, of in _BATCHNORM_OF.items() if isinstance(layer, base))
        norm = kind(layer.weight.shape[0], eps=eps, momentum=momentum)
        trains = layer.weight.requires_grad
        norm.weight.requires_grad_(trains if layer.folded is None else layer.folded.weight_trains)
        norm.bias.requires_grad_(trains if layer.folded is None else layer.folded.bias_trains)
    norm.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    layer.batchnorm, layer.bias = norm, None
    return norm


def attach_batchnorm(traced: fx.GraphModule, layer: str, batchnorm: str) -> None:
    """Makes a BatchNorm of the graph the own one of the layer before it; the caller recompiles."""
    own = traced.get_submodule(batchnorm)
    erase_batchnorm(traced, batchnorm, [layer])
    as_layer(traced.get_submodule(layer)).batchnorm = own


def _trains_otherwise(layer: Layer) -> bool:
    """Whether a layer trains other parameters than it is deployed with."""
    own = (layer.batchnorm, layer.weight_factor, layer.output_factor)
    return any(part is not None for part in own)


def give_factors(layer: Layer) -> None:
    """Gives ``layer`` factors of one for its parameters; the caller sets their values."""
    weight = layer.weight
    # The positions of a kernel share their channels' factor.
    layer.weight_factor = weight.new_ones(*weight.shape[:2], *[1] * (weight.dim() - 2))
    layer.output_factor = weight.new_ones(weight.shape[0])


def fold_restored_batchnorms(traced: fx.GraphModule) -> None:
    """Takes back what ``restore_batchnorm`` gave to layers; BatchNorms that were kept stay."""
    kept = [batchnorm for _, batchnorm in spec_of(traced).get("attached", [])]
    fold_own_batchnorms(traced, kept)


def fold_own_batchnorms(traced: fx.GraphModule, skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Folds the BatchNorms, and factors, that layers of ``traced`` have of their own, for good.

    Args:
        traced: the network, changed in place.
        skip: names of attached BatchNorms that stay.

    Returns:
        The pairs ``(layer, batchnorm)`` of those that were attached.
    """
    spec = spec_of(traced)
    attached = [(layer, batchnorm) for layer, batchnorm in spec.get("attached", [])]
    stay = {layer for layer, batchnorm in attached if batchnorm in skip}
    for name, layer in layers(traced).items():
        if name in stay:
            layer.take_in_factors()
        elif _trains_otherwise(layer):
            layer.make_deployed()
            spec.get("layers", {}).get(name, {}).pop("batchnorm", None)
        spec.get("layers", {}).get(name, {}).pop("factors", None)
    if attached:
        spec["attached"] = [list(pair) for pair in attached if pair[0] in stay]
    pairs = [pair for pair in attached if pair[0] not in stay]
    if pairs:
        spec.setdefault("folded", []).extend([list(pair) for pair in pairs])
    return pairs


def erase_batchnorm(traced: fx.GraphModule, batchnorm: str, layers: Sequence[str] = ()) -> None:
    """Takes a BatchNorm out of the graph; the caller folds its values and recompiles.

    Something that passes values on has its place among the parts, so that the others keep theirs.

    Args:
        traced: the network, changed in place.
        batchnorm: name of the BatchNorm.
        layers: names of the layers that take it in.
    """
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target == batchnorm:
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)
    # timm's BatchNorms hold the activation that follows: it stays, under its own name.
    parts = dict(traced.get_submodule(batchnorm).named_children())
    place: nn.Module = nn.Identity()
    if len(layers) == 1:
        place = BatchNormStandIn(traced.get_submodule(layers[0]))
    traced.add_submodule(batchnorm, place.train(traced.training))
    for name, part in parts.items():
        traced.add_submodule(f"{batchnorm}.{name}", part)


def batchnorm_to_conv(traced: fx.GraphModule, name: str) -> nn.Conv2d:
    """Puts a depthwise conv, with one weight for each channel, in the place of a BatchNorm.

    The conv takes the BatchNorm's parameters over; the caller sets their values.
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
    is_frozen = traced.training and not batchnorm.training
    note_folded(conv, batchnorm, norms=torch.ones_like(of_statistics), is_frozen=is_frozen)
    assert isinstance(conv.folded, Folded)
    conv.folded = replace(conv.folded, module=None)
    if batchnorm.affine:
        # An optimizer that holds the BatchNorm's parameters goes on training the conv's.
        batchnorm.weight.data = batchnorm.weight.data.view(conv.weight.shape)
        conv.weight, conv.bias = batchnorm.weight, batchnorm.bias
    else:
        conv.requires_grad_(False)
    install(traced, name, conv.train(batchnorm.training))
    return conv


def uncap(traced: fx.GraphModule, names: Sequence[str]) -> None:
    """Replaces the ReLU6 nodes of these names by ReLU; the nodes keep their names."""
    for node in list(traced.graph.nodes):
        if node.name in names:
            # The node is changed, not replaced: a spec finds it by its name.
            traced.add_submodule(f"relus.{node.name}", nn.ReLU())
            call_instead(node, f"relus.{node.name}", node.all_input_nodes[0])
    traced.recompile()


def insert_quantizers(traced: fx.GraphModule) -> None:
    """Inserts the quantizers that the spec of ``traced`` describes."""
    spec = spec_of(traced)
    by_name = {node.name: node for node in traced.graph.nodes}
    # Without parameters there is no device to follow, and the CPU will do.
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    for name, entry in spec.get("activations", {}).items():
        _insert_activation_quantizer(traced, name, entry, by_name, device)
    for name, entry in spec.get("layers", {}).items():
        if "weight" in entry:
            layer = traced.get_submodule(name)
            assert isinstance(layer, Layer)
            quantizer = WeightQuantizer(Scheme(**entry["weight"]), channel_axis=layer.channel_axis)
            layer.weight_quantizer = quantizer.to(device)
            if entry.get("scale"):
                # A parameter must exist before a state dict can fill it.
                scale = layer.weight_quantizer.own_scale(layer.weight)
                scale.requires_grad_(entry.get("learned", False))
    _connect(traced)


def _insert_activation_quantizer(
    traced: fx.GraphModule,
    name: str,
    entry: Mapping[str, Any],
    by_name: Mapping[str, fx.Node],
    device: torch.device,
) -> None:
    """Adds one quantizer and calls it behind, or in the place of, each of its nodes.

    One with readers is called in front of these only, and so behind the quantizer that is there
    already.
    """
    quantizer = ActivationQuantizer(Scheme(**entry["scheme"]), activation=entry["activation"])
    quantizer.to(device).scale.requires_grad_(entry.get("learned", False))
    if entry.get("low"):
        quantizer.own_low().requires_grad_(entry.get("learned", False))
    target = f"{QUANTIZERS}.{name}"
    traced.add_submodule(target, quantizer)
    if "readers" in entry:
        readers = [by_name[reader] for reader in entry["readers"]]
        for node in dict.fromkeys(reader.all_input_nodes[0] for reader in readers):
            _call_behind(traced, node, target, [r for r in readers if node in r.all_input_nodes])
        return
    for node in map(by_name.__getitem__, entry["nodes"]):
        if entry["activation"] is not None:
            # The node is the activation function that the quantizer stands in for.
            replace_with_module(traced, node, target, quantizer, node.all_input_nodes[:1])
        else:
            _call_behind(traced, node, target)


def share_quantizer(traced: fx.GraphModule, names: Sequence[str]) -> None:
    """Lets the tensors of several quantizers share the first.

    Args:
        traced: a network with quantizers.
        names: of ``activations`` in the spec; the first of them stays.
    """
    shared, *others = (f"{QUANTIZERS}.{name}" for name in names)
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target in others:
            node.target = shared
    entries = spec_of(traced)["activations"]
    for name in names[1:]:
        entries[names[0]]["nodes"] += entries.pop(name)["nodes"]
        traced.delete_submodule(f"{QUANTIZERS}.{name}")
    _connect(traced)


def _connect(traced: fx.GraphModule) -> None:
    """Tells layers, adds, products and means which quantizers stand before and behind them.

    A layer learns it for each of its calls. An add, product or mean of tensors that are all on a
    grid becomes a module that computes as the integer kernel does.
    """
    grids_of_calls: dict[Layer, list[Grids]] = {}
    for node in traced.graph.nodes:
        layer = n.module_of(node, traced)
        if isinstance(layer, Layer) and layer.weight_quantizer is not None:
            calls = grids_of_calls.setdefault(layer, [])
            if calls:  # the first call is the default
                node.kwargs = {**node.kwargs, "call": len(calls)}
            calls.append((input_grid_of(node, traced), output_grid_of(node, traced)))
        elif kernel := _kernel_for(node, traced):
            traced.add_submodule(f"{KERNELS}.{node.name}", kernel)
            if isinstance(kernel, Mean):
                call_instead(node, f"{KERNELS}.{node.name}", node.all_input_nodes[0])
            else:
                node.op, node.target = "call_module", f"{KERNELS}.{node.name}"
        if isinstance(module_of(node, traced), ActivationQuantizer):
            _keep_values(node, traced)
    for layer, calls in grids_of_calls.items():
        layer.calls = tuple(calls)
        before_any = [before for before, _ in calls if before is not None]
        layer.input_quantizer = tuple(dict.fromkeys(before_any))
    traced.recompile()


def _keep_values(quantizer: fx.Node, traced: fx.GraphModule) -> None:
    """Lets functions behind a quantizer leave its values as they are: its gradient needs them."""
    for user in list(quantizer.users):
        if works_in_place(user, traced):
            leave_input(user, traced)


def _kernel_for(node: fx.Node, traced: fx.GraphModule) -> Kernel | None:
    """The integer kernel for ``node`` if it has one and all its tensors are on a grid."""
    after = output_grid_of(node, traced)
    if after is None:
        return None
    if elementwise := n.elementwise_of(node, traced):
        before = [grid_of(operand, traced) for operand in node.args]  # type: ignore[arg-type]
        # An operand in float leaves the whole operation to float.
        operands = [grid for grid in before if grid is not None]
        return elementwise(*operands, after) if len(operands) == 2 else None
    if mean := n.mean_of(node, traced):
        grid = input_grid_of(node, traced)
        return None if grid is None else Mean(*mean, grid, after)
    return None


def _call_behind(
    traced: fx.GraphModule, node: fx.Node, module: str, readers: Sequence[fx.Node] | None = None
) -> None:
    """Lets readers of ``node``, by default all, read the output of ``module`` for it.

    The caller recompiles.
    """
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(module, (node,))
    for reader in list(node.users) if readers is None else readers:
        if reader is not call:  # it goes on reading the node itself
            reader.replace_input_with(node, call)
