"""Weights by least squares: fit them to inputs, then round them one input after the other.

Rounding: Frantar and Alistarh 2022, "Optimal Brain Compression" (arXiv 2208.11580), and Frantar et
al. 2022, "GPTQ" (arXiv 2210.17323). With ``H = E[x x^T]`` of the inputs and ``U^T U = H^-1``, the
weights ``w_i`` of input ``i`` are rounded to ``q_i``, and the weights of the inputs that come later
take up the error: ``w_j <- w_j - (w_i - q_i) U_ij / U_ii``. So the output's squared error grows by
just ``((w_i - q_i) / U_ii)^2`` with each input.

Where this differs: the inputs of the largest moment come first; groups of a conv are rounded side
by side; and all scales that are tried are rounded side by side too, so that each output channel
gets the one whose *rounded* weights err least. Each integer is then moved on its own as long as
that lowers the error (coordinate descent, as in Behdin et al. 2023, "QuantEase", arXiv 2309.01885).
The fit is a ridge regression towards the float weights. How strong the ridge is, inputs decide that
the fit has not seen.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the inputs' mean moment, added to each moment: what the images leave open stays bounded.
DAMPING = 0.01
# Ridges that are tried, likewise; none of them: the weights stay.
RIDGES = (0.01, 0.1, 1.0, 10.0)
# Scales that are tried, as shares of the one with which nothing clips.
SHARES = tuple(0.3 + 0.7 * step / 19 for step in range(20))
# Inputs whose errors reach the later ones together, in one product of matrices.
BLOCK = 64
# Entries of the weights that are rounded side by side, which bounds the memory.
MOST_ENTRIES = 2**25
# Times that all integers are looked at once more, at most.
PASSES = 8


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums of products over rows of a layer's inputs, and of the errors of its outputs.

    Where rows count otherwise for each output channel, each channel is a group of its own.

    Attributes:
        inputs: ``sum x x^T``, ``[groups, K, K]``.
        errors: ``sum x (target - W x)``, ``[groups, K, channels]``.
        rows: how many rows.
    """

    inputs: Tensor
    errors: Tensor
    rows: int

    @classmethod
    def of(cls, inputs: Tensor, errors: Tensor) -> "Moments":
        """The moments of ``inputs``, ``[groups, rows, K]``, and ``errors``, likewise."""
        by_input = inputs.transpose(1, 2)
        return cls(inputs=by_input @ inputs, errors=by_input @ errors, rows=inputs.shape[1])

    @classmethod
    def weighted(
        cls, inputs: Tensor, errors: Tensor, weights: Tensor, *, is_centered: bool
    ) -> "Moments":
        """The moments of each output channel, of rows that count by ``weights``.

        Args:
            inputs: ``[groups, rows, K]``.
            errors: ``[groups, rows, channels]``.
            weights: likewise, positive.
            is_centered: whether about the weighted means; else about 0.

        Returns:
            Moments of ``groups * channels`` groups, in the order of a weight's channels.
        """
        groups, rows, size = inputs.shape
        moments = inputs.new_empty(groups, errors.shape[2], size, size)
        means = inputs.new_zeros(groups, errors.shape[2], size)
        if is_centered:
            totals = weights.sum(1, keepdim=True)
            means = (inputs.transpose(1, 2) @ (weights / totals)).transpose(1, 2)
            errors = errors - (errors * weights).sum(1, keepdim=True) / totals
        for group, by_row in enumerate(inputs):
            # One product of matrices a channel: all of them at once would take up the memory.
            for channel, weight in enumerate(weights[group].unbind(1)):
                values = by_row - means[group, channel]
                torch.mm(values.T, values * weight[:, None], out=moments[group, channel])
        # Centred errors need no centred inputs beside them.
        by_input = inputs.transpose(1, 2) @ (weights * errors)
        return cls(
            inputs=moments.flatten(0, 1),
            errors=by_input.transpose(1, 2).reshape(-1, size, 1),
            rows=rows,
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            inputs=self.inputs + other.inputs,
            errors=self.errors + other.errors,
            rows=self.rows + other.rows,
        )

    def least_change(self, ridge: float) -> Tensor:
        """The change of ``W^T`` that takes the errors away, ``[groups, K, channels]``.

        Args:
            ridge: what a change costs, as a share of the inputs' mean moment.
        """
        factor = torch.linalg.cholesky(damped(self.inputs, ridge))
        return torch.cholesky_solve(self.errors, factor)

    def gain(self, change: Tensor) -> float:
        """By how much a change of ``W^T`` lowers the sum of squared errors."""
        return float((change * (2 * self.errors - self.inputs @ change)).sum())


def fitted_change(seen: Moments, unseen: Moments) -> Tensor:
    """The change of a layer's weights with which its outputs come nearest to their targets.

    Args:
        seen: moments of most of the rows.
        unseen: of the other rows, which decide how much may change.

    Returns:
        The change of ``W^T``, ``[groups, K, channels]``; zeros where every change would harm.
    """
    gains = {ridge: unseen.gain(seen.least_change(ridge)) for ridge in RIDGES}
    best = max(RIDGES, key=gains.__getitem__)
    if not gains[best] > 0:
        return torch.zeros_like(seen.errors)
    return (seen + unseen).least_change(best)


def damped(moments: Tensor, share: float) -> Tensor:
    """``moments``, ``[groups, K, K]``, with a share of their mean added to the diagonal."""
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    mean = diagonal.mean(1)
    # Inputs that are always 0 have no moments; any number will do.
    added = torch.where(mean > 0, share * mean, 1.0)
    eye = torch.eye(moments.shape[1], device=moments.device, dtype=moments.dtype)
    return moments + added[:, None, None] * eye


class GridRounder:
    """Rounds weights to integers such that a layer's outputs change least.

    Args:
        moments: of the layer's inputs, ``[groups, K, K]``.
        limit: the largest integer; the smallest is its negative.
    """

    def __init__(self, moments: Tensor, limit: int) -> None:
        self.limit = limit
        self.moments = damped(moments, DAMPING)
        # An early error can be taken up by many, so the inputs that matter most come first.
        diagonal = torch.diagonal(moments, dim1=1, dim2=2)
        self.order = diagonal.argsort(dim=1, descending=True, stable=True)
        rows = self.order[:, :, None].expand_as(moments)
        ordered = self.moments.gather(1, rows).gather(2, rows.transpose(1, 2))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        self.factor = torch.linalg.cholesky(inverse, upper=True)

    def with_limit(self, limit: int) -> "GridRounder":
        """One for another grid; what the moments cost is not paid again."""
        other = copy.copy(self)
        other.limit = limit
        return other

    def fit(
        self, weight: Tensor, pruned: Tensor | None = None, *, fits_scale: bool
    ) -> tuple[Tensor, Tensor]:
        """Rounds weights with the scale of each output channel, as well as all steps here can.

        Args:
            weight: ``W^T``, ``[groups, K, channels]``.
            pruned: of the same shape, True where a weight has to be 0; the others take up its part.
            fits_scale: whether to find the scales with which the rounded weights err least. Else
                they follow each channel's largest weight, which stays the largest.

        Returns:
            The integers in the weight's shape, and the scales, ``[groups, channels]``.
        """
        held = None if pruned is None else torch.where(pruned, 0.0, torch.nan)
        if fits_scale:
            scale = self.fit_scale(weight, held)
        else:
            free = weight if pruned is None else torch.where(pruned, 0.0, weight)
            largest = free.abs().argmax(1, keepdim=True)
            value = free.gather(1, largest)
            scale = (value[:, 0].abs() / self.limit).clamp_min(torch.finfo(value.dtype).tiny)
            # The scale would change with the largest weight, and with it the grid of all others.
            held = torch.full_like(weight, torch.nan) if held is None else held
            held = held.scatter(1, largest, value.sign() * self.limit)
        integers, _ = self.round(weight, scale, held)
        return self.refine(weight, integers, scale, held), scale

    def round(
        self, weight: Tensor, scale: Tensor, held: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rounds ``weight / scale``.

        Args:
            weight: ``W^T``, ``[groups, K, channels]``.
            scale: of each output channel, ``[groups, channels]``.
            held: integers that weights must have, of the weight's shape; NaN where they are free.

        Returns:
            The integers in the weight's shape, and the squared error that they add to each output
            channel, ``[groups, channels]``.
        """
        rows = self.order[:, :, None].expand_as(weight)
        weight = weight.gather(1, rows)
        held = None if held is None else held.gather(1, rows)
        integers, loss = torch.empty_like(weight), torch.zeros_like(scale)
        inputs = weight.shape[1]
        for begin in range(0, inputs, BLOCK):
            end = min(begin + BLOCK, inputs)
            errors = torch.empty_like(weight[:, begin:end])
            for i in range(begin, end):
                integer = (weight[:, i] / scale).round_().clamp_(-self.limit, self.limit)
                if held is not None:
                    integer = torch.where(held[:, i].isnan(), integer, held[:, i])
                error = (weight[:, i] - integer * scale) / self.factor[:, i, i, None]
                integers[:, i], errors[:, i - begin] = integer, error
                loss += error.square()
                # Within the block at once; the other inputs get the block's errors together.
                weight[:, i + 1 : end] -= self.factor[:, i, i + 1 : end, None] * error[:, None]
            weight[:, end:] -= self.factor[:, begin:end, end:].transpose(1, 2) @ errors
        return torch.empty_like(integers).scatter_(1, rows, integers), loss

    def refine(
        self, weight: Tensor, integers: Tensor, scale: Tensor, held: Tensor | None = None
    ) -> Tensor:
        """Moves one integer after the other to where the output errs least.

        Args:
            weight: as of ``round``.
            integers: what ``round`` returned.
            scale: as of ``round``.
            held: as of ``round``.

        Returns:
            The integers; their error is no larger.
        """
        integers = integers.clone()
        # Half of the error's slope: what it falls by as an integer grows.
        slope = self.moments @ (weight - integers * scale[:, None])
        diagonal = torch.diagonal(self.moments, dim1=1, dim2=2)
        inputs = weight.shape[1]
        for _ in range(PASSES):
            has_moved = False
            for begin in range(0, inputs, BLOCK):
                end = min(begin + BLOCK, inputs)
                steps = torch.zeros_like(slope[:, begin:end])
                for i in range(begin, end):
                    # The error is a parabola of this integer alone. The product of a small scale
                    # and a small moment may be 0.
                    lowest = integers[:, i] + slope[:, i] / diagonal[:, i, None] / scale
                    integer = lowest.round_().clamp_(-self.limit, self.limit)
                    if held is not None:
                        integer = torch.where(held[:, i].isnan(), integer, integers[:, i])
                    step = (integer - integers[:, i]) * scale
                    if not step.any():
                        continue
                    integers[:, i], steps[:, i - begin] = integer, step
                    # Within the block at once; the other inputs get the block's steps together.
                    slope[:, begin:end] -= self.moments[:, i, begin:end, None] * step[:, None]
                if not steps.any():
                    continue
                has_moved = True
                for others in (slice(0, begin), slice(end, inputs)):
                    slope[:, others] -= self.moments[:, others, begin:end] @ steps
            if not has_moved:
                break
        return integers

    def fit_scale(self, weight: Tensor, held: Tensor | None = None) -> Tensor:
        """The scale of each output channel with which its rounded weights err least.

        Args:
            weight: as of ``round``.
            held: as of ``round``.

        Returns:
            ``[groups, channels]``, positive.
        """
        # Of a channel of zeros too, no share is 0 where small numbers are taken for 0.
        least = torch.finfo(weight.dtype).tiny / SHARES[0]
        largest = (weight.abs().amax(1) / self.limit).clamp_min(least)
        shares = torch.tensor(SHARES, device=weight.device)
        scales = largest[:, :, None] * shares
        losses = []
        step = max(1, MOST_ENTRIES // (weight.shape[0] * weight.shape[1] * len(SHARES)))
        for part in torch.arange(weight.shape[2], device=weight.device).split(step):
            _, loss = self.round(
                weight[:, :, part].repeat_interleave(len(SHARES), 2),
                scales[:, part].flatten(1),
                None if held is None else held[:, :, part].repeat_interleave(len(SHARES), 2),
            )
            losses.append(loss.view(len(loss), -1, len(SHARES)))
        best = torch.cat(losses, 1).argmin(2, keepdim=True)
        return scales.gather(2, best)[:, :, 0]
