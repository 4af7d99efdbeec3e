"""Train with the parameters that the user trained, without a change of what is deployed.

Folding and equalization keep a network's function, and change what a learning rate means for it. A
folded network has lost what made its training robust: at a rate that is ordinary for the float
network (SGD at 0.1 with momentum) its activations run away, and it ends at chance. Equalization
multiplies parameters by factors, and a gradient by their inverse. So before training:

* Each layer of which a BatchNorm was folded gets one for its output ``y``, with the statistics of
  ``y`` on training images. In evaluation that is the identity, so whatever the tricks before
  have done stays. In training it normalizes by the batch (Ioffe and Szegedy 2015, arXiv
  1502.03167)::

      gamma = c * sqrt(var(y / c) + eps),   beta = mean(y),   w <- w / c

  ``c`` gives each channel of the weight the L2 norm that it had before folding. A normalized layer
  does not depend on it, but the effect of a learning rate does (van Laarhoven 2017, arXiv
  1706.05350, section 2).
* The factors of equalization become constants beside the parameters: ``w = factor * w_trained``.

Deployed are the products, in every validation too: ``gamma / sqrt(var + eps)`` goes into the weight
and into its scale, one for each output channel, so the integers stay those of training. Where this
differs from folding inside the training step (Jacob et al. 2018, arXiv 1712.05877, section 3.2): no
conv runs twice, and the weights are quantized before they are multiplied.

The statistics are those of the images that training has, with their augmentation. (Measured on
ResNet-20 and CIFAR-10: with those of images that are not shifted, the first step's loss was twice
the float network's, and int8_prune30 ended 2.4 points below it.)

At high rates running statistics lag behind the weights: a network that gave 98 % with the batch's
statistics gave 67 % with the running ones. So the last step is followed by an estimate from images,
which counts as far as it differs from the running ones by more than chance. A callback that
averages weights makes a network of its own, whose statistics none of those are: its copy gets an
estimate too.
"""

from collections import Counter
from collections.abc import Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, call_network, check_batches, map_tensors
from qat_tricks.graph.layers import Equalized, Layer, layers
from qat_tricks.graph.modes import evaluating, unrounded_sums
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import give_batchnorm, give_factors
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.averaging import averaged_networks
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.schedule import is_last_batch
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.reestimate_batchnorm import last_batches, reestimate_batchnorm

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

LAYERS = ("folded", "all")
EPS, MOMENTUM = 1e-5, 0.1  # of layers that never had a BatchNorm: PyTorch's defaults


@torch.no_grad()
def restore_batchnorm(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    *,
    which: str = "folded",
    frozen: bool = False,
) -> list[str]:
    """Gives layers of ``traced`` a BatchNorm, and parameters before equalization, in place.

    Args:
        traced: a traced network, quantized and calibrated or not.
        batches: the network's inputs, for the statistics.
        which: ``folded``: layers of which a BatchNorm was folded, unless the user held it in
            evaluation mode; ``all``: each other conv too. A layer that is called several times
            stays as it is, for each call has statistics of its own.
        frozen: whether layers of which nothing trains get one too. They are best left as they are,
            unless they are to be unfrozen.

    Returns:
        The names of the layers that have a BatchNorm now.

    Raises:
        QatTricksError: no batches, or an unknown ``which``.
    """
    check_which(which)
    check_batches(batches, "to restore BatchNorm on")
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    chosen = {
        name: layer
        for name, layer in layers(traced).items()
        if layer.batchnorm is None and calls[name] == 1 and _is_chosen(layer, which, frozen)
    }
    statistics = _statistics(traced, chosen, batches) if chosen else {}
    entries = spec_of(traced).setdefault("layers", {})
    for name, layer in layers(traced).items():
        entry = entries.setdefault(name, {})
        if layer.equalized is not None and layer.weight_factor is None:
            entry["factors"] = True
            _undo_scaling(layer, layer.equalized)
        # A layer that evaluation does not call, as in an auxiliary head, stays as it is.
        if name in statistics:
            norm = _restore(layer, statistics[name])
            entry["batchnorm"] = {"eps": norm.eps, "momentum": norm.momentum}
    return list(statistics)


def check_which(which: str) -> str:
    """Returns ``which``; raises QatTricksError if it is none of ``LAYERS``."""
    if which not in LAYERS:
        raise QatTricksError(f'which="{which}" is not allowed: give {" or ".join(LAYERS)}')
    return which


def _is_chosen(layer: Layer, which: str, frozen: bool) -> bool:
    folded = layer.folded
    if folded is None:
        # A linear is most often the classifier, whose logits have no unit to be brought to.
        has_one, trains = which == "all" and layer.output_axis == 1, False
    else:
        has_one, trains = not folded.is_frozen, folded.weight_trains or folded.bias_trains
    return has_one and (frozen or trains or layer.weight.requires_grad)


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


def _statistics(
    traced: fx.GraphModule, chosen: dict[str, Layer], batches: Sequence[Inputs]
) -> dict[str, _Moments]:
    """The moments of the outputs of those layers that evaluation calls."""
    moments = {name: _Moments() for name in chosen}

    def listen(name: str, layer: Layer) -> Any:
        def take(_: Any, inputs: Any, output: Tensor) -> None:
            values = output.movedim(layer.output_axis, -1)
            moments[name].add(values.reshape(-1, values.shape[-1]))

        return layer.register_forward_hook(take)

    handles = [listen(name, layer) for name, layer in chosen.items()]
    try:
        with evaluating(traced), unrounded_sums(traced):
            for batch in track(batches, "restore BatchNorm"):
                call_network(traced, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found for name, found in moments.items() if found.count > 0}


def _undo_scaling(layer: Layer, equalized: Equalized) -> None:
    """Lets ``layer`` train its parameters as they were before equalization."""
    give_factors(layer)
    assert layer.weight_factor is not None
    assert layer.output_factor is not None
    shape = layer.weight_factor.shape
    # A kernel's positions have one factor, so the first of them is that of all.
    inputs = equalized.inputs[tuple(slice(size) for size in shape)]
    layer.weight_factor.copy_(inputs * layer.of_channels(equalized.outputs))
    layer.output_factor.copy_(equalized.outputs)
    layer.weight.div_(layer.weight_factor)
    if layer.bias is not None:
        layer.bias.div_(layer.output_factor)


def _restore(layer: Layer, moments: _Moments) -> Any:
    """Gives ``layer`` the BatchNorm that is the identity for outputs of these moments."""
    scale, bias = torch.ones_like(moments.mean), torch.zeros_like(moments.mean)
    if layer.output_factor is not None:
        # The gain is multiplied by it, so the weight is not.
        scale = layer.output_factor.double()
        assert layer.weight_factor is not None
        layer.weight_factor.div_(layer.of_channels(layer.output_factor))
        layer.weight.mul_(layer.of_channels(layer.output_factor))
    if layer.bias is not None:
        bias = layer.bias.double() * scale
    folded = layer.folded
    eps, momentum = (EPS, MOMENTUM) if folded is None else (folded.eps, folded.momentum)
    change = _change_of_norm(layer)
    norm = give_batchnorm(layer, eps=eps, momentum=momentum)
    layer.weight.copy_(layer.weight.double() / layer.of_channels(change))
    if layer.weight_quantizer is not None and layer.weight_quantizer.scale is not None:
        layer.weight_quantizer.scale.div_(layer.of_channels(change))
    norm.running_var.copy_(moments.variance / change.square())
    norm.running_mean.copy_((moments.mean - bias) / change)
    norm.weight.copy_(change * (norm.running_var.double() + eps).sqrt() / scale)
    # So that the deployed bias is the one that there was, whatever was rounded above.
    norm.bias.copy_((bias + norm.running_mean.double() * layer.normalization()) / scale)
    return norm


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
    """Callback of ``restore_batchnorm``; where nothing is trained it does nothing.

    Args:
        which: as of ``restore_batchnorm``.
        num_images: for the first statistics, and for the last.
        reestimate: whether the statistics are estimated anew after the last step, before the last
            validation and checkpoint; after a fit that is stopped early, when it has ended. So are
            those of networks that callbacks average.
    """

    after = ("quantize", "calibrate", "correct_weights", "correct_bias")

    def __init__(
        self, which: str = "folded", num_images: int = 512, reestimate: bool = True
    ) -> None:
        super().__init__()
        self.which = check_which(which)
        self.num_images = check_num_images(num_images)
        self.reestimate = reestimate
        self._is_due = self._averages_are_due = self._has_ended = False

    def apply(self, work: Workbench) -> None:
        """Restores the BatchNorms."""
        # A fit resumed from a checkpoint of before this trick goes on without it: the values are
        # loaded only after the set-up.
        is_resumed = work.restored is not None and self.name not in work.restored
        if work.trains and not is_resumed:
            images = work.training_batches(self.num_images)
            restore_batchnorm(work.network, images, which=self.which, frozen=work.unfreezes)
            work.note_change("BatchNorm restored", in_training=False)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """A fit begins, after which the statistics are to be estimated."""
        self._is_due = self._averages_are_due = self.reestimate
        self._has_ended = False

    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *_: Any) -> None:
        """Estimates the statistics anew after the last step."""
        if self._is_due and is_last_batch(trainer):
            self._reestimate(pl_module)

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Estimates those of averages before the last validation puts them to use."""
        if self._has_ended:
            self._reestimate_averages(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Estimates those of averages before the last checkpoint."""
        if self._has_ended:
            self._reestimate_averages(trainer, pl_module)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Estimates them after a fit that was stopped before what could be foreseen."""
        if self._is_due:
            self._reestimate(pl_module)
        self._reestimate_averages(trainer, pl_module)  # before they become the network

    def _reestimate(self, pl_module: "LightningModule") -> None:
        self._is_due, self._has_ended = False, True
        work = workbench_of(pl_module)
        has_batchnorm = _has_batchnorm(work.network)
        batches = last_batches(work, self.num_images) if has_batchnorm else []
        if batches:
            reestimate_batchnorm(work.network, batches, keep_certain=True)

    def _reestimate_averages(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        is_due, self._averages_are_due = self._averages_are_due, False
        work = workbench_of(pl_module)
        averages = averaged_networks(trainer, work.network_name) if is_due else []
        networks = [network for network in averages if _has_batchnorm(network)]
        batches = last_batches(work, self.num_images) if networks else []
        for network in networks if batches else ():
            # The copy may be kept on another device.
            to_device = methodcaller("to", next(network.parameters()).device)
            moved = [map_tensors(batch, to_device) for batch in batches]
            reestimate_batchnorm(network, moved, keep_certain=True)


def _has_batchnorm(network: fx.GraphModule) -> bool:
    return any(layer.batchnorm is not None for layer in layers(network).values())
