"""Rounding that can be learned: each weight moves between the two steps beside it.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv
2004.10568), equations 22 and 23: ``w = scale * (floor + h(v))`` with the rectified sigmoid ``h(v) =
clamp(sigmoid(v) * 1.2 - 0.1, 0, 1)``.

Where this differs:

- No regularizer drives ``h`` to 0 or 1, for with few iterations many weights stay undecided, and
  rounding them in the end undoes what was learned. Instead, weights are fixed one part after
  another, the most decided first, and those that are left make up for them.
- ``h`` begins at the side to which the weight is rounded now, which other tricks may have chosen
  with care, and as sure of it as the weight is far from the middle.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat_tricks.numerics.scheme import Scheme

ZETA, GAMMA = 1.1, -0.1  # h is stretched to this range and clamped, so that it reaches 0 and 1
SURE = 0.99  # how far h begins from the other side at most: its gradient ends at 0 and 1
BESIDE = 0.8  # the same where the present step is none of the two beside the float weight
FIXED = 20.0  # a logit at which h is 0 or 1, and has no gradient


class SoftRounding:
    """The weight of one layer, each entry between two neighbouring steps.

    Args:
        exact: the float weight in steps, of any shape.
        present: the whole step that each entry has now, of the same shape.
        stays: entries that stay as they are, such as pruned ones.
        scheme: gives the largest and smallest step.

    Attributes:
        logit: what is learned, of the shape of ``exact``; ``h`` is its rectified sigmoid.
        number: how many entries may move.
    """

    def __init__(self, exact: Tensor, present: Tensor, stays: Tensor, scheme: Scheme) -> None:
        low = exact.floor()
        is_beside = (present == low) | (present == low + 1)
        # A step further away is kept, beside its neighbour towards the float weight.
        low = torch.where(is_beside, low, torch.where(present < exact, present, present - 1))
        # What is clipped has one step only.
        stays = stays | (low < scheme.qmin) | (low >= scheme.qmax)
        share = torch.where(is_beside, exact - exact.floor(), 1 - BESIDE)
        share = torch.maximum(share, 1 - share).clamp_max(SURE)  # of the present side
        share = torch.where(present > low, share, 1 - share)
        logit = torch.logit((share - GAMMA) / (ZETA - GAMMA))
        self._low = torch.where(stays, present, low)
        self.logit = torch.where(stays, -FIXED, logit).requires_grad_()
        self.number = int((~stays).sum())

    def steps(self) -> Tensor:
        """The weight in steps, differentiable."""
        return self._low + (torch.sigmoid(self.logit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def rounded(self) -> Tensor:
        """The weight in whole steps: each entry on the side that it is closer to."""
        with torch.no_grad():
            return self._low + (self.logit >= 0)

    @torch.no_grad()
    def fix(self, share: float) -> None:
        """Fixes the most decided entries, until a share of those that may move are fixed."""
        decided = self.logit.abs().flatten()
        # Momentum moves a logit on, but not by half.
        free = torch.nonzero(decided < FIXED / 2).flatten()
        missing = round(share * self.number) - (self.number - len(free))
        if missing > 0:
            picked = free[decided[free].topk(missing).indices]
            logits = self.logit.view(-1)
            logits[picked] = torch.where(logits[picked] >= 0, FIXED, -FIXED)


class _PartlyRounded(torch.autograd.Function):
    """``clamp(x / scale)``, some of it rounded, times ``scale``; gradients as of LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, share: Tensor) -> Tensor:
        steps = x / scale
        rounded = steps.clamp(low, high)
        rounded = torch.lerp(rounded, rounded.round(), share)
        # The result itself may be changed in place by what comes behind.
        ctx.save_for_backward(steps, rounded)
        ctx.low, ctx.high = low, high
        return rounded * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        steps, rounded = ctx.saved_tensors
        # Zero outside (low, high), in one vectorised pass.
        grad_x = torch.ops.aten.hardtanh_backward(grad, steps, ctx.low, ctx.high)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None
        # d out / d scale is (out - x) / scale inside the range, and the bound outside.
        grad_scale = torch.dot(grad.flatten(), rounded.flatten())
        grad_scale -= torch.dot(grad_x.flatten(), steps.flatten())
        return grad_x, grad_scale, None, None, None


def partly_rounded(x: Tensor, scale: Tensor, low: int, high: int, share: Tensor) -> Tensor:
    """``x`` clamped to the grid, and rounded to it where ``share`` is 1.

    Args:
        x: float32, any shape.
        scale: float32, shape ``[]``.
        low: the smallest value in units of the scale.
        high: the largest.
        share: 0 or 1 for each value, of the shape of ``x``.

    Returns:
        float32 of the shape of ``x``; differentiable in ``x`` and ``scale``, straight through the
        rounding.
    """
    return _PartlyRounded.apply(x, scale, low, high, share)
