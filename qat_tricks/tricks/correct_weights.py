"""Give each channel of the quantized weights the mean and variance of the float ones.

Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment" (arXiv 1810.05723),
section 4 ("per-channel bias correction"): ``w_q <- xi * (w_q + mu)`` with ``mu = E[w] - E[w_q]`` and
``xi = ||w - E[w]|| / ||w_q - E[w_q]||``.

Where this differs: a quantized weight cannot leave its grid. ``xi`` scales the weight and with it the scale, which
scales the quantized weight exactly; ``mu`` moves the weight before it is rounded. Of no correction, ``xi`` alone, and both,
each channel keeps what brings its mean and standard deviation nearest to the float ones.
"""

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import Layer, layers
from qat_tricks.trick import Trick
from qat_tricks.workbench import Workbench


@torch.no_grad()
def correct_weights(traced: fx.GraphModule) -> fx.GraphModule:
    """Corrects every quantized layer of ``traced`` in place; raises QatTricksError if there is none."""
    quantized = [layer for layer in layers(traced).values() if layer.weight_quantizer is not None]
    if not quantized:
        raise QatTricksError("there are no quantized weights to correct: quantize the network first")
    for layer in quantized:
        _correct(layer)
    return traced


def _statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel, shape ``[C, 1, ..]``."""
    dims = list(range(1, weight.dim()))
    return weight.mean(dims, keepdim=True), weight.std(dims, keepdim=True, correction=0)


def _correct(layer: Layer) -> None:
    assert layer.weight_quantizer is not None
    target = layer.masked_weight().float()
    mask = torch.ones_like(target) if layer.weight_mask is None else layer.weight_mask
    mean, std = _statistics(target)

    quantizer = layer.weight_quantizer

    def quantized(weight: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
        scale = None if quantizer.scale is None else quantizer.current_scale(weight) * ratio
        return quantizer(weight * mask, scale)

    def rescaled(weight: Tensor) -> tuple[Tensor, Tensor]:
        spread = _statistics(quantized(weight))[1]
        ratio = torch.where(spread > 0, std / spread.clamp_min(1e-30), torch.ones_like(std)).clamp(0.5, 2.0)
        return weight * ratio, ratio

    weight = layer.weight.detach().float()
    best, best_ratio, best_error = weight, torch.ones_like(std), _distance(quantized(weight), mean, std)
    for candidate, ratio in (rescaled(weight), rescaled(weight + mean - _statistics(quantized(weight))[0])):
        error = _distance(quantized(candidate, ratio), mean, std)
        best, best_ratio, best_error = (
            torch.where(error < best_error, new, old)
            for new, old in ((candidate, best), (ratio, best_ratio), (error, best_error))
        )
    layer.weight.copy_(best)
    if layer.weight_quantizer.scale is not None:
        layer.weight_quantizer.scale.mul_(best_ratio)


def _distance(weight: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """How far mean and standard deviation of each channel are from ``mean`` and ``std``, ``[C, 1, ..]``."""
    got_mean, got_std = _statistics(weight)
    return (got_mean - mean).abs() + (got_std - std).abs()


class CorrectWeights(Trick):
    """Callback of ``correct_weights``."""

    requires = ("quantize",)

    def apply(self, work: Workbench) -> None:
        correct_weights(work.network)
