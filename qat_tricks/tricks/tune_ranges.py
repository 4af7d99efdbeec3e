"""Choose where each activation is clipped by the effect on the logits.

A range estimator weighs all values of a tensor alike, yet clipping errs the same way in every
position and adds up on the way to the logits, where rounding errors cancel. To first order,
quantizing a tensor ``x`` changes the log-likelihood of a label by ``g · (Q(x) - x)`` with ``g`` its
gradient; averaged over labels that the float network itself would draw, the square of this is the
loss of the Fisher information: Li et al. 2021, "BRECQ" (arXiv 2102.05426), equations 5 to 9.

Where this differs: errors are summed over a tensor with their signs before they are squared (BRECQ
keeps the diagonal, which loses that clipping adds up and rounding does not), and one histogram of
gradients by value, an image and a tensor, serves all ranges that are tried.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import (
    Inputs,
    as_tensors,
    batch_size,
    call_network,
    check_batches,
    map_tensors,
)
from qat_tricks.graph.layers import activation_quantizers, is_calibrated
from qat_tricks.graph.logits import check_batch_first, class_logits, logits_of
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.settle import settle_grids
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

BINS = 4096  # of a histogram: 16 for each step of 8 bits
CHUNK = 8  # images whose gradients are held at a time
# Ends of a range are tried from so far inside to a little outside of the calibrated ones; the
# latter first, so that it stays where nothing is better.
FACTORS = (1.0, *(step / 100 for step in range(20, 109, 2) if step != 100))


def tune_ranges(
    traced: fx.GraphModule, batches: Sequence[Inputs], *, seed: int = 0
) -> fx.GraphModule:
    """Sets every activation quantizer of ``traced`` to the range that changes the logits least.

    The ranges tried lie within the calibrated one, or a little beyond it.

    Args:
        traced: a quantized, calibrated network. Calibrate it with ``minmax``: values that other
            estimators clip stay clipped.
        batches: the network's inputs, a batch each: images ``[N, C, H, W]``, or a tuple with one
            tensor for each input.
        seed: of the labels drawn.

    Raises:
        QatTricksError: a quantizer without range, no batches, or logits without a batch dimension.
    """
    quantizers = activation_quantizers(traced)
    if not is_calibrated(traced):
        raise QatTricksError(
            "there are no calibrated ranges to tune: quantize and calibrate the network first"
        )
    check_batches(batches, "to tune ranges on")
    trainable = [parameter for parameter in traced.parameters() if parameter.requires_grad]
    histograms = [_GradientHistogram(quantizer) for quantizer in quantizers.values()]
    generator = torch.Generator().manual_seed(seed)
    chunks = [
        chunk
        for batch in batches
        # All inputs of a network are split alike: their first dimension is the images.
        for chunk in zip(*(part.split(CHUNK) for part in as_tensors(batch)), strict=True)
    ]
    traced.requires_grad_(False)  # only gradients of activations are needed
    try:
        # Lightning tests and validates in inference mode, in which nothing has a gradient.
        with (
            evaluating(traced),
            float_mode(traced),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            for chunk in track(chunks, "tune ranges"):
                # A clone is an ordinary tensor, also of one that was made in inference mode.
                inputs = map_tensors(chunk, Tensor.clone)
                likelihoods = _log_likelihoods(traced, inputs)
                # Drawn on the CPU, so that a seed gives the same labels on every device.
                labels = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=generator)
                # The sum keeps images apart: each gradient belongs to one of them.
                likelihoods.gather(1, labels.to(likelihoods.device)).sum().backward()
    finally:
        for histogram in histograms:
            histogram.handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()
    for histogram in histograms:
        histogram.tune()
    settle_grids(traced)
    return traced


def _log_likelihoods(traced: fx.GraphModule, inputs: Inputs) -> Tensor:
    """The log-likelihood of each class, also where two have one logit.

    Returns:
        ``[N, classes]``; ``[N * positions, classes]`` where each position has logits of its own.
    """
    logits = logits_of(call_network(traced, inputs))
    check_batch_first(logits, batch_size(inputs))
    by_class = class_logits(logits).movedim(1, -1)
    return by_class.reshape(-1, by_class.shape[-1]).log_softmax(1)


class _GradientHistogram:
    """For each image, the sum of the gradients of all values in a bin: ``[images, BINS]``."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.low, self.high = quantizer.range
        self.first = self.low * FACTORS[-1]
        self.width = max((self.high - self.low) * FACTORS[-1], 1e-30) / BINS
        self.sums: list[Tensor] = []
        self.handle = quantizer.register_forward_hook(self._see)

    def _see(self, module: object, inputs: object, output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it does
            output = output.requires_grad_().clone()
        images = len(output)
        bins = (
            ((output.detach() - self.first) / self.width)
            .long()
            .clamp_(0, BINS - 1)
            .reshape(images, -1)
        )
        # Each image has a row of bins; one flat index addresses them all.
        bins += BINS * torch.arange(images, device=bins.device).view(-1, 1)

        def add(gradient: Tensor) -> None:
            sums = torch.zeros(images * BINS, device=gradient.device)
            self.sums.append(
                sums.index_add_(0, bins.flatten(), gradient.flatten()).view(images, BINS)
            )

        output.register_hook(add)
        return output

    def tune(self) -> None:
        """Sets the quantizer to the best range.

        One end is tried after the other, twice: they interact only through the step between them.
        """
        if not self.sums:  # the logits do not depend on it: no range is better than another
            return
        sums = torch.cat(self.sums).double().cpu()
        centers = self.first + self.width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
        if self.quantizer.scheme.symmetric:  # one end follows from the other
            low, high = self._best(sums, centers, [(factor, factor) for factor in FACTORS])
            self.quantizer.set_range(self.low * low, self.high * high)
            return
        low = high = 1.0
        for _ in range(2):
            high = self._best(sums, centers, [(low, factor) for factor in FACTORS])[1]
            if self.low < 0:
                low = self._best(sums, centers, [(factor, high) for factor in FACTORS])[0]
        self.quantizer.set_range(self.low * low, self.high * high)

    def _best(
        self, sums: Tensor, centers: Tensor, factors: list[tuple[float, float]]
    ) -> tuple[float, float]:
        scheme = self.quantizer.scheme
        errors = []
        for low, high in factors:
            scale, zero_point = scheme.qparams(self.low * low, self.high * high)
            # The error that each bin's values get from rounding and clipping.
            steps = torch.round(centers / scale).clamp_(
                scheme.qmin - zero_point, scheme.qmax - zero_point
            )
            errors.append(steps.mul_(scale).sub_(centers))
        # First the signed errors of an image are summed, then their squares over images.
        return factors[int((sums @ torch.stack(errors, 1)).square().sum(0).argmin())]


class TuneRanges(Trick):
    """Callback of ``tune_ranges``."""

    requires = (Calibrate,)
    judged = True

    def __init__(self, num_images: int = 128) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Tunes the ranges on the first ``num_images`` training images."""
        tune_ranges(work.network, work.batches(self.num_images))
