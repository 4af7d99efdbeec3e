"""Move scales by a hair, so that no value of an activation function lies in the middle between two
steps.

Between two grids a function such as SiLU stays in float, and of the 256 values that it can have
there, one that lies nearly in the middle between two steps is rounded to one side by one library
and to the other by the next, whose ``exp`` ends in another last bit. Every activation with that
input then differs by a step. A scale that is larger by some 0.00001 has no such value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.trace import module_of
from qat_tricks.numerics import ActivationQuantizer

MARGIN = 2e-6  # of a value in steps, and of a step: some 16 units in the last place
STEP, TRIES = 1e-5, 50  # relative changes of a scale that are tried, on both sides
PASSES = 3  # one function's output is another's input


@torch.no_grad()
def avoid_rounding_ties(traced: fx.GraphModule) -> list[str]:
    """Changes, by at most ``STEP * TRIES``, each scale at which a runtime could round a function's
    value otherwise.

    Only quantizers behind a function of one tensor that is itself on a grid; nothing where none of
    the scales tried is free of such values. Returns the names of the quantizers changed.
    """
    changed: dict[str, None] = {}
    for _ in range(PASSES):
        moved = [
            name
            for name, tables in _tables(traced).items()
            if _settle(traced.get_submodule(name), tables)
        ]
        changed.update(dict.fromkeys(moved))
        if not moved:
            break
    return list(changed)


def _tables(traced: fx.GraphModule) -> dict[str, list[Callable[[], Tensor]]]:
    """Of each quantizer by name, what computes the values that each function before it can have."""
    tables: dict[str, list[Callable[[], Tensor]]] = {}
    for node in traced.graph.nodes:
        quantizer = module_of(node, traced)
        if not isinstance(quantizer, ActivationQuantizer) or not (
            quantizer.enabled and quantizer.is_calibrated
        ):
            continue
        chain: list[fx.Node] = []
        source = node.all_input_nodes[0]
        while n.is_function_of_one(source, traced):
            chain.insert(0, source)
            source = source.all_input_nodes[0]
        grids = _grids(source, traced) if chain else []
        tables.setdefault(str(node.target), []).extend(
            _table(traced, chain, source, grid) for grid in grids
        )
    return tables


def _grids(source: fx.Node, traced: fx.GraphModule) -> list[ActivationQuantizer]:
    """The quantizers on whose grids the values of ``source`` are, or none if some are on none."""
    module = module_of(source, traced)
    if isinstance(module, ActivationQuantizer):
        return [module] if module.enabled and module.is_calibrated else []
    if n.is_cat(source, traced):
        parts = [_grids(part, traced) for part in source.all_input_nodes]
        return [grid for part in parts for grid in part] if all(parts) else []
    return _grids(source.all_input_nodes[0], traced) if n.is_passthrough(source, traced) else []


def _table(
    traced: fx.GraphModule, chain: list[fx.Node], source: fx.Node, grid: ActivationQuantizer
) -> Callable[[], Tensor]:
    def values() -> Tensor:
        first, last = grid.steps
        integers = torch.arange(first, last + 1, device=grid.scale.device)
        interpreter = fx.Interpreter(traced)
        interpreter.env[source] = (integers * grid.current_scale()).view(1, -1, 1, 1)
        for node in chain:
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[chain[-1]].flatten().double()

    return values


def _settle(quantizer: Any, tables: list[Callable[[], Tensor]]) -> bool:
    """Moves ``quantizer`` to the closest scale at which no value of ``tables`` is in doubt, and
    returns whether it moved.
    """
    if not tables or quantizer.cap < float("inf"):
        return False
    values = torch.cat([table() for table in tables])
    scale = quantizer.current_scale()
    low, high = quantizer.steps
    for attempt in range(2 * TRIES + 1):
        tried = scale * (1 + STEP * ((attempt + 1) // 2) * (-1) ** attempt)
        steps = values / tried.double()
        steps = steps[(steps > low - 1) & (steps < high + 1)]  # the others are clamped
        in_doubt = ((steps - steps.floor() - 0.5).abs() < MARGIN * (steps.abs() + 1)).any()
        if not in_doubt:
            if attempt:
                quantizer.scale.copy_(tried)
            return attempt > 0
    return False
