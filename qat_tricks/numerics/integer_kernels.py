"""The arithmetic of integer kernels between two grids, to the last bit.

A value that comes to lie just on the other side of a rounding boundary moves by a whole step, and a
deep network spreads it. So each function here rounds where ONNX Runtime's kernels on x86 with AVX2
and FMA round. Their requantization is a product in float32. Other runtimes may round elsewhere.

All values are floats: multiples of a scale on the way in and out, integers held in floats between.
"""

import torch
from torch import Tensor

from qat_tricks.numerics.quantizer import ActivationQuantizer


def requantize(accumulator: Tensor, step: Tensor, output: ActivationQuantizer) -> Tensor:
    """The output of a conv or linear, on the grid of ``output``, from its integer sums.

    Args:
        accumulator: sums of integer products, held in float32, any shape.
        step: input scale times weight scale, broadcastable to ``accumulator``.
        output: the quantizer behind the layer.

    Returns:
        float32 of the shape of ``accumulator``.
    """
    scale = output.current_scale()
    return _clamp(torch.round(accumulator * (step / scale)), output) * scale


def add(
    x: Tensor,
    y: Tensor,
    x_grid: ActivationQuantizer,
    y_grid: ActivationQuantizer,
    output: ActivationQuantizer,
) -> Tensor:
    """The sum of ``x`` and ``y``, each on its grid, on that of ``output``.

    As ``QLinearAdd`` does it: ``fma(qx, rx, fma(qy, ry, zero_point - fma(rx, zx, ry * zy)))`` with
    the ratios of the scales ``rx``, ``ry``. A fused multiply-add rounds once. Float64 in between
    reproduces that, for the product of two float32 is exact in it.
    """
    scale = output.current_scale()
    ratios = [(grid.current_scale() / scale).double() for grid in (x_grid, y_grid)]
    zero_points = [grid.current_zero_point().double() for grid in (x_grid, y_grid)]
    integers = [
        torch.round(values / grid.current_scale()) + grid.current_zero_point()
        for values, grid in ((x, x_grid), (y, y_grid))
    ]
    # fma(rx, zx, ry * zy): the inner product is rounded to float32, the outer one is not.
    zeros = (ratios[0] * zero_points[0] + (ratios[1] * zero_points[1]).float().double()).float()
    total = (output.current_zero_point().float() - zeros).double()
    # y first, then x, as the kernel nests its two fused operations.
    for quantized, ratio in ((integers[1], ratios[1]), (integers[0], ratios[0])):
        total = (quantized.double() * ratio + total).float().double()
    return _clamp(torch.round(total).float() - output.current_zero_point(), output) * scale


def multiply(
    x: Tensor,
    y: Tensor,
    x_grid: ActivationQuantizer,
    y_grid: ActivationQuantizer,
    output: ActivationQuantizer,
) -> Tensor:
    """The product of ``x`` and ``y``, each on its grid, on that of ``output``.

    As ``QLinearMul`` does it: ``round(qx * qy * ratio + zero_point)``, each operation in float32.
    """
    scale, x_scale, y_scale = (grid.current_scale() for grid in (output, x_grid, y_grid))
    total = (
        torch.round(x / x_scale) * torch.round(y / y_scale) * (x_scale * y_scale / scale)
        + output.current_zero_point()
    )
    return _clamp(torch.round(total) - output.current_zero_point(), output) * scale


def mean(
    x: Tensor, x_grid: ActivationQuantizer, output: ActivationQuantizer, *, keepdim: bool
) -> Tensor:
    """The average of ``x`` over height and width, on the grid of ``output``.

    ``x`` is ``[N, C, H, W]``, on its own grid.

    As ``QLinearGlobalAveragePool`` does it: the integers' sum, which is exact, times a ratio in
    float32. Averages of integers often lie in the middle between two steps.
    """
    scale, x_scale = output.current_scale(), x_grid.current_scale()
    # In float64 every sum of integers is exact; the kernel adds them in int32.
    total = torch.round(x / x_scale).sum((2, 3), keepdim=keepdim, dtype=torch.float64).float()
    return (
        _clamp(torch.round(total * (x_scale / (scale * (x.shape[2] * x.shape[3])))), output) * scale
    )


def _clamp(steps: Tensor, grid: ActivationQuantizer) -> Tensor:
    """Clamps multiples of a scale, in place, to those that the grid uses."""
    return steps.clamp_(*grid.steps)
