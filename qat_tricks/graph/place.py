"""Places quantizers where an integer kernel has them, and nowhere else.

They go on the network's inputs, on the output of each conv and linear (after its BatchNorm and
ReLU), of residual adds, products and average pools, and on whatever else feeds a conv or linear.
Where layers take a tensor with fewer than 8 bits and others read it too, as in a residual stream,
the layers have a second, coarser quantizer behind the one for all. Inputs of a concat share one
quantizer, unless only some of them come from a ReLU. Operations that only move values need none.
Values that depend on no image stay as they are: a runtime computes them once. The last linear's
output stays float: the integer kernel hands out float logits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.foldable import folds_into
from qat_tricks.graph.gates import gated_functions, split_gates
from qat_tricks.graph.in_place import works_in_place
from qat_tricks.graph.layers import as_layer
from qat_tricks.graph.patterns import check_patterns, matches
from qat_tricks.graph.quantize_settings import QuantizeSettings, settings_with
from qat_tricks.graph.spec import NARROW, spec_of
from qat_tricks.graph.surgery import insert_quantizers
from qat_tricks.numerics.scheme import MAX_BITS, Scheme, activation_scheme, weight_scheme


@dataclass(frozen=True, kw_only=True)
class _LayerBits:
    """The bits of one layer."""

    weight: int
    input: int  # of the tensor that the layer takes


@dataclass(eq=False)
class _Group:
    """Tensors that share one quantizer."""

    nodes: set[fx.Node]  # that make them
    # The bits that each call of a layer asks for of the tensor that it reads.
    layers: dict[fx.Node, int] = field(default_factory=dict)
    has_others: bool = False  # whether anything but these layers reads the values


def place_quantizers(
    traced: fx.GraphModule, settings: QuantizeSettings | None = None, **changes: Any
) -> fx.GraphModule:
    """Inserts quantizers into ``traced`` and records them in its spec.

    Args:
        traced: a traced network without quantizers.
        settings: by default those of ``QuantizeSettings``.
        changes: fields of ``QuantizeSettings`` to change in ``settings``, as ``weight_bits=4``.

    Raises:
        QatTricksError: settings that are not allowed, a pattern that matches no layer, or nothing
            is left to quantize.
    """
    settings = settings_with(settings, changes)
    from_images = n.nodes_from_images(traced)
    layer_bits = _bits_of_layers(traced, settings, from_images)
    groups = _tensors_to_quantize(traced, layer_bits, from_images)

    # Surgery reads the spec, here and when a checkpoint is rebuilt.
    spec = spec_of(traced)
    quantized = {node for group in groups for node in group.nodes}
    gated = gated_functions(traced, quantized) if settings.splits_gates else []
    if gated:
        spec["gated"] = gated
        split_gates(traced, gated)
        groups = _tensors_to_quantize(traced, layer_bits, n.nodes_from_images(traced))
    spec["layers"] = {**spec.get("layers", {})}
    for name, bits in layer_bits.items():
        spec["layers"].setdefault(name, {})["weight"] = weight_scheme(bits.weight).as_dict()
        as_layer(traced.get_submodule(name))
    scheme = activation_scheme(settings.activation_bits, settings.activations)
    spec["activations"] = _describe(traced, groups, scheme)
    insert_quantizers(traced)
    return traced


def _bits_of_layers(
    traced: fx.GraphModule, settings: QuantizeSettings, from_images: Collection[fx.Node]
) -> dict[str, _LayerBits]:
    """The layers to quantize by name, in the order of the graph."""
    names = list(
        dict.fromkeys(
            str(node.target)
            for node in traced.graph.nodes
            if node in from_images and n.calls_layer(node, traced)
        )
    )
    check_patterns([*settings.include, *settings.exclude, *settings.overrides], names)
    # A conv or linear by itself is one call, traced through or not.
    untraced = spec_of(traced).get("untraced", ())
    included = [
        name
        for name in names
        if matches(name, settings.include) and not matches(name, [*settings.exclude, *untraced])
    ]
    if not included:
        raise QatTricksError(
            "no conv or linear layer is left to quantize: widen include or narrow exclude"
        )
    # Coarse steps harm the first and the last layer most, and those are few.
    ends = (
        {*_first_layers(traced), *_last_layers(traced, from_images)}
        if settings.first_last_bits is not None
        else set()
    )
    # BatchNorms that became convs multiply each value once: fewer bits would save nothing, and
    # round the tensor a second time before the conv that reads it.
    factors = set(spec_of(traced).get("convs", ()))
    layer_bits = {}
    for name in included:
        weight, input_ = settings.weight_bits, settings.activation_bits
        if name in ends and settings.first_last_bits is not None:
            weight = input_ = settings.first_last_bits
        if name in factors:
            weight = input_ = MAX_BITS
        # Of several patterns that match, the last that sets a number counts.
        for pattern, changes in settings.overrides.items():
            if fnmatchcase(name, pattern):
                weight = changes.get("weight_bits", weight)
                input_ = changes.get("activation_bits", input_)
        layer_bits[name] = _LayerBits(weight=weight, input=input_)
    return layer_bits


def _first_layers(traced: fx.GraphModule) -> Iterator[str]:
    """The first layer that each input reaches."""
    for placeholder in traced.graph.find_nodes(op="placeholder"):
        reached = {placeholder}
        for node in traced.graph.nodes:
            if reached.isdisjoint(node.all_input_nodes):
                continue
            if n.calls_layer(node, traced):
                yield str(node.target)
                break
            reached.add(node)


def _last_layers(traced: fx.GraphModule, from_images: Collection[fx.Node]) -> Iterator[str]:
    """The last layer before each output: of two heads, both."""
    (output,) = traced.graph.find_nodes(op="output")
    for leaf in output.all_input_nodes:
        behind = {leaf}
        for node in reversed(traced.graph.nodes):
            if node not in behind or node not in from_images:
                continue
            if n.calls_layer(node, traced):
                yield str(node.target)
                break
            behind.update(node.all_input_nodes)


def _tensors_to_quantize(
    traced: fx.GraphModule,
    layer_bits: Mapping[str, _LayerBits],
    from_images: Set[fx.Node],
) -> list[_Group]:
    """The tensors that integer kernels take and make, in groups that share a quantizer."""
    # Decided first, because a mixed concat ends the search for the sources of a value.
    mixed = {
        node for node in traced.graph.nodes if n.is_cat(node, traced) and _is_mixed(node, traced)
    }
    uses = n.uses_of_weights(traced)
    group_of: dict[fx.Node, _Group] = {}

    def require(node: fx.Node) -> _Group:
        """Puts the values of ``node`` on one grid."""
        sources = _sources(node, traced, mixed)
        for source in sources:
            group_of.setdefault(source, _Group({source}))
        # A concat has several sources, and one kernel reads them all: they share a grid.
        for source in sources[1:]:
            _merge(group_of, sources[0], source)
        return group_of[sources[0]]

    for node in traced.graph.nodes:
        if node not in from_images:
            continue
        if n.calls_layer(node, traced) and node.target in layer_bits:
            read = require(node.all_input_nodes[0])
            read.layers[node] = layer_bits[str(node.target)].input
            # Without a quantizer behind it, a conv would be computed in float.
            if not _is_final_linear(node, traced):
                require(_with_activation(node, traced, uses))
        elif n.is_integer_op(node, traced) or node in mixed:
            for operand in node.all_input_nodes:
                # A parameter is not rounded: a runtime stores it as it is.
                if n.is_tensor(operand) and operand.op != "get_attr":
                    require(operand)
            require(_with_activation(node, traced, uses))
    groups = list(dict.fromkeys(group_of.values()))
    for group in groups:
        readers = _readers(group.nodes, traced, mixed)
        # What is computed in training only is never deployed.
        group.has_others = not readers & from_images <= group.layers.keys()
    return groups


def _readers(
    nodes: Collection[fx.Node], traced: fx.GraphModule, apart: Collection[fx.Node]
) -> set[fx.Node]:
    """Whatever reads the values of ``nodes``, also behind operations that only move them.

    Concats in ``apart`` have a grid of their own, and so read them.
    """
    readers, moved, left = set[fx.Node](), set(nodes), list(nodes)
    while left:
        for user in left.pop().users:
            joins = n.is_cat(user, traced) and user not in apart
            if joins or n.is_passthrough(user, traced):
                # Paths that part and meet again are walked once.
                left += {user} - moved
                moved.add(user)
            elif n.is_tensor(user):  # others only ask for a size
                readers.add(user)
    return readers


def _merge(group_of: dict[fx.Node, _Group], node: fx.Node, other: fx.Node) -> None:
    """Makes one group of those of two tensors."""
    group, absorbed = group_of[node], group_of[other]
    if group is absorbed:
        return
    group.nodes |= absorbed.nodes
    group.layers |= absorbed.layers
    for member in absorbed.nodes:
        group_of[member] = group


def _sources(
    node: fx.Node, traced: fx.GraphModule, apart: Collection[fx.Node] = ()
) -> list[fx.Node]:
    """The nodes that make the values of ``node``, before operations that only move values.

    Concats in ``apart`` have a grid of their own.
    """
    if n.is_cat(node, traced) and node not in apart:
        return list(
            dict.fromkeys(s for part in node.all_input_nodes for s in _sources(part, traced, apart))
        )
    if n.is_passthrough(node, traced):
        return _sources(node.all_input_nodes[0], traced, apart)
    return [node]


def _is_mixed(cat: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``cat`` joins tensors behind a ReLU with others.

    One grid for all could not stand in for the ReLU, and the conv before it would be left without
    an integer kernel. So each has a grid of its own, and the concat brings them onto another.
    """
    return len({_absorbable(source, traced) for source in _sources(cat, traced)}) > 1


def _with_activation(node: fx.Node, traced: fx.GraphModule, uses: n.Uses) -> fx.Node:
    """The node to quantize for the output of ``node``.

    It is the BatchNorm, ReLU or ReLU6 behind ``node`` where nothing else reads ``node``.
    """

    def folds_directly(user: fx.Node) -> bool:
        return user.all_input_nodes == [node] and folds_into(user, traced, uses) == [node]

    after = n.only_user(node, folds_directly) or node
    last = after
    # Dropout between the two is gone once deployed.
    while dropout := n.only_user(last, lambda user: n.is_dropout(user, traced)):
        last = dropout
    return n.only_user(last, lambda user: n.activation_of(user, traced) is not None) or after


def _is_final_linear(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` is a linear whose output is the network's.

    Integer kernels hand that out in float.
    """
    if not hasattr(traced.get_submodule(str(node.target)), "in_features"):
        return False
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "output":
            return True
        if not n.is_passthrough(node, traced):
            return False
    return False


def _describe(traced: fx.GraphModule, groups: Sequence[_Group], default: Scheme) -> dict[str, Any]:
    """The quantizers as plain data: ``{name: {"scheme", "activation", "nodes", "readers"?}}``.

    They stand in the order of the graph, and each is called after its first node.
    """
    position = {node: index for index, node in enumerate(traced.graph.nodes)}
    members_of = {group: sorted(group.nodes, key=position.__getitem__) for group in groups}
    names = {node.name for node in position}
    described: dict[str, Any] = {}

    def describe(
        name: str, bits: int, activation: str | None, nodes: Collection[fx.Node]
    ) -> dict[str, Any]:
        # Such as "to": an attribute of every module.
        name = f"{name}_" if hasattr(nn.Module, name) or name == "training" else name
        described[name] = {
            "scheme": replace(default, bits=bits).as_dict(),
            "activation": activation,
            "nodes": [node.name for node in nodes],
        }
        return described[name]

    for group in sorted(groups, key=lambda group: position[members_of[group][0]]):
        members = members_of[group]
        activations = {_absorbable(node, traced) for node in members}
        # One grid for several tensors stands in for their ReLU only if each of them has it.
        activation = activations.pop() if len(activations) == 1 else None
        # Of several layers that read a tensor, the one that asks for the most bits decides. What
        # no layer multiplies, such as one side of a residual add, saves nothing by fewer bits:
        # they would only add noise to the stream, block after block.
        bits = max(group.layers.values(), default=MAX_BITS)
        is_narrowed = group.has_others and bits < MAX_BITS
        describe(members[0].name, MAX_BITS if is_narrowed else bits, activation, members)
        if is_narrowed:
            # So the layers have a grid of their own, behind the one that all read.
            read = {reader.all_input_nodes[0] for reader in group.layers}
            name = f"{members[0].name}{NARROW}"
            while name in names:  # a node of the network may be called so
                name += "_"
            narrow = describe(name, bits, None, sorted(read, key=position.__getitem__))
            narrow["readers"] = [reader.name for reader in group.layers]
    return described


def _absorbable(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """The activation function that a quantizer on ``node`` can stand in for."""
    activation = n.activation_of(node, traced)
    if activation is None:
        return None
    # Others that read the input of an in-place ReLU read its result: then the ReLU has to stay.
    is_read_once = len(node.all_input_nodes[0].users) == 1
    return activation if is_read_once or not works_in_place(node, traced) else None
