"""Estimate the range of every activation on a few images.

Tensors that are added, and their sum, may share one range. Then the add rounds nothing, for the sum
of two integers of one scale is an integer of that scale. In return, tensors of smaller values are
rounded more coarsely than on grids of their own. The rounding noise of a range is ``scale^2 / 12``
a value (Widrow and Kollár 2008, "Quantization Noise", section 3.2); the choice with less noise in
sum is taken. Long residual streams without an activation function, as in MobileNetV2, gain most.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.finite import check_finite
from qat_tricks.graph.inputs import Inputs, call_network, check_batches
from qat_tricks.graph.integer_ops import Add
from qat_tricks.graph.layers import activation_quantizers
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.settle import settle_grids
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.graph.surgery import share_quantizer
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics import ActivationQuantizer, RangeEstimator, make_estimator
from qat_tricks.numerics.scheme import SMALLEST_SCALE
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.quantize import Quantize


@torch.no_grad()
def calibrate(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    *,
    estimator: str = "mse",
    share_residuals: bool = True,
) -> fx.GraphModule:
    """Sets the range of every activation quantizer from the float values of ``batches``.

    Args:
        traced: a network with quantizers.
        batches: the network's inputs, a batch each: images ``[N, C, H, W]``, or a tuple with one
            tensor for each input.
        estimator: ``minmax``, ``moving_average``, ``percentile``, ``mse`` or ``kl``.
        share_residuals: whether tensors that are added share a range where that rounds less.

    Raises:
        QatTricksError: no quantizers, no batches, values or parameters that are not finite, values
            too small or too large for integer kernels, or an unknown estimator.
    """
    quantizers = activation_quantizers(traced)
    if not quantizers:
        raise QatTricksError("there is nothing to calibrate: quantize the network first")
    check_batches(batches, "to calibrate on")
    check_finite(traced)
    observers = {quantizer: make_estimator(estimator) for quantizer in quantizers.values()}
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        # In float, so that the range of a tensor does not depend on the grids before it.
        with evaluating(traced), float_mode(traced):
            for batch in track(batches, "calibrate"):
                call_network(traced, batch)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    for quantizer, observer in observers.items():
        quantizer.set_range(*observer.range(quantizer.scheme))
    _check_scales(quantizers)
    if share_residuals:
        _share_residuals(traced, observers)
    settle_grids(traced)
    return traced


def _check_scales(quantizers: Mapping[str, ActivationQuantizer]) -> None:
    """Refuses a network whose values kernels cannot multiply in float32 (QatTricksError).

    A tensor or two of nearly nothing are common, as those of dead channels, and do no harm.
    """
    scales = {name: float(quantizer.scale) for name, quantizer in quantizers.items()}
    small = [name for name, scale in scales.items() if scale <= SMALLEST_SCALE]
    large = [name for name, scale in scales.items() if scale > 1 / SMALLEST_SCALE]
    if large or len(small) * 2 > len(scales):
        name = (large or small)[0]
        low, high = quantizers[name].range
        limits = f"{SMALLEST_SCALE:.0e} to {1 / SMALLEST_SCALE:.0e}"
        raise QatTricksError(
            f'"{name.removeprefix(f"{QUANTIZERS}.")}" has values from {low:.0e} to {high:.0e}, and '
            f"integer kernels need steps of {limits}: scale the network's inputs or weights"
        )


def _share_residuals(
    traced: fx.GraphModule, observers: Mapping[ActivationQuantizer, RangeEstimator]
) -> None:
    quantizers = {
        name.removeprefix(f"{QUANTIZERS}."): quantizer
        for name, quantizer in activation_quantizers(traced).items()
    }
    # A quantizer of several tensors rounds each of them.
    nodes = {
        quantizer: len(spec_of(traced)["activations"][name]["nodes"])
        for name, quantizer in quantizers.items()
    }
    for stream, sums in _streams(traced):
        # The first observer takes in the others: none of them is needed again.
        merged, *others = (observers[quantizer] for quantizer in stream)
        for other in others:
            merged.merge(other)
        shared, _ = stream[0].scheme.qparams(*merged.range(stream[0].scheme))
        apart = sum(
            nodes[quantizer] * float(quantizer.current_scale()) ** 2 for quantizer in stream
        )
        # Both sides lack the factor 1 / 12. A sum on the shared grid rounds nothing: no noise.
        if (sum(nodes[quantizer] for quantizer in stream) - sums) * shared**2 < apart:
            stream[0].set_range(*merged.range(stream[0].scheme))
            share_quantizer(
                traced, [name for name, quantizer in quantizers.items() if quantizer in stream]
            )


def _streams(traced: fx.GraphModule) -> list[tuple[list[ActivationQuantizer], int]]:
    """The sets of quantizers whose values are only added, each with its number of sums."""
    order = list(activation_quantizers(traced).values())
    streams: list[tuple[set[ActivationQuantizer], int]] = []
    # A grid with a ReLU, or of other bits, cannot be shared with one without.
    for add in traced.modules():
        if not isinstance(add, Add) or {(q.scheme, q.activation) for q in add.quantizers} != {
            (add.quantizers[0].scheme, None)
        }:
            continue
        joined, sums = set(add.quantizers), 1
        # An add may join streams that were apart until now, as at the end of a residual block.
        for stream in [stream for stream in streams if stream[0] & joined]:
            streams.remove(stream)
            joined, sums = joined | stream[0], sums + stream[1]
        streams.append((joined, sums))
    return [(sorted(stream, key=order.index), sums) for stream, sums in streams if len(stream) > 1]


class Calibrate(Trick):
    """Callback of ``calibrate``."""

    requires = (Quantize,)
    quantizes = True

    def __init__(
        self, estimator: str = "mse", num_images: int = 512, share_residuals: bool = True
    ) -> None:
        super().__init__()
        make_estimator(estimator)  # a wrong name is refused now
        self.estimator, self.num_images, self.share_residuals = (
            estimator,
            check_num_images(num_images),
            share_residuals,
        )

    def apply(self, work: Workbench) -> None:
        """Calibrates the network on the first ``num_images`` training images."""
        batches = work.batches(self.num_images)
        calibrate(
            work.network, batches, estimator=self.estimator, share_residuals=self.share_residuals
        )
