"""Grids between which a hardsigmoid clips integers, and computes nothing.

Of an integer ``q`` with scale ``s`` and zero point ``z``, ``hardsigmoid(x) = clamp(x + 3, 0, 6) /
6`` is the same ``q`` with scale ``s / 6`` and zero point ``z - 3 / s``, clamped. Where ``3 / s`` is
whole, that is exact: no value is rounded, and the function leaves nothing to compute but a clamp.
So the range of its input is made larger, until ``3 / s`` is whole and -3 is in it. Where nothing
else reads the input, as before the gate of squeeze-and-excite, that costs nothing: the function no
longer rounds, and its steps are about as large as those of a grid of its own.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.grids import input_grid_of, output_grid_of
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer

KNEE, SPAN = 3.0, 6.0  # hardsigmoid rises from 0 to 1 between -KNEE and KNEE
COARSEST = 1.25  # times the step of the input before: some 2 dB of its rounding noise


class HardSigmoid(NamedTuple):
    """A hardsigmoid between two quantizers."""

    before: ActivationQuantizer
    after: ActivationQuantizer
    is_only_reader: bool  # of the values before it

    @property
    def grids(self) -> tuple[ActivationQuantizer, ActivationQuantizer]:
        """Those before and behind it."""
        return self.before, self.after

    @property
    def is_aligned(self) -> bool:
        """Whether it only clips integers."""
        x, y = self.grids
        if not (x.is_calibrated and y.is_calibrated):
            return False
        scale, knee = float(x.current_scale()), _knee(x)
        is_whole = abs(knee * scale - KNEE) < 1e-5 * KNEE
        same_steps = abs(float(y.current_scale()) * SPAN - scale) < 1e-5 * scale
        return is_whole and same_steps and y.offset == x.offset - knee


def hard_sigmoid_at(node: fx.Node, traced: fx.GraphModule) -> HardSigmoid | None:
    """That of ``node`` if it could only clip.

    Then its grids are affine, of the same integers, and no other tensor has the grid behind it.
    """
    if n.operation_of(node, traced).name != "hardsigmoid":
        return None
    before, after = input_grid_of(node, traced), output_grid_of(node, traced)
    if before is None or after is None or before.activation is not None:
        return None
    (behind,) = node.users
    (x,) = node.all_input_nodes
    fits = before.scheme == after.scheme and not before.scheme.symmetric
    if not fits or not _is_called_once(behind, traced):
        return None
    # Between a quantizer and the function others may read the values through what moves them.
    is_direct = x.op == "call_module" and len(x.users) == 1 and _is_called_once(x, traced)
    return HardSigmoid(before, after, is_direct and module_of(x, traced) is before)


def _is_called_once(node: fx.Node, traced: fx.GraphModule) -> bool:
    return len(traced.graph.find_nodes(op="call_module", target=node.target)) == 1


def hard_sigmoids(traced: fx.GraphModule) -> Iterator[HardSigmoid]:
    """Those of ``traced`` that could only clip."""
    for node in traced.graph.nodes:
        found = hard_sigmoid_at(node, traced)
        if found is not None:
            yield found


def aligned_scales(traced: fx.GraphModule) -> set[ActivationQuantizer]:
    """The quantizers whose scales must stay as they are, for a hardsigmoid to be a clamp."""
    aligned = [pair for pair in hard_sigmoids(traced) if pair.is_aligned]
    return {quantizer for pair in aligned for quantizer in pair.grids}


@torch.no_grad()
def align_hard_sigmoids(traced: fx.GraphModule) -> None:
    """Moves the ranges before and behind each hardsigmoid so that it only clips integers.

    Left alone is one that would round more coarsely, as where others read an input that never
    reaches -3, and one whose scales are learned.
    """
    for pair in hard_sigmoids(traced):
        if not pair.is_aligned and not any(grid.scale.requires_grad for grid in pair.grids):
            _align(pair)


def _align(pair: HardSigmoid) -> None:
    x, y = pair.grids
    if not (x.is_calibrated and y.is_calibrated):
        return
    scheme, (low, high) = x.scheme, x.range
    before, levels = float(x.current_scale()), scheme.qmax - scheme.qmin
    low = min(low, -KNEE)
    # Rounded down, so that no value is clipped that was not; a hair is what floats have lost.
    knee = math.floor(KNEE * levels / (high - low) + 1e-4)
    if knee < 1:
        return
    scale = KNEE / knee
    if pair.is_only_reader:
        # Of the gate: the noise of one rounding, against that of two.
        is_coarser = scale**2 > before**2 + (SPAN * float(y.current_scale())) ** 2
    else:
        is_coarser = scale > COARSEST * before
    if is_coarser:
        return
    zero_point = min(scheme.qmin + round(-low / scale), scheme.qmax)
    for quantizer, step, zero in ((x, scale, zero_point), (y, scale / SPAN, zero_point - knee)):
        quantizer.set_range((scheme.qmin - zero) * step, (scheme.qmax - zero) * step)


def _knee(x: ActivationQuantizer) -> int:
    """The number of steps from 0 to where the function is 1."""
    return round(KNEE / float(x.current_scale()))
