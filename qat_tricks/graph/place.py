"""Where quantizers go: where an integer kernel has them, and nowhere else.

On the network's inputs, on the output of each conv and linear (after its BatchNorm and ReLU), of
residual adds, products and average pools, and on whatever else feeds a conv or linear. Inputs of a
concat share one quantizer, unless only some of them come from a ReLU. Operations that only move
values need none, and what depends on no image is left alone: a runtime works it out once. The last
linear's output stays float: the integer kernel hands out float logits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph import nodes as n
from qat_tricks.graph.layers import as_layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import insert_quantizers
from qat_tricks.numerics.scheme import Scheme, activation_scheme, weight_scheme

_OVERRIDES = ("weight_bits", "activation_bits")


@dataclass
class _Point:
    """A tensor that gets a quantizer: the node that makes it, and the bits its consumers ask for."""

    node: fx.Node
    bits: list[int] = field(default_factory=list)


def place_quantizers(
    traced: fx.GraphModule,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    first_last_bits: int | None = 8,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    activations: str | None = None,
) -> fx.GraphModule:
    """Inserts quantizers into ``traced`` and records them in its spec.

    Args:
        traced: a traced network without quantizers.
        weight_bits: bits of the weights, 2 to 8.
        activation_bits: bits of the activations, 2 to 8.
        first_last_bits: bits of the weights and inputs of the last layer and of the first that each
            input of the network reaches; None leaves them as the others.
        include: name patterns (``fnmatch``) of the convs and linears to quantize.
        exclude: name patterns of those to leave in float.
        overrides: ``{pattern: {"weight_bits": …, "activation_bits": …}}``; ``activation_bits`` is
            that of the layer's input.
        activations: ``unsigned_affine`` (by default), ``signed_affine`` or ``signed_symmetric``.

    Raises:
        QatTricksError: a pattern matches no layer, bits outside 2..8, an unknown override or kind
            of activations, or nothing is left to quantize.
    """
    fed = [node for node in traced.graph.nodes if n.depends_on_images(node)]
    calls = [node for node in fed if n.calls_layer(node, traced)]
    names = list(dict.fromkeys(str(node.target) for node in calls))
    overrides = overrides or {}
    for pattern, given in overrides.items():
        for key in given:
            if key not in _OVERRIDES:
                raise QatTricksError(
                    f'override "{pattern}" has no setting "{key}": {did_you_mean(key, _OVERRIDES)}'
                )
    _check_patterns([*include, *exclude, *overrides], names)
    chosen = [name for name in names if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        raise QatTricksError(
            "no conv or linear layer is left to quantize: widen include or narrow exclude"
        )

    weights = dict.fromkeys(chosen, weight_bits)
    inputs = dict.fromkeys(chosen, activation_bits)
    if first_last_bits is not None:
        for end in {*_first_layers(traced), names[-1]} & set(chosen):
            weights[end] = inputs[end] = first_last_bits
    for pattern, given in overrides.items():
        for name in chosen:
            if fnmatchcase(name, pattern):
                weights[name] = given.get("weight_bits", weights[name])
                inputs[name] = given.get("activation_bits", inputs[name])

    points: dict[fx.Node, _Point] = {}
    # each point's representative; concatenated points have the same one
    groups: dict[fx.Node, fx.Node] = {}

    mixed = {
        node for node in traced.graph.nodes if n.is_cat(node, traced) and _is_mixed(node, traced)
    }

    def require(node: fx.Node, bits: int | None) -> None:
        sources = _sources(node, traced, mixed)
        for source in sources:
            point = points.setdefault(source, _Point(source))
            groups.setdefault(source, source)
            if bits is not None:
                point.bits.append(bits)
        for source in sources[1:]:
            _merge(groups, sources[0], source)

    for node in fed:
        is_chosen = (
            node.op == "call_module" and node.target in weights and n.calls_layer(node, traced)
        )
        if is_chosen:
            require(node.all_input_nodes[0], inputs[node.target])
        elif n.is_integer_op(node, traced) or node in mixed:
            for operand in node.all_input_nodes:
                if n.is_tensor(operand) and operand.op != "get_attr":
                    require(operand, None)
        else:
            continue
        if not (is_chosen and _is_final_linear(node, traced)):
            require(_with_activation(node, traced), None)

    spec = spec_of(traced)
    spec["layers"] = {**spec.get("layers", {})}
    for name, bits in weights.items():
        spec["layers"].setdefault(name, {})["weight"] = weight_scheme(bits).as_dict()
    spec["activations"] = _describe(
        traced, points, groups, activation_scheme(activation_bits, activations)
    )
    for name in weights:
        as_layer(traced.get_submodule(name))
    insert_quantizers(traced)
    return traced


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


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QatTricksError(
                f'pattern "{pattern}" matches no conv or linear layer: '
                f"{did_you_mean(pattern, names)}"
            )


def _sources(
    node: fx.Node, traced: fx.GraphModule, apart: Collection[fx.Node] = ()
) -> list[fx.Node]:
    """The nodes whose values those of ``node`` are: itself, or what lies before operations that
    only move values.

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
    """Whether ``cat`` joins tensors behind a ReLU with others: one grid for all could not stand in
    for the ReLU, and the conv before it would be left without an integer kernel. Each then has its
    own grid, and the concat brings them onto another.
    """
    return len({_absorbable(source, traced) for source in _sources(cat, traced)}) > 1


def _with_activation(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """The node to quantize for the output of ``node``: after the BatchNorm, ReLU or ReLU6 that
    alone uses it.
    """
    after = (
        n.only_user(node, lambda user: n.folds_into(user, traced) == [node] == user.all_input_nodes)
        or node
    )
    last = after
    # gone once deployed
    while dropout := n.only_user(last, lambda user: n.is_dropout(user, traced)):
        last = dropout
    return n.only_user(last, lambda user: n.activation_of(user, traced) is not None) or after


def _is_final_linear(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` is a linear whose output is the network's: integer kernels hand that out in
    float.
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


def _merge(groups: dict[fx.Node, fx.Node], a: fx.Node, b: fx.Node) -> None:
    target, gone = groups[a], groups[b]
    for node, representative in groups.items():
        if representative is gone:
            groups[node] = target


def _describe(
    traced: fx.GraphModule,
    points: Mapping[fx.Node, _Point],
    groups: Mapping[fx.Node, fx.Node],
    default: Scheme,
) -> dict[str, Any]:
    """The quantizers as plain data: ``{name: {"scheme", "activation", "nodes"}}``."""
    described: dict[str, Any] = {}
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for representative in dict.fromkeys(
        groups[node] for node in sorted(points, key=order.__getitem__)
    ):
        members = sorted(
            (node for node in points if groups[node] is representative), key=order.__getitem__
        )
        activations = {_absorbable(node, traced) for node in members}
        bits = [bits for node in members for bits in points[node].bits]
        described[members[0].name] = {
            "scheme": replace(default, bits=max(bits, default=default.bits)).as_dict(),
            # One grid for several tensors stands in for their ReLU only if each of them has it.
            "activation": activations.pop() if len(activations) == 1 else None,
            "nodes": [node.name for node in members],
        }
    return described


def _absorbable(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """The activation function that a quantizer on ``node`` can stand in for."""
    activation = n.activation_of(node, traced)
    if activation is None:
        return None
    module = n.module_of(node, traced)
    in_place = (
        getattr(module, "inplace", False)
        or node.kwargs.get("inplace", False)
        or str(node.target).endswith("_")
    )
    # Others that read the input of an in-place ReLU read its result: then the ReLU has to stay.
    return activation if len(node.all_input_nodes[0].users) == 1 or not in_place else None
