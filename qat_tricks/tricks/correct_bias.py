"""Correct each layer's bias for the mean error that quantization causes, layer by layer, on data.

Nagel et al. 2019 (arXiv 1906.04721), section 4.2 and appendix D: ``b <- b + E[W x] - E[W_q x_q]``,
per output channel, where ``x_q`` already carries the errors of all (corrected) layers before.

Where this differs: the graph is walked once with a float and a quantized stream side by side, so
the cost is two forward passes, not one a layer; a tensor is dropped after its last use. And the
mean error is known from few images only: it is corrected as far as it is more than chance (James
and Stein 1961, "Estimation with quadratic loss").
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qat_tricks.graph.inputs import Inputs, check_batches
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.streams import Stream
from qat_tricks.graph.trace import module_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate


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
        bias: Tensor | None = layer.bias
        if layer.batchnorm is not None:  # which comes after the layer's bias
            bias = layer.batchnorm.bias  # type: ignore[assignment]
        if bias is None:
            continue
        error = _certain(_image_means(expected, layer) - _image_means(outputs, layer))
        bias.add_(error)
        # What follows sees the corrected output, without the layer being run again.
        for output in outputs:
            output.movedim(layer.output_axis, -1).add_(error)


def _image_means(outputs: Sequence[Tensor], layer: Layer) -> Tensor:
    """The mean over positions of each image and channel, ``[images, C]``, float64."""
    by_channel = (output.movedim(layer.output_axis, 1) for output in outputs)
    return torch.cat(
        [values.reshape(*values.shape[:2], -1).double().mean(2) for values in by_channel]
    )


def _certain(errors: Tensor) -> Tensor:
    """The mean of ``errors`` over images, shrunk by its own uncertainty.

    The mean of few images has a standard error ``se``. The estimate ``mean * (1 - (se / mean)^2)``,
    which never crosses zero, errs less.

    Args:
        errors: ``[images, C]``.

    Returns:
        float32, ``[C]``.
    """
    mean = errors.mean(0)
    # One image tells nothing of its uncertainty.
    if len(errors) < 2:
        return mean.float()
    # (se / mean)^2, with the variance of the mean in the place of se^2.
    chance = errors.var(0) / len(errors) / mean.square().clamp_min(1e-300)
    return (mean * (1 - chance).clamp_min(0)).float()


class CorrectBias(Trick):
    """Callback of ``correct_bias``."""

    requires = (Calibrate,)
    after = ("tune_ranges", "correct_weights")

    def __init__(self, num_images: int = 128) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Corrects against the float reference that ``quantize`` kept."""
        correct_bias(work.network, work.reference, work.batches(self.num_images))
        work.note_change("biases corrected", in_training=False)
