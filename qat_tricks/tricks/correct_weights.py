"""Give each channel of the quantized weights the mean and variance of the float ones.

Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment" (arXiv 1810.05723),
section 4 ("per-channel bias correction"): ``w_q <- xi * (w_q + mu)`` with ``mu = E[w] - E[w_q]`` and
``xi = ||w - E[w]|| / ||w_q - E[w_q]||``.

Where this differs: a quantized weight cannot leave its grid. ``xi`` scales the weight and with it the scale, which
scales the quantized weight exactly; ``mu`` moves the weight before it is rounded, and is kept only where it brings the
quantized mean nearer without costing accuracy of the weights themselves.
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

    def quantized(weight: Tensor) -> Tensor:
        return layer.weight_quantizer(weight * mask)  # type: ignore[misc]

    weight = layer.weight.clone()
    shifted = weight + mean - _statistics(quantized(weight))[0]
    dims = list(range(1, weight.dim()))
    before, after = quantized(weight), quantized(shifted)
    closer = (_statistics(after)[0] - mean).abs() < (_statistics(before)[0] - mean).abs()
    dearer = (after - target).square().sum(dims, keepdim=True) > 1.05 * (before - target).square().sum(dims, keepdim=True)
    weight = torch.where(closer & ~dearer, shifted, weight)

    spread = _statistics(quantized(weight))[1]
    ratio = torch.where(spread > 0, std / spread.clamp_min(1e-30), torch.ones_like(std)).clamp(0.5, 2.0)
    layer.weight.copy_(weight * ratio)
    if layer.weight_quantizer.scale is not None:
        layer.weight_quantizer.scale.mul_(ratio)


class CorrectWeights(Trick):
    """Callback of ``correct_weights``."""

    requires = ("quantize",)

    def apply(self, work: Workbench) -> None:
        correct_weights(work.network)
