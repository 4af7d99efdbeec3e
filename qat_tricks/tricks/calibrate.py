"""Estimate the range of every activation on a few images."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import activation_quantizers, float_mode
from qat_tricks.numerics import make_estimator
from qat_tricks.progress import track
from qat_tricks.trick import Trick, check_num_images
from qat_tricks.workbench import Workbench


@torch.no_grad()
def calibrate(traced: fx.GraphModule, batches: Sequence[Tensor], *, estimator: str = "mse") -> fx.GraphModule:
    """Runs ``batches`` through the float function of ``traced`` and sets every activation quantizer's range.

    Args:
        traced: a network with quantizers.
        batches: images as the network takes them, ``[N, C, H, W]`` each.
        estimator: ``minmax``, ``moving_average``, ``percentile``, ``mse`` or ``kl``.

    Raises:
        QatTricksError: no quantizers, no batches, values that are not finite, or an unknown estimator.
    """
    quantizers = activation_quantizers(traced)
    if not quantizers:
        raise QatTricksError("there is nothing to calibrate: quantize the network first")
    if not batches:
        raise QatTricksError("there are no images to calibrate on: give a loader that yields at least one batch")
    was_training = traced.training
    traced.eval()
    try:
        for quantizer in quantizers.values():
            quantizer.observer = make_estimator(estimator)
        with float_mode(traced):
            for batch in track(batches, "calibrate"):
                traced(batch)
        for quantizer in quantizers.values():
            assert quantizer.observer is not None
            quantizer.set_range(*quantizer.observer.range(quantizer.scheme))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        traced.train(was_training)
    return traced


class Calibrate(Trick):
    """Callback of ``calibrate``."""

    requires = ("quantize",)

    def __init__(self, estimator: str = "mse", num_images: int = 512) -> None:
        super().__init__()
        make_estimator(estimator)  # a wrong name is refused now
        self.estimator, self.num_images = estimator, check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        calibrate(work.network, work.batches(self.num_images), estimator=self.estimator)
