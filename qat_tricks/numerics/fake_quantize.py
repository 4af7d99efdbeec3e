"""Fake quantization: round to the integer grid in float, with straight-through gradients.

Sources: Bengio et al. 2013 (arXiv 1308.3432), the straight-through estimator; Esser et al. 2020,
"Learned Step Size Quantization" (arXiv 1902.08153), equations 1 to 3 and the gradient scale of
section 2.2; Bhalgat et al. 2020, "LSQ+" (arXiv 2004.09576), equations 3 to 5, the learned offset.

Where this differs: the whole chain is a few vectorised in-place passes and the backward keeps ``x /
scale`` rather than a mask, because core PyTorch's ``fake_quantize_*_cachemask`` kernels are not
vectorised on CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat_tricks.numerics.scheme import Scheme

_WITHIN = 126  # places within half a step that a byte tells apart, beside the two sides outside


class _FakeQuantize(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale`` with LSQ's gradients of both inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        # Only tensors that this backward needs are kept: without a learned scale, no output.
        out = _dequantize(torch.round(steps), scale, low, high)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(steps, scale, out)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(steps, scale)
        ctx.low, ctx.high = low, high
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        steps, scale, *rest = ctx.saved_tensors
        # Zero outside (low, high): hardtanh's own backward is that, in one vectorised pass.
        grad_x = torch.ops.aten.hardtanh_backward(grad, steps, ctx.low, ctx.high)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        (out,) = rest
        # d out / d scale is round(x / s) - x / s inside the range and the bound outside: the sum of
        # both is out / s everywhere, less x / s inside.
        if scale.dim() == 0:
            grad_scale = _dot(grad, out) / scale - _dot(grad_x, steps)
        else:
            dims = [d for d in range(scale.dim()) if scale.shape[d] == 1]
            grad_scale = (grad * out / scale - grad_x * steps).sum(dims, keepdim=True)
        return grad_x, _lsq_scaled(grad_scale, grad, ctx), None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of ``a * b``, in one pass; shape ``[]``."""
    # In channels-last memory a flat tensor in the order of dimensions would be a copy.
    if all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        a, b = a.movedim(1, 3), b.movedim(1, 3)
    return torch.dot(a.flatten(), b.flatten())


def _lsq_scaled(grad_scale: Tensor, grad: Tensor, ctx: Any) -> Tensor:
    """LSQ section 2.2: 1 / sqrt(N * qmax) balances the step of a scale with that of the weights."""
    per_scale = grad.numel() // grad_scale.numel()
    return grad_scale / (per_scale * max(ctx.high, -ctx.low)) ** 0.5


class _FakeQuantizeCompiled(torch.autograd.Function):
    """``_FakeQuantize`` of an activation, of which ``torch.compile`` makes one kernel a direction.

    The backward keeps one byte a value: where ``x / scale`` lay within its step, to a 252nd part,
    or on which side it was clamped. An activation has enough values for that to average out; a
    weight's channel of 9 has not. In eager mode the passes that make the byte cost more time than
    all others together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        rounded = torch.round(steps)
        place = torch.round((steps - rounded) * (2 * _WITHIN))  # -_WITHIN to _WITHIN
        place = torch.where(steps > low, place, -_WITHIN - 1.0)
        place = torch.where(steps < high, place, _WITHIN + 1.0)
        ctx.save_for_backward(place.to(torch.int8))
        ctx.low, ctx.high = low, high
        return rounded.clamp(low, high) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (place,) = ctx.saved_tensors
        place = place.float()
        inside = place.abs() <= _WITHIN
        grad_x = torch.where(inside, grad, 0.0)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        bound = torch.where(place > 0, float(ctx.high), float(ctx.low))
        slope = torch.where(inside, place * (-0.5 / _WITHIN), bound)
        # No dot product of flat tensors: in channels-last memory it would gather its values.
        return grad_x, _lsq_scaled((grad * slope).sum(), grad, ctx), None, None


class _FakeQuantizeFrom(torch.autograd.Function):
    """``_FakeQuantize`` of an activation whose smallest value is learned too (LSQ+).

    Where LSQ+ shifts the grid by any number, here it is shifted by whole steps: 0.0 stays on it,
    as integer kernels and zero padding need. So the smallest value is rounded to the grid, with a
    straight-through gradient, and a value clamped below is that.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor, first: Tensor, count: int
    ) -> Tensor:
        steps = x / scale
        ctx.save_for_backward(steps, first)
        ctx.low, ctx.high = 0, count  # steps of the range, for LSQ's factor
        return torch.round(steps).clamp(first, first + count) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        steps, first = ctx.saved_tensors
        above = steps >= first + ctx.high
        inside = (steps > first) & ~above
        grad_x = torch.where(inside, grad, 0.0)
        # d out / d scale: the rounding inside; all steps above, counted from the smallest value.
        outside = torch.where(above, float(ctx.high), 0.0)
        slope = torch.where(inside, torch.round(steps) - steps, outside)
        grad_scale = _lsq_scaled((grad * slope).sum(), grad, ctx)
        grad_low = _lsq_scaled((grad - grad_x).sum(), grad, ctx)
        return grad_x, grad_scale, grad_low, None, None


class _RoundToGrid(torch.autograd.Function):
    """``round(x / scale) * scale`` for values that never clip.

    Its straight-through gradient is the identity.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        steps = x / scale
        # One buffer for all passes, for a fresh one costs as much as the pass that fills it.
        rounded = torch.round(steps) if torch.compiler.is_compiling() else steps.round_()
        return _dequantize(rounded, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor) -> Tensor:
        ctx.dtype = path.dtype
        return value.clone()  # a result that is an input itself would be a view of it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """Returns ``value``, whose gradient reaches ``path`` as it is.

    Args:
        value: has no gradient of its own.
        path: of the shape of ``value``.
    """
    return _StraightThrough.apply(value, path)


def _dequantize(
    rounded: Tensor, scale: Tensor, low: int | None = None, high: int | None = None
) -> Tensor:
    """``clamp(rounded, low, high) * scale``, in place of ``rounded`` where that is safe."""
    # torch 2.11 gives a Function whose result was computed in place no gradient
    if torch.compiler.is_compiling():
        return (rounded if low is None else rounded.clamp(low, high)) * scale
    return (rounded if low is None else rounded.clamp_(low, high)).mul_(scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, scheme: Scheme) -> Tensor:
    """Quantizes and dequantizes ``x``.

    It is differentiable in ``x``, and in ``scale`` if that requires a gradient.

    Args:
        x: values of any shape and floating type; computed in float32 whatever autocast says.
        scale: float32, positive; of shape ``[]``, or broadcastable to ``x`` with one entry a
            channel.
        zero_point: the integer that stands for 0.0.
        scheme: gives ``qmin`` and ``qmax``.

    Returns:
        float32 of the shape of ``x``, on the grid ``scale * (q - zero_point)``.
    """
    return fake_quantize_between(x, scale, scheme.qmin - zero_point, scheme.qmax - zero_point)


def fake_quantize_between(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale``, differentiable as ``fake_quantize`` is."""
    is_activation = scale.dim() == 0
    if is_activation and torch.compiler.is_compiling():
        return _FakeQuantizeCompiled.apply(x.float(), scale, low, high)
    return _FakeQuantize.apply(x.float(), scale, low, high)


def fake_quantize_from(
    x: Tensor, scale: Tensor, low: Tensor, zero_point: Tensor, scheme: Scheme
) -> Tensor:
    """``fake_quantize``, differentiable also in the smallest value of the range (LSQ+).

    Args:
        x: as in ``fake_quantize``.
        scale: of shape ``[]``.
        low: the smallest value, of shape ``[]``; it gets a gradient, and ``zero_point`` says which
            value of the grid it is.
        zero_point: ``zero_point_from(low, scale, scheme)``.
        scheme: affine.

    Returns:
        float32 of the shape of ``x``.
    """
    first = (scheme.qmin - zero_point).float()
    return _FakeQuantizeFrom.apply(x.float(), scale, low, first, scheme.qmax - scheme.qmin)


@torch.no_grad()
def zero_point_from(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The zero point with which the grid begins closest to ``low``: int32 of shape ``[]``."""
    zero_point = scheme.qmin - torch.round(low / scale)
    return zero_point.clamp(scheme.qmin, scheme.qmax).to(torch.int32)


def max_abs_scale(weight: Tensor, scheme: Scheme, channel_axis: int) -> Tensor:
    """The scale with which nothing clips: ``max|w| / qmax``.

    Returns:
        float32, ``[1, .., C, .., 1]``, or ``[1, ..]`` for a scheme of one scale a tensor.
    """
    dims = [d for d in range(weight.dim()) if not (scheme.per_channel and d == channel_axis)]
    values = weight.detach().float()
    # Two reductions that are vectorised; one of |w|, or the maximum norm, takes 2 to 9 times as
    # long on a CPU.
    largest = torch.maximum(values.amax(dims, keepdim=True), -values.amin(dims, keepdim=True))
    # A channel of zeros gets the smallest normal number: 0 / scale is 0 whatever the scale.
    return (largest / scheme.qmax).clamp_min(torch.finfo(torch.float32).tiny)


def quantize_weight(
    weight: Tensor, scale: Tensor | None, scheme: Scheme, channel_axis: int = 0
) -> Tensor:
    """Fake-quantizes a weight.

    Args:
        weight: of a conv or linear, output channels along ``channel_axis``.
        scale: as in ``fake_quantize``; None: it follows the weight's maximum, and nothing clips.
        scheme: symmetric.
        channel_axis: the dimension that has a scale for each entry.

    Returns:
        float32 of the weight's shape.
    """
    if scale is None:
        return _RoundToGrid.apply(weight.float(), max_abs_scale(weight, scheme, channel_axis))
    return fake_quantize(weight, scale, 0, scheme)
