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
    """Corrects every quantized layer of ``traced`` in place.

    Raises:
        QatTricksError: there is no quantized layer.
    """
    quantized = [layer for layer in layers(traced).values() if layer.weight_quantizer is not None]
    if not quantized:
        raise QatTricksError(
            "there are no quantized weights to correct: quantize the network first"
        )
    for layer in quantized:
        # Taken before the first step, which moves weights.
        spread = _spread(layer.masked_weight().float())
        _match_mean(layer)
        _match_spread(layer, spread)
    return traced


def _spread(weight: Tensor) -> Tensor:
    """The standard deviation of each output channel, shape ``[C, 1, ..]``."""
    return weight.std(list(range(1, weight.dim())), keepdim=True, correction=0)


def _match_mean(layer: Layer) -> None:
    """Rounds some weights to the other side; a scale that follows the largest weight stays."""
    quantizer, weight = layer.weight_quantizer, layer.masked_weight().detach().float()
    assert quantizer is not None
    scheme, scale = quantizer.scheme, quantizer.current_scale(weight)
    exact = weight / scale
    nearest = steps = torch.round(exact).clamp_(scheme.qmin, scheme.qmax)
    # Weights that clip, that set the scale, or that are pruned stay.
    movable = (exact.abs() < scheme.qmax) & (weight != 0)
    # First each kernel, then each output channel, whose errors are smaller by then.
    for kernels in (exact.flatten(2) if exact.dim() > 2 else None, exact.flatten(1)):
        if kernels is not None:
            steps = _balance(
                kernels, steps.reshape(kernels.shape), movable.reshape(kernels.shape)
            ).reshape(exact.shape)
    # Only moved weights change: the others keep their exact values for training.
    layer.weight.copy_(torch.where(steps != nearest, steps * scale, layer.weight))


def _match_spread(layer: Layer, target: Tensor) -> None:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    got = _spread(quantizer(layer.masked_weight().float()))
    # Bounded, since a channel that rounds to (nearly) nothing has no useful ratio.
    ratio = torch.where(got > 0, target / got.clamp_min(1e-30), 1.0).clamp(0.5, 2.0)
    layer.weight.mul_(ratio)
    if quantizer.scale is not None:
        quantizer.scale.mul_(ratio)


def _balance(exact: Tensor, steps: Tensor, movable: Tensor) -> Tensor:
    """Moves some ``steps`` by one, so that the errors of each row sum to nearly nothing.

    Those with the largest error in the direction of the sum are moved. A weight that was moved
    before has changed the sign of its error.

    Args:
        exact: weights in steps; a row is the last dimension.
        steps: the same, rounded.
        movable: which of them may move.
    """
    error = steps - exact
    surplus = error.sum(-1, keepdim=True).round()
    towards = torch.where(movable, error * surplus.sign(), -torch.inf)
    # Sorting the sorted order gives each entry its rank.
    rank = towards.argsort(-1, descending=True).argsort(-1)
    # Only errors of the sum's own sign: moving others would leave a weight more than a step from
    # its value.
    return torch.where((rank < surplus.abs()) & (towards > 0), steps - surplus.sign(), steps)


class CorrectWeights(Trick):
    """Callback of ``correct_weights``."""

    requires = (Quantize,)
    judged = True
    after = ("mixed_precision",)

    def apply(self, work: Workbench) -> None:
        """Corrects every quantized layer of the network."""
        correct_weights(work.network)
        work.note_change("weights corrected", in_training=False)
