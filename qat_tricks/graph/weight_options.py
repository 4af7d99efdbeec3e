"""A layer's weight with other bits, as the tricks that follow would leave it.

Weights that are rounded to the nearest err far more than weights that ``gptq`` and
``correct_bias`` have treated, and not by the same factor in each layer. So each option is rounded
by least squares on the float network's own inputs, and the bias takes up the mean of the error.
(Measured on MobileNetV1-0.25, 4 bits on average: the bits that errors of nearest rounding choose
leave three times the divergence.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.inputs import Inputs
from qat_tricks.graph.layers import Layer, layers
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.other_bits import OWN_SCALE_BITS
from qat_tricks.graph.patches import MOST_INPUTS, has_images, rows_to_fit, weight_by_group
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.sensitivity import Change
from qat_tricks.graph.streams import Stream
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import WeightQuantizer
from qat_tricks.numerics.least_squares import GridRounder
from qat_tricks.numerics.scheme import Scheme
from qat_tricks.progress import track


@dataclass(frozen=True, kw_only=True)
class WeightOption:
    """A layer's weight with some number of bits, as it would be deployed.

    Attributes:
        bits: how many.
        integers: int8, of the weight's shape: all options of a network are in memory at once.
        scale: broadcasts to them.
        shift: what the mean of the output lacks with them, ``[C]``; None where no bias can take it.
    """

    bits: int
    integers: Tensor
    scale: Tensor
    shift: Tensor | None


@torch.no_grad()
def weight_options(
    traced: fx.GraphModule, batches: Sequence[Inputs], bits_of: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], WeightOption]:
    """Rounds weights to each of several grids, with the rest of the network in float.

    Args:
        traced: the quantized network; it stays as it is.
        batches: of its inputs.
        bits_of: layers by name, each with the bits to try. One that the network calls in several
            places is rounded for the first.

    Returns:
        Each layer's options, by its name and the bits.
    """
    found: dict[tuple[str, int], WeightOption] = {}
    done: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    # A network may draw random numbers in evaluation too.
    with evaluating(traced), float_mode(traced), kept_random_state():
        stream = Stream(traced, batches)
        for node in track(list(traced.graph.nodes), "round weights"):
            name, layer = str(node.target), module_of(node, traced)
            if name not in bits_of or name in done or not isinstance(layer, Layer):
                stream.advance()
                continue
            inputs, outputs = stream.inputs_of(node), stream.advance()
            rows = None
            if has_images(layer, outputs[0]):
                rows, _ = rows_to_fit(layer, inputs, outputs, generator)
            options = _options_of(layer, rows, bits_of[name])
            found |= {(name, option.bits): option for option in options}
            done.add(name)
    return found


def _options_of(layer: Layer, rows: Tensor | None, bits: Sequence[int]) -> list[WeightOption]:
    """The options of one layer, by rows of its inputs, ``[groups, rows, K]``, if there are any."""
    deployed = layer.deployed_weight().float()
    # A bias takes up every constant.
    mean = None if rows is None or layer.output_bias is None else rows.mean(1, keepdim=True)
    rounder = None if rows is None else _rounder(rows if mean is None else rows - mean)
    options = []
    for number in bits:
        if rounder is None:
            integers, scale = _nearest(layer, deployed, number)
        else:
            integers, scale = _least_squares(layer, rounder, deployed, number)
        shift = None
        if mean is not None:
            error = deployed - integers * scale
            shift = (mean @ weight_by_group(error, len(mean))).flatten()
        options.append(
            WeightOption(bits=number, integers=integers.to(torch.int8), scale=scale, shift=shift)
        )
    return options


def _rounder(rows: Tensor) -> GridRounder | None:
    """By the moments of ``rows``, ``[groups, rows, K]``; None where there would be too many."""
    if rows.shape[2] > MOST_INPUTS:
        return None
    # Their unit does not matter, and squares of large numbers would leave float32's range.
    rows = torch.ldexp(rows, -torch.frexp(rows.abs().amax()).exponent)
    return GridRounder(rows.transpose(1, 2) @ rows, 0)


def _least_squares(
    layer: Layer, rounder: GridRounder, deployed: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Integers in the weight's shape, and a scale that broadcasts to them."""
    groups, mask = len(rounder.moments), layer.weight_mask
    pruned = None if mask is None else weight_by_group(mask, groups) == 0
    integers, scale = rounder.with_limit(_scheme(layer, bits).qmax).fit(
        weight_by_group(deployed, groups), pruned, fits_scale=bits <= OWN_SCALE_BITS
    )
    return integers.transpose(1, 2).reshape(deployed.shape), layer.of_channels(scale.flatten())


def _nearest(layer: Layer, deployed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same of a layer whose inputs' moments are not to be had."""
    quantizer = WeightQuantizer(_scheme(layer, bits), channel_axis=layer.channel_axis)
    quantizer.to(deployed.device)
    if bits <= OWN_SCALE_BITS:
        quantizer.fit_mse(deployed)
    scale, limit = quantizer.current_scale(deployed), quantizer.scheme.qmax
    return (deployed / scale).round_().clamp_(-limit, limit), scale


def _scheme(layer: Layer, bits: int) -> Scheme:
    assert layer.weight_quantizer is not None
    return replace(layer.weight_quantizer.scheme, bits=bits)


def weight_on_grid(traced: fx.GraphModule, name: str, option: WeightOption) -> Change:
    """The weight and bias of the layer ``name`` as ``option`` has them."""
    layer = layers(traced)[name]

    @contextmanager
    def applied() -> Iterator[None]:
        weight, bias, shift = layer.weight, layer.output_bias, option.shift
        owner: Any = layer if layer.batchnorm is None else layer.batchnorm
        deployed = (option.integers * option.scale).to(weight.dtype)
        # Other objects: what else reads a parameter, such as an embedding, keeps its values.
        layer.weight = nn.Parameter(layer.weight_to_deploy(deployed), requires_grad=False)
        if bias is not None and shift is not None:
            moved = bias + layer.bias_change(shift.to(bias.dtype))
            owner.bias = nn.Parameter(moved, requires_grad=False)
        try:
            yield
        finally:
            layer.weight, owner.bias = weight, bias

    return Change(module=name, applied=applied)
