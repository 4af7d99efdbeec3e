"""Round each layer's weights by least squares, so that its output errs least.

Frantar and Alistarh 2022, "Optimal Brain Compression" (arXiv 2208.11580); Frantar et al. 2022,
"GPTQ" (arXiv 2210.17323). The formulas are in ``numerics.least_squares``.

Where this differs: a layer aims at the *float* network's output on the inputs that the *quantized*
network gives it, as in Li et al. 2025, "GPTAQ" (arXiv 2504.02692). So its weights are first fitted
to these inputs, which takes up errors of the layers before. Means are left to the bias, which is
fitted last: the moments are those about the means. Weights with a scale of their own, 4 bits and
fewer, get the scale with which the *rounded* weights err least. That of others follows their
largest weight, which therefore stays the largest.

And what the activation function behind a layer drops harms nobody. Nagel et al. 2020, "AdaRound"
(arXiv 2004.10568), equation 25, measure the error behind that function. To first order, a sum then
counts by how likely it passes with its error. Each output channel so has moments of its own; where
these would take minutes, all sums count alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.activation_limits import activation_limits
from qat_tricks.graph.inputs import Inputs, check_batches
from qat_tricks.graph.layers import Layer, as_layer, layers
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.patches import MOST_INPUTS, has_images, rows_to_fit, weight_by_group
from qat_tricks.graph.streams import Stream
from qat_tricks.graph.submodules import layer_at, module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics import WeightQuantizer
from qat_tricks.numerics.least_squares import GridRounder, Moments, fitted_change
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

# Every so many images are kept apart, to judge the fit.
UNSEEN = 4
# Products that a layer may take where each channel has its own moments: about a minute of a core.
# To solve for K weights takes as long as the moments of so many rows for each of them.
MOST_PRODUCTS, ROWS_TO_SOLVE = 2**41, 16
# Images of an output that are looked at together.
IMAGES = 8
# Of these moments, the entries in memory at once.
MOST_ENTRIES = 2**24
# Sums that an activation function drops count so much: other images may have others.
LEAST_SHARE = 0.05


@torch.no_grad()
def gptq(
    traced: fx.GraphModule, reference: fx.GraphModule, batches: Sequence[Inputs], *, seed: int = 0
) -> fx.GraphModule:
    """Fits and rounds the weights and biases of the quantized layers of ``traced``, in place.

    A layer that the network calls in several places is left as it is; of one with more than
    ``MOST_INPUTS`` inputs a channel, only the bias is fitted. Pruned weights stay 0, and
    the others of their layer take up what is missing.

    Args:
        traced: the quantized, calibrated network.
        reference: the float network it was made from, with the same layers.
        batches: the network's inputs, a batch each: images ``[N, C, H, W]``, or a tuple with one
            tensor for each input.
        seed: of the choice of positions.

    Raises:
        QatTricksError: no quantized layer, no batches, or ``reference`` is another network.
    """
    check_batches(batches, "to round weights on")
    if all(layer.weight_quantizer is None for layer in layers(traced).values()):
        raise QatTricksError("there are no quantized weights to round: quantize the network first")
    generator = torch.Generator().manual_seed(seed)
    # A sum that is rounded to its grid hides errors below half a step from the bias.
    with evaluating(traced, reference), unrounded_sums(traced):
        quantized, floats = Stream(traced, batches), Stream(reference, batches)
        uses = n.uses_of_weights(traced)
        for node in track(list(traced.graph.nodes), "round weights"):
            layer = module_of(node, traced)
            if not isinstance(layer, Layer) or layer.weight_quantizer is None:
                quantized.advance()
                continue
            # The float network lacks the quantizers' nodes, so it is met by name.
            targets = floats.run_until(node.name)
            # Several calls share one weight, and only the first one's inputs are known by now. So
            # does whatever else reads the parameter, such as an embedding.
            passing = None
            is_alone = n.is_used_once(node, uses)
            is_fitted = is_alone and has_images(layer, targets[0])
            if is_fitted and layer.weight[0].numel() <= MOST_INPUTS:
                original = as_layer(layer_at(reference, str(node.target)))
                weight = original.deployed_weight().float()
                rows = _Rows(layer, quantized.inputs_of(node), targets, generator)
                passing = rows.passing(layer, *activation_limits(node, traced))
                _set_weight(layer, *_fitted(layer, weight, rows, passing))
            outputs = quantized.advance()
            if is_alone:
                _fit_bias(layer, outputs, targets, passing)
    return traced


class _Rows:
    """Rows of a layer's inputs and of its targets, a few of each image.

    Attributes:
        inputs: ``[groups, rows, K]``.
        targets: ``[groups, rows, channels]``.
        image: of each row, ``[rows]``.
    """

    def __init__(
        self,
        layer: Layer,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        generator: torch.Generator,
    ) -> None:
        # A bias takes up every constant.
        self.is_centered = layer.output_bias is not None
        self.inputs, self.targets = rows_to_fit(layer, inputs, targets, generator)
        # Each image has as many rows as another.
        rows, images = self.inputs.shape[1], sum(map(len, targets))
        self.image = torch.arange(rows) // (rows // images)

    def passing(self, layer: Layer, low: float, high: float) -> "_Passing | None":
        """How likely the layer's sums pass its activation function, or None: all count alike.

        Args:
            layer: with its weights rounded to the nearest, whose errors are expected.
            low: the least value that the function yields.
            high: the largest.
        """
        size = layer.weight[0].numel()
        products = layer.weight.numel() * size * (self.inputs.shape[1] + ROWS_TO_SOLVE * size)
        if math.isinf(low) or products > MOST_PRODUCTS:
            return None
        errors = self.targets - self.inputs @ weight_by_group(
            layer.effective_weight(), len(self.inputs)
        )
        if self.is_centered:
            errors -= errors.mean(1, keepdim=True)
        return _Passing(low=low, high=high, error=errors.square().mean(1).sqrt().flatten())

    def moments(
        self, weight: Tensor, part: slice, passing: "_Passing | None"
    ) -> tuple[Moments, Moments]:
        """The moments of most images, and those of the images that are kept apart.

        Args:
            weight: whose errors are meant, ``[channels, K..]``.
            part: of the channels; of several groups, whole ones.
            passing: of all channels.
        """
        inputs, targets = self.inputs, self.targets
        if len(inputs) > 1:
            groups = slice(part.start // targets.shape[2], part.stop // targets.shape[2])
            inputs, targets = inputs[groups], targets[groups]
        else:
            targets = targets[:, :, part]
        errors = targets - inputs @ weight_by_group(weight[part], len(inputs))
        is_unseen = (self.image % UNSEEN == UNSEEN - 1).to(inputs.device)
        chosen = (~is_unseen, is_unseen)
        if passing is None:
            if self.is_centered:
                inputs, errors = (rows - rows.mean(1, keepdim=True) for rows in (inputs, errors))
            seen, unseen = (Moments.of(inputs[:, rows], errors[:, rows]) for rows in chosen)
            return seen, unseen
        shares = passing.shares(targets.transpose(0, 1).flatten(1), part)
        shares = shares.unflatten(1, (len(inputs), -1)).transpose(0, 1)
        seen, unseen = (
            Moments.weighted(
                inputs[:, rows], errors[:, rows], shares[:, rows], is_centered=self.is_centered
            )
            for rows in chosen
        )
        return seen, unseen


@dataclass(frozen=True, kw_only=True)
class _Passing:
    """How likely the sums of a layer pass its activation function.

    Attributes:
        low: the least value that the function yields.
        high: the largest.
        error: the standard deviation of each channel's sums from the float ones, ``[channels]``.
    """

    low: float
    high: float
    error: Tensor

    def shares(self, sums: Tensor, part: slice = slice(None)) -> Tensor:
        """By how much each of the float network's sums counts, above 0 and at most 1.

        Args:
            sums: ``[.., channels]``.
            part: of the channels, which ``sums`` has.
        """
        error = self.error[part].clamp_min(torch.finfo(sums.dtype).tiny)
        passes = torch.special.ndtr((sums - self.low) / error)
        if math.isfinite(self.high):
            passes *= torch.special.ndtr((self.high - sums) / error)
        return LEAST_SHARE + (1 - LEAST_SHARE) * passes


def _fitted(
    layer: Layer, weight: Tensor, rows: _Rows, passing: _Passing | None
) -> tuple[Tensor, Tensor]:
    """The weight that a layer is to be deployed with, on its grid, and the scale.

    Args:
        layer: with a quantizer.
        weight: the float weight, ``[channels, K..]``.
        rows: what the layer is fitted to.
        passing: see ``_Rows.passing``.

    Returns:
        ``[channels, K..]``, and a scale that broadcasts to it.
    """
    count = len(weight)
    if passing is not None:
        count = max(1, MOST_ENTRIES // weight[0].numel() ** 2)
        if len(rows.inputs) > 1:  # whole groups of a grouped conv
            channels = rows.targets.shape[2]
            count = max(channels, count // channels * channels)
    found = []
    for begin in range(0, len(weight), count):
        part = slice(begin, min(begin + count, len(weight)))
        mask = None if layer.weight_mask is None else layer.weight_mask[part]
        moments = rows.moments(weight, part, passing)
        found.append(_rounded(layer.weight_quantizer, weight[part], mask, *moments))
    on_grid, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
    return on_grid, layer.of_channels(scale)


def _rounded(
    quantizer: WeightQuantizer | None,
    weight: Tensor,
    mask: Tensor | None,
    seen: Moments,
    unseen: Moments,
) -> tuple[Tensor, Tensor]:
    """Some channels' weights on their grid, and the scale of each, ``[channels]``."""
    assert quantizer is not None
    moments = seen.inputs + unseen.inputs
    fitted = weight_by_group(weight, len(moments)) + fitted_change(seen, unseen)
    pruned = None if mask is None else weight_by_group(mask, len(moments)) == 0
    rounder = GridRounder(moments, quantizer.scheme.qmax)
    integers, scale = rounder.fit(fitted, pruned, fits_scale=quantizer.scale is not None)
    on_grid = (integers * scale[:, None]).transpose(1, 2).reshape(weight.shape)
    return on_grid, scale.flatten()


def _set_weight(layer: Layer, weight: Tensor, scale: Tensor) -> None:
    """Gives a layer the weight, and a scale of its own the value, that it is deployed with."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = layer.weight_to_deploy(weight)
    if layer.batchnorm is not None:
        factor = layer.of_channels(layer.normalization()).to(weight.dtype)
        scale = torch.where(factor != 0, scale / factor.abs(), quantizer.current_scale(weight))
    layer.weight.copy_(weight)
    if quantizer.scale is not None:
        quantizer.scale.copy_(scale)


def _fit_bias(
    layer: Layer, outputs: Sequence[Tensor], targets: Sequence[Tensor], passing: _Passing | None
) -> None:
    """Moves a layer's bias, and its ``outputs`` along, until their mean is that of ``targets``.

    Values count by how likely they pass the activation function.
    """
    bias = layer.output_bias
    if bias is None:
        return
    error = torch.zeros_like(bias, dtype=torch.float64)
    counted = torch.zeros_like(error)
    for output, target in zip(outputs, targets, strict=True):
        # A few images at once: all of them are large beside what the layer needs.
        for values, wanted in zip(output.split(IMAGES), target.split(IMAGES), strict=True):
            values, wanted = (v.movedim(layer.output_axis, -1) for v in (values, wanted))
            values, wanted = (v.reshape(-1, len(bias)) for v in (values, wanted))
            shares = torch.ones_like(wanted) if passing is None else passing.shares(wanted)
            error += ((wanted - values) * shares).sum(0, dtype=torch.float64)
            counted += shares.sum(0, dtype=torch.float64)
    error /= counted
    bias.add_(layer.bias_change(error.to(bias.dtype)))
    # What follows sees the corrected output, without the layer being run again.
    for output in outputs:
        output.movedim(layer.output_axis, -1).add_(error.to(output.dtype))


class Gptq(Trick):
    """Callback of ``gptq``."""

    requires = (Calibrate,)
    after = ("tune_ranges", "mixed_precision", "correct_weights")
    judged = True

    def __init__(self, num_images: int = 256) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Rounds against the float reference that ``quantize`` kept."""
        gptq(work.network, work.reference, work.batches(self.num_images))
        work.note_change("weights rounded by least squares", in_training=False)
