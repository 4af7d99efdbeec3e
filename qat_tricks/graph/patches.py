"""The rows that a conv or linear multiplies by its weight, and what becomes of each.

A conv is a product of matrices: each position of its output is a row of input values, its patch,
times the weight. Least squares over such rows decide on weights. There are far more of them than
are needed, so some are drawn from each image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat_tricks.graph.layers import Layer

# Rows that a layer's weights are fitted to: so many, and so many for each input.
ROWS, ROWS_AN_INPUT = 8192, 4
# Inputs of a channel, at most: the moments of more, as of VGG's first linear, would take gigabytes.
MOST_INPUTS = 8192


def groups_of(layer: Layer) -> int:
    """The number of groups of a conv; 1 of a linear."""
    return getattr(layer, "groups", 1)


def has_images(layer: Layer, output: Tensor) -> bool:
    """Whether an output has a dimension of images: a network may average them away."""
    return output.dim() > (1 if layer.output_axis == -1 else 1 + len(layer.kernel_size))  # type: ignore[arg-type]


def rows_of(
    layer: Layer, input: Tensor, output: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Some rows of a layer's input, and the same rows of an output.

    Args:
        layer: a conv or linear.
        input: a batch of its inputs.
        output: a batch of outputs of the same places, also of another network's layer.
        count: rows of each image at most; a linear without positions has one an image.
        generator: on the CPU, draws the rows.

    Returns:
        The inputs ``[groups, images * rows, K]`` with ``K`` in the order of ``weight[0].flatten()``
        and the outputs ``[groups, images * rows, channels]``.
    """
    images = len(output)
    # Of the output as [images, positions.., channels].
    positions = output.movedim(layer.output_axis, -1).shape[1:-1]
    total = math.prod(positions)
    drawn = torch.arange(total).expand(images, -1)
    if count < total:
        drawn = torch.rand(images, total, generator=generator).topk(count, dim=1).indices
    image = torch.arange(images).repeat_interleave(drawn.shape[1])
    place = torch.unravel_index(drawn.flatten(), positions) if positions else ()
    index = [part.to(output.device) for part in (image, *place)]
    if layer.output_axis == -1:
        return input[tuple(index)][None], output[tuple(index)][None]
    # The channels' dimension stands between; indexed so, the rows come first.
    index = [index[0], slice(None), *index[1:]]  # type: ignore[list-item]
    patches, outputs = windows_of(layer, input)[tuple(index)], output[tuple(index)]
    return _by_group(patches, groups_of(layer)), _by_group(outputs, groups_of(layer))


def rows_to_fit(
    layer: Layer,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """As many rows as weights are fitted to, as many of each image; float32.

    Args:
        layer: a conv or linear.
        inputs: of each batch, as of ``rows_of``.
        outputs: likewise.
        generator: on the CPU, draws the rows.

    Returns:
        As ``rows_of``, one batch behind the other.
    """
    wanted = max(ROWS, ROWS_AN_INPUT * layer.weight[0].numel())
    count = math.ceil(wanted / sum(map(len, outputs)))
    pairs = [
        rows_of(layer, input, output, count, generator)
        for input, output in zip(inputs, outputs, strict=True)
    ]
    found, beside = (torch.cat(parts, 1).float() for parts in zip(*pairs, strict=True))
    return found, beside


def weight_by_group(weight: Tensor, groups: int) -> Tensor:
    """A weight ``[channels, K..]`` as ``[groups, K, channels of a group]``."""
    return weight.reshape(groups, -1, weight[0].numel()).transpose(1, 2)


def windows_of(layer: Any, input: Tensor) -> Tensor:
    """What a conv multiplies by its weight at each position of its output.

    Returns:
        A view ``[images, channels, positions.., kernel..]`` of the padded input.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    values = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        # The new dimension is last, and has the entries between a dilated kernel's too.
        values = values.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return values


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """``[rows, groups * values..]`` as ``[groups, rows, values]``."""
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)
