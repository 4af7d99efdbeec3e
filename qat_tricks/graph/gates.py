"""Splits functions that multiply their input by a gate into two steps that have integer kernels.

``silu(x) = x * sigmoid(x)`` and ``hardswish(x) = x * hardsigmoid(x)`` have no integer kernel
themselves. A product of two quantized tensors has one; between two grids a sigmoid is a table of
256 values; and a hardsigmoid clips integers, where the grids allow it (``graph.hard_sigmoids``).
"""

import operator
from collections.abc import Collection, Sequence

from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.in_place import works_in_place


def gate_of(name: str) -> str:
    """The name that the gate of a function's node ``name`` gets."""
    return f"{name}_gate"


def gated_functions(traced: fx.GraphModule, quantized: Collection[fx.Node]) -> list[str]:
    """The names of the nodes to split: functions between two grids, which cost no other rounding.

    Args:
        traced: a traced network without quantizers.
        quantized: the nodes whose values will be on a grid.
    """
    return [
        node.name
        for node in traced.graph.nodes
        if node in quantized
        and n.operation_of(node, traced).gate is not None
        and _can_be_split(node, traced, quantized)
    ]


def _can_be_split(node: fx.Node, traced: fx.GraphModule, quantized: Collection[fx.Node]) -> bool:
    """Whether its input is on a grid too, and nobody else reads it by what it does in place."""
    source, readers = node.all_input_nodes[0], 1
    while True:
        readers = max(readers, len(source.users))
        if not n.is_passthrough(source, traced):
            break
        source = source.all_input_nodes[0]  # of which it may be a view
    # Others that read the input of an in-place function read its result.
    return source in quantized and not (works_in_place(node, traced) and readers > 1)


def split_gates(traced: fx.GraphModule, names: Sequence[str]) -> None:
    """Turns each of these nodes into the product of its input and a gate before it, in place.

    The node keeps its name, and the gate is called ``gate_of(name)``. One that is split stays so.
    """
    for node in list(traced.graph.nodes):
        gate = n.operation_of(node, traced).gate if node.name in names else None
        if gate is None:
            continue
        x = node.all_input_nodes[0]
        with traced.graph.inserting_before(node):
            gated = traced.graph.create_node("call_function", gate, (x,), name=gate_of(node.name))
        # The node is changed, not replaced: a spec finds it by its name.
        node.op, node.target, node.args, node.kwargs = (
            "call_function",
            operator.mul,
            (x, gated),
            {},
        )
    traced.recompile()
