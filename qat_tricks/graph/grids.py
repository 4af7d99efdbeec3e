"""Finds on whose grid a value is: walks from a tensor back to the quantizers that round it."""

from collections.abc import Callable

from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer

Accepts = Callable[[ActivationQuantizer], bool]
"""Which quantizers count; one that does not leaves its values on no grid."""


def any_quantizer(quantizer: ActivationQuantizer) -> bool:
    """Accepts every quantizer, also one that is not calibrated yet or not enabled."""
    return True


def grids_of(
    node: fx.Node, traced: fx.GraphModule, accepts: Accepts = any_quantizer
) -> tuple[ActivationQuantizer, ...]:
    """The quantizers on whose grids the values of ``node`` are.

    Values stay on their grid through operations that move them, such as pools of maxima, reshapes
    and dropout. A concat has the grids of all its inputs.

    Returns:
        Each quantizer once, in the order of the inputs; none if some values are on no grid.
    """
    module = module_of(node, traced)
    if isinstance(module, ActivationQuantizer):
        return (module,) if accepts(module) else ()
    if n.is_cat(node, traced):
        parts = [grids_of(part, traced, accepts) for part in node.all_input_nodes]
        # One part in float makes the whole a tensor that no integer kernel takes.
        return tuple(dict.fromkeys(grid for part in parts for grid in part)) if all(parts) else ()
    if n.is_passthrough(node, traced):
        return grids_of(node.all_input_nodes[0], traced, accepts)
    return ()


def grid_of(
    node: fx.Node, traced: fx.GraphModule, accepts: Accepts = any_quantizer
) -> ActivationQuantizer | None:
    """The quantizer on whose grid all values of ``node`` are, or None."""
    grids = grids_of(node, traced, accepts)
    return grids[0] if len(grids) == 1 else None


def input_grid_of(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer on whose grid the first input of ``node`` is, or None."""
    return grid_of(node.all_input_nodes[0], traced)


def output_grid_of(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer that is the only reader of ``node``, or None."""
    # With a second reader, the float values are needed too.
    user = n.only_user(node, lambda user: True)
    module = None if user is None else module_of(user, traced)
    return module if isinstance(module, ActivationQuantizer) else None
