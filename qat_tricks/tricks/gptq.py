"""Round each layer's weights by least squares, so that its output errs least.

Frantar and Alistarh 2022, "Optimal Brain Compression" (arXiv 2208.11580); Frantar et al. 2022,
"GPTQ" (arXiv 2210.17323). The formulas are in ``numerics.least_squares``.

Where this differs: a layer aims at the *float* network's output on the inputs that the *quantized*
network gives it, as in Li et al. 2025, "GPTAQ" (arXiv 2504.02692). So its weights are first fitted
to these inputs, which takes up errors of the layers before. Means are left to the bias, which is
fitted last: the moments are those about the means. Weights with a scale of their own, 4 bits and
fewer, get the scale with which the *rounded* weights err least. That of others follows their
largest weight, which therefore stays the largest.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.inputs import Inputs, check_batches
from qat_tricks.graph.layers import Layer, as_layer, layers
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.patches import rows_of
from qat_tricks.graph.streams import Stream
from qat_tricks.graph.submodules import layer_at, module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics.least_squares import GridRounder, Moments, fitted_change
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

# Rows that a layer's weights are fitted to: so many, and so many for each input.
ROWS, ROWS_AN_INPUT = 8192, 4
# Inputs of a channel, at most: the moments of more, as of VGG's first linear, would take gigabytes.
MOST_INPUTS = 8192
# Every so many images are kept apart, to judge the fit.
UNSEEN = 4


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
            is_alone = n.is_used_once(node, uses)
            if is_alone and layer.weight[0].numel() <= MOST_INPUTS:
                original = as_layer(layer_at(reference, str(node.target)))
                weight = original.deployed_weight().float()
                rows = _Rows(layer, quantized.inputs_of(node), targets, generator)
                _set_weight(layer, *_rounded(layer, weight, *rows.moments(weight)))
            outputs = quantized.advance()
            if is_alone:
                _fit_bias(layer, outputs, targets)
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
        wanted = max(ROWS, ROWS_AN_INPUT * layer.weight[0].numel())
        images = sum(map(len, targets))
        pairs = [
            rows_of(layer, input, target, math.ceil(wanted / images), generator)
            for input, target in zip(inputs, targets, strict=True)
        ]
        self.inputs = torch.cat([pair[0] for pair in pairs], 1).float()
        self.targets = torch.cat([pair[1] for pair in pairs], 1).float()
        # Each image has as many rows as another.
        self.image = torch.arange(self.inputs.shape[1]) // (self.inputs.shape[1] // images)

    def moments(self, weight: Tensor) -> tuple[Moments, Moments]:
        """The moments of most images, and those of the images that are kept apart.

        Args:
            weight: whose errors are meant, ``[channels, K..]``.
        """
        inputs, errors = self.inputs, self.targets - self.inputs @ _by_group(weight, self.inputs)
        if self.is_centered:
            inputs, errors = (rows - rows.mean(1, keepdim=True) for rows in (inputs, errors))
        is_unseen = (self.image % UNSEEN == UNSEEN - 1).to(inputs.device)
        seen, unseen = (
            Moments.of(inputs[:, chosen], errors[:, chosen]) for chosen in (~is_unseen, is_unseen)
        )
        return seen, unseen


def _by_group(weight: Tensor, rows: Tensor) -> Tensor:
    """A weight ``[channels, K..]`` as ``[groups, K, channels]``, for ``rows`` of ``K`` inputs."""
    return weight.reshape(len(rows), -1, rows.shape[-1]).transpose(1, 2)


def _rounded(layer: Layer, weight: Tensor, seen: Moments, unseen: Moments) -> tuple[Tensor, Tensor]:
    """The weight that a layer is to be deployed with, on its grid, and the scale.

    Args:
        layer: with a quantizer.
        weight: the float weight, ``[channels, K..]``.
        seen: the moments of most images.
        unseen: those of the others.

    Returns:
        ``[channels, K..]``, and a scale that broadcasts to it.
    """
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    moments, limit = seen.inputs + unseen.inputs, quantizer.scheme.qmax
    fitted = _by_group(weight, moments) + fitted_change(seen, unseen)
    # Pruned weights are 0, and weights that come later take up their part.
    held = None
    if layer.weight_mask is not None:
        kept = _by_group(layer.weight_mask, moments) != 0
        held = torch.where(kept, torch.nan, 0.0)
    rounder = GridRounder(moments, limit)
    if quantizer.scale is not None:
        scale = rounder.fit_scale(fitted, held)
    else:
        free = fitted if held is None else torch.where(held.isnan(), fitted, 0.0)
        largest = free.abs().argmax(1, keepdim=True)
        value = free.gather(1, largest)
        scale = value[:, 0].abs().clamp_min(torch.finfo(value.dtype).tiny) / limit
        # The scale would change with the largest weight, and with it the grid of all others.
        held = torch.full_like(fitted, torch.nan) if held is None else held
        held = held.scatter(1, largest, value.sign() * limit)
    integers, _ = rounder.round(fitted, scale, held)
    on_grid = (integers * scale[:, None]).transpose(1, 2).reshape(weight.shape)
    return on_grid, layer.of_channels(scale.flatten())


def _set_weight(layer: Layer, weight: Tensor, scale: Tensor) -> None:
    """Gives a layer the weight, and a scale of its own the value, that it is deployed with."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    if layer.batchnorm is not None:
        # A channel that the BatchNorm multiplies by 0 stays as it is.
        factor = layer.of_channels(layer.normalization()).to(weight.dtype)
        weight = torch.where(factor != 0, weight / factor, layer.weight)
        scale = torch.where(factor != 0, scale / factor.abs(), quantizer.current_scale(weight))
    layer.weight.copy_(weight)
    if quantizer.scale is not None:
        quantizer.scale.copy_(scale)


def _fit_bias(layer: Layer, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Moves a layer's bias, and its ``outputs`` along, until their mean is that of ``targets``."""
    bias = layer.output_bias
    if bias is None:
        return
    error = (_sum(targets, layer) - _sum(outputs, layer)) / sum(
        output.numel() // len(bias) for output in outputs
    )
    bias.add_(error.to(bias.dtype))
    # What follows sees the corrected output, without the layer being run again.
    for output in outputs:
        output.movedim(layer.output_axis, -1).add_(error.to(output.dtype))


def _sum(outputs: Sequence[Tensor], layer: Layer) -> Tensor:
    """The sum over all positions and images, ``[channels]``, float64."""
    by_channel = [output.movedim(layer.output_axis, -1) for output in outputs]
    # All dimensions but the last; numbers of float32 are added in float64 without a copy of them.
    sums = [
        values.sum(tuple(range(values.dim() - 1)), dtype=torch.float64) for values in by_channel
    ]
    return torch.stack(sums).sum(0)


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
