"""Moves scales by a hair, so that no value of a function lies in the middle between two steps.

Between two grids a function such as SiLU stays in float, where it has at most 256 values. One of
them may lie nearly in the middle between two steps. Libraries differ in the last bit of ``exp``, so
one rounds that value up and another rounds it down. Every activation with that input then differs
by a step. A scale that is larger by some 0.00001 has no such value.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.grids import grids_of
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer

MARGIN = 2e-6  # of a value in steps, and of a step: some 16 units in the last place
STEP, TRIES = 1e-5, 50  # relative changes of a scale that are tried, on both sides
PASSES = 3  # one function's output is another's input

Table = Callable[[], Tensor]
"""Computes all values that a function can have behind a grid, float64, ``[values]``."""


@torch.no_grad()
def avoid_rounding_ties(traced: fx.GraphModule) -> list[str]:
    """Changes each scale at which runtimes could round a function's value to different steps.

    Only quantizers behind a function of one tensor that is itself on a grid are changed, by at most
    ``STEP * TRIES``. A scale stays if none of those tried is free of such values.

    Returns:
        The names of the quantizers changed.
    """
    changed: dict[str, None] = {}
    for _ in range(PASSES):
        moved = []
        # The tables are computed when they are asked for, with the scales moved so far.
        for name, tables in _tables(traced).items():
            quantizer = traced.get_submodule(name)
            assert isinstance(quantizer, ActivationQuantizer)
            if tables and _move_off_ties(quantizer, tables):
                moved.append(name)
        changed.update(dict.fromkeys(moved))
        if not moved:
            break
    return list(changed)


def _tables(traced: fx.GraphModule) -> dict[str, list[Table]]:
    """For each quantizer by name, the tables of the functions before it."""
    tables: dict[str, list[Table]] = {}
    for node in traced.graph.nodes:
        quantizer = module_of(node, traced)
        if not isinstance(quantizer, ActivationQuantizer) or not quantizer.is_on:
            continue
        chain, source = _functions_before(node, traced)
        # Without a function the values are steps of another grid, and libraries agree on them.
        grids = grids_of(source, traced, accepts=lambda grid: grid.is_on) if chain else ()
        tables.setdefault(str(node.target), []).extend(
            _table(traced, chain, source, grid) for grid in grids
        )
    return tables


def _functions_before(node: fx.Node, traced: fx.GraphModule) -> tuple[list[fx.Node], fx.Node]:
    """The functions of one tensor before ``node``, in order, and the tensor they begin with."""
    chain: list[fx.Node] = []
    source = node.all_input_nodes[0]
    while n.is_function_of_one(source, traced):
        # Several functions in a row have one table, from the first grid to the last value.
        chain.insert(0, source)
        source = source.all_input_nodes[0]
    return chain, source


def _table(
    traced: fx.GraphModule, chain: Sequence[fx.Node], source: fx.Node, grid: ActivationQuantizer
) -> Table:
    """The table of ``chain``, which begins with ``source``, whose values are on ``grid``."""

    def values() -> Tensor:
        first, last = grid.steps
        integers = torch.arange(first, last + 1, device=grid.scale.device)
        interpreter = fx.Interpreter(traced)
        # In the shape of an image, which some functions ask for.
        interpreter.env[source] = (integers * grid.current_scale()).view(1, -1, 1, 1)
        for node in chain:
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[chain[-1]].flatten().double()

    return values


def _move_off_ties(quantizer: ActivationQuantizer, tables: Sequence[Table]) -> bool:
    """Moves ``quantizer`` to the closest scale at which no value of ``tables`` is in doubt.

    Returns:
        Whether it moved.
    """
    if quantizer.cap < float("inf"):  # the cap decides the scale
        return False
    values = torch.cat([table() for table in tables])
    scale = quantizer.current_scale()
    low, high = quantizer.steps
    for attempt in range(2 * TRIES + 1):
        # 0, -1, 1, -2, 2 and so on: the closest first, on both sides by turns
        change = STEP * ((attempt + 1) // 2) * (-1) ** attempt
        changed = scale * (1 + change)
        steps = values / changed.double()
        steps = steps[(steps > low - 1) & (steps < high + 1)]  # the others are clamped
        distance = (steps - steps.floor() - 0.5).abs()
        if not (distance < MARGIN * (steps.abs() + 1)).any():
            if attempt > 0:
                quantizer.move_scale(changed)
            return attempt > 0
    return False
