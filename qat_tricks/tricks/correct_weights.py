"""Give each channel of the quantized weights the mean and variance of the float ones.

Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for
rapid-deployment" (arXiv 1810.05723), section 4 ("per-channel bias correction"): ``w_q <- xi * (w_q
+ mu)`` with ``mu = E[w] - E[w_q]`` and ``xi = ||w - E[w]|| / ||w_q - E[w_q]||``.

Where this differs: a quantized weight cannot leave its grid. ``mu`` cannot shift all weights by
less than a step; so a few of them, those nearest to the middle between two steps, are rounded to
the other side until the errors of each kernel, and then of each channel, sum to no more than half a
step (Guo et al. 2022, "SQuant", arXiv 2202.07471, section 3.3). ``xi`` scales the weight and with
it the scale, which scales the quantized weight exactly.
"""

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import Layer, layers
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.trick import Trick
from qat_tricks.tricks.quantize import Quantize


@torch.no_grad()
def correct_weights(traced: fx.GraphModule) -> fx.GraphModule:
    """Corrects every quantized layer of ``traced`` in place; raises QatTricksError if there is
    none.
    """
    quantized = [layer for layer in layers(traced).values() if layer.weight_quantizer is not None]
    if not quantized:
        raise QatTricksError(
            "there are no quantized weights to correct: quantize the network first"
        )
    for layer in quantized:
        spread = _spread(layer.masked_weight().float())
        _match_mean(layer)
        _match_spread(layer, spread)
    return traced


def _spread(weight: Tensor) -> Tensor:
    """The standard deviation of each output channel, shape ``[C, 1, ..]``."""
    return weight.std(list(range(1, weight.dim())), keepdim=True, correction=0)


def _match_mean(layer: Layer) -> None:
    """Rounds some weights to the other side; a scale that follows the largest weight stays as it
    is.
    """
    quantizer, weight = layer.weight_quantizer, layer.masked_weight().detach().float()
    assert quantizer is not None
    scheme, scale = quantizer.scheme, quantizer.current_scale(weight)
    exact = weight / scale
    nearest = steps = torch.round(exact).clamp_(scheme.qmin, scheme.qmax)
    # not what clips, sets the scale, or is pruned
    movable = (exact.abs() < scheme.qmax) & (weight != 0)
    for kernels in (exact.flatten(2) if exact.dim() > 2 else None, exact.flatten(1)):
        if kernels is not None:
            steps = _balance(
                kernels, steps.reshape(kernels.shape), movable.reshape(kernels.shape)
            ).reshape(exact.shape)
    layer.weight.copy_(torch.where(steps != nearest, steps * scale, layer.weight))


def _match_spread(layer: Layer, target: Tensor) -> None:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    got = _spread(quantizer(layer.masked_weight().float()))
    ratio = torch.where(got > 0, target / got.clamp_min(1e-30), 1.0).clamp(0.5, 2.0)
    layer.weight.mul_(ratio)
    if quantizer.scale is not None:
        quantizer.scale.mul_(ratio)


def _balance(exact: Tensor, steps: Tensor, movable: Tensor) -> Tensor:
    """Moves ``steps`` by one, where ``movable``, so that the errors of each row (the last
    dimension) sum to nearly nothing.

    Those with the largest error in the direction of the sum are moved; one that was moved before
    has its error elsewhere.
    """
    error = steps - exact
    surplus = error.sum(-1, keepdim=True).round()
    towards = torch.where(movable, error * surplus.sign(), -torch.inf)
    rank = towards.argsort(-1, descending=True).argsort(-1)
    # Only errors of the sum's own sign: moving others would leave a weight more than a step from
    # its value.
    return torch.where((rank < surplus.abs()) & (towards > 0), steps - surplus.sign(), steps)


class CorrectWeights(Trick):
    """Callback of ``correct_weights``."""

    requires = (Quantize,)

    def apply(self, work: Workbench) -> None:
        correct_weights(work.network)
