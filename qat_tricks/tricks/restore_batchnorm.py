"""Give folded layers a BatchNorm back for training, without a change of what is deployed.

A folded network has lost what made its training robust: at a learning rate that is ordinary for
the float network (SGD at 0.1 with momentum) its activations run away, and it ends at chance. So
each layer of which a BatchNorm was folded gets one for its output ``y``, with the statistics of
``y`` on calibration images::

    gamma = c * sqrt(var(y / c) + eps),   beta = mean(y),   w <- w / c

In evaluation that is the identity: whatever equalization and bias correction have done stays. In
training it normalizes by the batch (Ioffe and Szegedy 2015, arXiv 1502.03167). ``c`` gives each
channel of the weight the L2 norm that it had before folding. A normalized layer does not depend on
it, but the effect of a learning rate does (van Laarhoven 2017, arXiv 1706.05350, section 2).

Deployed is the folded layer, in every validation too: ``gamma / sqrt(var + eps)`` goes into the
weight and into its scale, one for each output channel, so the integers stay those of training.
Where this differs from folding inside the training step (Jacob et al. 2018, arXiv 1712.05877,
section 3.2): no conv runs twice, and the weights are quantized before they are multiplied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, call_network, check_batches
from qat_tricks.graph.layers import Layer, activation_quantizers, layers
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import give_batchnorm
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick, check_num_images

LAYERS = ("folded", "all")
EPS, MOMENTUM = 1e-5, 0.1  # of layers that never had a BatchNorm: PyTorch's defaults


@torch.no_grad()
def restore_batchnorm(
    traced: fx.GraphModule, batches: Sequence[Inputs], *, which: str = "folded"
) -> list[str]:
    """Gives layers of ``traced`` a BatchNorm, in place.

    Args:
        traced: a traced network, quantized and calibrated or not.
        batches: the network's inputs, for the statistics.
        which: ``folded``: layers of which a BatchNorm was folded, unless the user held it in
            evaluation mode; ``all``: each other conv too.

    Returns:
        The names of the layers.

    Raises:
        QatTricksError: no batches, or an unknown ``which``.
    """
    check_which(which)
    check_batches(batches, "to restore BatchNorm on")
    chosen = _layers_without(traced, which)
    if not chosen:
        return []
    with _statistics(chosen) as statistics, evaluating(traced), unrounded_sums(traced):
        for batch in track(batches, "restore BatchNorm"):
            call_network(traced, batch)
    for name, layer in chosen.items():
        # A layer that evaluation does not call, as in an auxiliary head, stays as it is.
        if statistics[name].count > 0:
            _restore(layer, statistics[name])
            norm: Any = layer.batchnorm
            entry = spec_of(traced).setdefault("layers", {}).setdefault(name, {})
            entry["batchnorm"] = {"eps": norm.eps, "momentum": norm.momentum}
    return [name for name, layer in chosen.items() if layer.batchnorm is not None]


def check_which(which: str) -> str:
    """Returns ``which``; raises QatTricksError if it is none of ``LAYERS``."""
    if which not in LAYERS:
        raise QatTricksError(f'which="{which}" is not allowed: give {" or ".join(LAYERS)}')
    return which


def _layers_without(traced: fx.GraphModule, which: str) -> dict[str, Layer]:
    """The layers to give a BatchNorm, by name."""
    return {
        name: layer
        for name, layer in layers(traced).items()
        if layer.batchnorm is None and _is_chosen(layer, which)
    }


def _is_chosen(layer: Layer, which: str) -> bool:
    if layer.folded is not None:
        return not layer.folded.is_frozen
    # A linear is most often the classifier, whose logits have no unit to be brought to.
    return which == "all" and layer.output_axis == 1


class _Moments:
    """Mean and variance of each channel, over any number of batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())  # of the differences to the mean, summed

    def add(self, values: Tensor) -> None:
        """Takes in ``values``, ``[n, C]`` (Chan et al. 1983, "Algorithms for computing …")."""
        values = values.double()
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The variance as a BatchNorm keeps it, ``[C]``."""
        return self.squares / max(1, self.count - 1)


@contextmanager
def _statistics(chosen: dict[str, Layer]) -> Iterator[dict[str, _Moments]]:
    """The moments of the layers' outputs in the block."""
    moments = {name: _Moments() for name in chosen}

    def listen(name: str, layer: Layer) -> Any:
        def take(_: Any, inputs: Any, output: Tensor) -> None:
            values = output.movedim(layer.output_axis, -1)
            moments[name].add(values.reshape(-1, values.shape[-1]))

        return layer.register_forward_hook(take)

    handles = [listen(name, layer) for name, layer in chosen.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _restore(layer: Layer, moments: _Moments) -> None:
    """Gives ``layer`` the BatchNorm that is the identity for outputs of these moments."""
    bias = 0.0 if layer.bias is None else layer.bias.double()
    folded = layer.folded
    eps, momentum = (EPS, MOMENTUM) if folded is None else (folded.eps, folded.momentum)
    change = _change_of_norm(layer)
    norm = give_batchnorm(layer, eps=eps, momentum=momentum)
    of_channels = change.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight.copy_(layer.weight.double() / of_channels)
    if layer.weight_quantizer is not None and layer.weight_quantizer.scale is not None:
        layer.weight_quantizer.scale.div_(of_channels)
    variance = (moments.variance / change.square()).to(norm.running_var.dtype)
    norm.running_var.copy_(variance)
    norm.running_mean.copy_((moments.mean - bias) / change)
    norm.weight.copy_(change * (variance.double() + eps).sqrt())
    # So that the deployed bias is the one that there was, whatever was rounded above.
    norm.bias.copy_(bias + norm.running_mean.double() * layer.normalization())


def _change_of_norm(layer: Layer) -> Tensor:
    """What to divide each channel's weight by, so that its norm is that before folding.

    Returns:
        float64, ``[C]``, positive.
    """
    now = layer.weight.double().flatten(1).norm(dim=1)
    before = None if layer.folded is None else layer.folded.norms
    if before is None:
        return torch.ones_like(now)
    before = before.to(now)
    # A channel of zeros has no norm to give.
    return torch.where((now > 0) & (before > 0), now / before, 1.0)


class RestoreBatchnorm(Trick):
    """Callback of ``restore_batchnorm``; where nothing is trained it does nothing."""

    after = ("quantize", "calibrate", "correct_weights", "correct_bias")

    def __init__(self, which: str = "folded", num_images: int = 512) -> None:
        super().__init__()
        self.which = check_which(which)
        self.num_images = check_num_images(num_images)

    def apply(self, work: Workbench) -> None:
        """Restores the BatchNorms."""
        # A fit resumed from a checkpoint of before this trick goes on without it: the values are
        # loaded only after the set-up.
        quantizers = activation_quantizers(work.network).values()
        is_resumed = not all(quantizer.is_calibrated for quantizer in quantizers)
        if work.trains and not is_resumed:
            restore_batchnorm(work.network, work.batches(self.num_images), which=self.which)
            work.note_change("BatchNorm restored", in_training=False)
