"""Grids between which a hardsigmoid clips integers, and computes nothing.

Of an integer ``q`` with scale ``s`` and zero point ``z``, ``hardsigmoid(x) = clamp(x + 3, 0, 6) /
6`` is the same ``q`` with scale ``s / 6`` and zero point ``z - 3 / s``, clamped. Where ``3 / s`` is
whole, that is exact: no value is rounded, and the function leaves nothing to compute but a clamp.
So the range of its input is made a little larger, until ``3 / s`` is whole and -3 is in it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.grids import input_grid_of, output_grid_of
from qat_tricks.numerics import ActivationQuantizer

KNEE, SPAN = 3.0, 6.0  # hardsigmoid rises from 0 to 1 between -KNEE and KNEE
COARSEST = 1.25  # times the step of the input before: some 2 dB of its rounding noise


class HardSigmoid(NamedTuple):
    """A hardsigmoid between two quantizers."""

    before: ActivationQuantizer
    after: ActivationQuantizer

    @property
    def is_aligned(self) -> bool:
        """Whether it only clips integers."""
        x, y = self
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
    (quantizer,) = node.users
    is_shared = len(traced.graph.find_nodes(op="call_module", target=quantizer.target)) > 1
    fits = before.scheme == after.scheme and not before.scheme.symmetric
    return HardSigmoid(before, after) if fits and not is_shared else None


def hard_sigmoids(traced: fx.GraphModule) -> Iterator[HardSigmoid]:
    """Those of ``traced`` that could only clip."""
    for node in traced.graph.nodes:
        found = hard_sigmoid_at(node, traced)
        if found is not None:
            yield found


def aligned_scales(traced: fx.GraphModule) -> set[ActivationQuantizer]:
    """The quantizers whose scales must stay as they are, for a hardsigmoid to be a clamp."""
    aligned = [pair for pair in hard_sigmoids(traced) if pair.is_aligned]
    return {quantizer for pair in aligned for quantizer in pair}


@torch.no_grad()
def align_hard_sigmoids(traced: fx.GraphModule) -> None:
    """Moves the ranges before and behind each hardsigmoid so that it only clips integers.

    Left alone is one whose input's step would grow by more than ``COARSEST``, as where that never
    reaches -3, and one whose scales are learned.
    """
    for pair in hard_sigmoids(traced):
        if not pair.is_aligned and not any(quantizer.scale.requires_grad for quantizer in pair):
            _align(*pair)


def _align(x: ActivationQuantizer, y: ActivationQuantizer) -> None:
    if not (x.is_calibrated and y.is_calibrated):
        return
    scheme, (low, high) = x.scheme, x.range
    before, levels = float(x.current_scale()), scheme.qmax - scheme.qmin
    low = min(low, -KNEE)
    # Rounded down, so that no value is clipped that was not; a hair is what floats have lost.
    knee = math.floor(KNEE * levels / (high - low) + 1e-4)
    if knee < 1 or KNEE / knee > COARSEST * before:
        return
    scale = KNEE / knee
    zero_point = min(scheme.qmin + round(-low / scale), scheme.qmax)
    for quantizer, step, zero in ((x, scale, zero_point), (y, scale / SPAN, zero_point - knee)):
        quantizer.set_range((scheme.qmin - zero) * step, (scheme.qmax - zero) * step)


def _knee(x: ActivationQuantizer) -> int:
    """The number of steps from 0 to where the function is 1."""
    return round(KNEE / float(x.current_scale()))
