"""Correct each layer's bias for the error that quantization causes, layer by layer, on data.

Nagel et al. 2019 (arXiv 1906.04721), section 4.2 and appendix D: ``b <- b + E[W x] - E[W_q x_q]``,
per output channel, where ``x_q`` already carries the errors of all (corrected) layers before.

Where this differs: what the next layer reads counts, and not the sum before the ReLU. Most sums of
a sparse network lie below 0, where the ReLU drops them. Low bits shrink weights, so these sums are
too small in absolute value; their mean is made right by a *lower* bias, which shrinks the values
above 0 a second time. (Measured on SqueezeNet, W4A8, 300 images: -10 points without correction, -45
with the mean, -4 with this.) So the bias is the one of least squared error behind the activation
function, ``argmin_b E[(f(W_q x_q + b) - f(W x))^2]``; without such a function that is the formula
above.

The graph is walked once with a float and a quantized stream side by side, so the cost is two
forward passes, not one a layer; a tensor is dropped after its last use. And the error is known
from few images only: it is corrected as far as it is more than chance (James and Stein 1961,
"Estimation with quadratic loss").
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qat_tricks.graph.activation_limits import activation_limits
from qat_tricks.graph.inputs import Inputs, check_batches
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.streams import Stream
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

POSITIONS = 256  # of each image and channel that are looked at, at most about
STEPS = 6  # of Newton's method, at most
TOLERANCE = 1e-3  # the share by which a step has to lessen a squared error
AT_ONCE = 2**20  # values of a layer; what lies in the cache takes half of the time


@torch.no_grad()
def correct_bias(
    traced: fx.GraphModule, reference: fx.GraphModule, batches: Sequence[Inputs]
) -> fx.GraphModule:
    """Corrects the biases of ``traced`` in place; a layer without a bias is left as it is.

    Args:
        traced: the quantized, calibrated network.
        reference: the float network it was made from, with the same layers.
        batches: the network's inputs, a batch each: images ``[N, C, H, W]``, or a tuple with one
            tensor for each input.

    Raises:
        QatTricksError: no batches, or ``reference`` is another network.
    """
    check_batches(batches, "to correct biases on")
    # A sum that is rounded to its grid hides errors below half a step.
    with evaluating(traced, reference), unrounded_sums(traced):
        _correct(traced, Stream(traced, batches), Stream(reference, batches))
    return traced


def _correct(traced: fx.GraphModule, quantized: Stream, reference: Stream) -> None:
    """Walks both networks side by side and corrects each layer before the next one runs."""
    for node in track(list(traced.graph.nodes), "correct bias"):
        layer = module_of(node, traced)
        if not isinstance(layer, Layer) or layer.weight_quantizer is None:
            quantized.advance()
            continue
        # The float network lacks the quantizers' nodes, so it is met by name.
        expected = reference.run_until(node.name)
        outputs = quantized.advance()
        bias = layer.output_bias
        if bias is None:
            continue
        low, high = activation_limits(node, traced)
        error = bias_error(_samples(outputs, layer), _samples(expected, layer), low, high)
        bias.add_(layer.bias_change(error))
        # What follows sees the corrected output, without the layer being run again.
        for output in outputs:
            output.movedim(layer.output_axis, -1).add_(error)


def _samples(outputs: Sequence[Tensor], layer: Layer) -> Tensor:
    """The outputs of a layer at some of their positions, ``[images, C, positions]``."""
    parts = []
    for output in outputs:
        values = output.movedim(layer.output_axis, 1)
        values = values.reshape(*values.shape[:2], -1)
        # An odd stride visits every column, also where the width is a power of two.
        stride = max(1, values.shape[2] // POSITIONS) | 1
        parts.append(values[:, :, ::stride])
    # Images of several sizes: each counts with as many positions as the smallest.
    least = min(part.shape[2] for part in parts)
    return torch.cat([part[:, :, :least] for part in parts]).float()


def bias_error(values: Tensor, expected: Tensor, low: float, high: float) -> Tensor:
    """What to add to the biases of a layer, so that its clamped output errs least.

    Args:
        values: of the quantized layer, ``[images, C, positions]``.
        expected: of the float layer.
        low: the least value that the activation function yields.
        high: the largest.

    Returns:
        float32, ``[C]``.
    """
    # Channels know nothing of each other.
    channels = max(1, AT_ONCE // (values.shape[0] * values.shape[2]))
    pairs = zip(values.split(channels, 1), expected.split(channels, 1), strict=True)
    return torch.cat([_bias_error(*pair, low, high) for pair in pairs])


def _bias_error(values: Tensor, expected: Tensor, low: float, high: float) -> Tensor:
    """``bias_error`` of some channels, each of which is looked at a few times."""
    target = expected.clamp(low, high)

    def look(bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The squared error of each channel, and each image's mean error and share inside."""
        shifted = values + bias[:, None]
        residual = shifted.clamp(low, high) - target
        inside = (shifted > low) & (shifted < high)
        gradient = (residual * inside).mean(2).double()
        return residual.square().mean((0, 2)), gradient, inside.float().mean(2).double()

    best = torch.zeros(values.shape[1], device=values.device)
    least = torch.full_like(best, float("inf"))
    gradients = torch.zeros(values.shape[:2], dtype=torch.float64, device=values.device)
    shares = torch.zeros_like(gradients)
    # The error has several minima. Two places to begin at: no correction, and equal means.
    for start in (best, (expected - values).mean((0, 2))):
        bias = start
        for _ in range(STEPS):
            squared, gradient, share = look(bias)
            better = squared < least * (1 - TOLERANCE)
            if not better.any():  # all channels have converged
                break
            best, least = torch.where(better, bias, best), torch.where(better, squared, least)
            gradients = torch.where(better, gradient, gradients)
            shares = torch.where(better, share, shares)
            # A channel that is hardly ever inside would take a step without bounds.
            bias = bias - (gradient.mean(0) / share.mean(0).clamp_min(1e-2)).float()
    return _certain(best, gradients / shares.mean(0).clamp_min(1e-2))


def _certain(error: Tensor, by_image: Tensor) -> Tensor:
    """``error``, shrunk by its own uncertainty.

    What few images tell has a standard error ``se``. The estimate ``error * (1 - (se / error)^2)``,
    which never crosses zero, errs less.

    Args:
        error: ``[C]``.
        by_image: by how much each image would have it otherwise, ``[images, C]``, float64.

    Returns:
        float32, ``[C]``.
    """
    # One image tells nothing of its uncertainty.
    if len(by_image) < 2:
        return error.float()
    # (se / error)^2, with the variance of the mean in the place of se^2.
    chance = by_image.var(0) / len(by_image) / error.double().square().clamp_min(1e-300)
    return (error.double() * (1 - chance).clamp_min(0)).float()


class CorrectBias(Trick):
    """Callback of ``correct_bias``."""

    requires = (Calibrate,)
    after = ("tune_ranges", "mixed_precision", "correct_weights", "gptq", "learned_rounding")
    judged = True

    def __init__(self, num_images: int = 128) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Corrects against the float reference that ``quantize`` kept."""
        correct_bias(work.network, work.reference, work.batches(self.num_images))
        work.note_change("biases corrected", in_training=False)
