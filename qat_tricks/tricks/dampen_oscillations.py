"""Keep low-bit weights from oscillating between two integers.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086): near
the middle between two integers the straight-through gradient drives a weight back and forth, up to
the last step. What is deployed is then a matter of chance, and BatchNorm's statistics lag behind.

* ``dampen`` (section 4.2) adds ``weight(t) * ||clip(w) - q(w)||^2`` to the loss, where ``q`` puts
  on the grid and has no gradient. ``weight(t)`` rises from 0 as half a cosine.
* ``freeze`` (section 4.3) follows each weight's integer. A change against the direction of the last
  one is an oscillation; their frequency is a moving average over steps. A weight that oscillates
  more often than ``threshold(t)``, which falls as half a cosine, keeps for good the integer next to
  the moving average of its integers. The scale goes on learning: it is the integer that holds
  still.

Where this differs: the gradient of the added loss, ``2 * weight(t) * (clip(w) - q(w))``, is added
when a step is made instead of passing through autograd. So a step of several batches has it once,
and steps by hand have it too. Pruned weights are neither pulled nor frozen. Weights whose scale
follows their largest value, of 5 and more bits, have steps too small to matter and are left alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.layers import Layer, layers
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.module import workbench_of
from qat_tricks.trainer.schedule import fit_progress
from qat_tricks.trainer.trick import Trick

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

METHODS = ("freeze", "dampen", "both")


def low_bit_layers(traced: fx.GraphModule) -> dict[str, Layer]:
    """The layers of ``traced`` whose weights have a scale of their own, by name.

    Raises:
        QatTricksError: there are none.
    """
    found = {
        name: layer
        for name, layer in layers(traced).items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.scale is not None
    }
    if not found:
        raise QatTricksError(
            "no layer has weights of 4 bits or less, and others do not oscillate: lower "
            "weight_bits of the quantize trick, or leave dampen_oscillations out"
        )
    return found


@torch.no_grad()
def dampen_oscillations(chosen: Iterable[Layer], weight: float) -> None:
    """Adds the gradient of ``weight * ||clip(w) - q(w)||^2`` to the weights' gradients.

    Args:
        chosen: layers whose weights have a scale of their own; without a gradient they are passed
            over.
        weight: of the added loss.
    """
    for layer in chosen:
        if layer.weight.grad is None:
            continue
        steps, integers, scale = _on_grid(layer)
        scheme = layer.weight_quantizer.scheme  # type: ignore[union-attr]
        # Where the weight is clipped, both are the same bound: no pull.
        pull = (steps.clamp_(scheme.qmin, scheme.qmax) - integers) * scale
        for factor in (layer.weight_factor, layer.weight_mask):
            if factor is not None:  # d masked_weight / d weight
                pull = pull * factor
        layer.weight.grad.add_(pull.to(layer.weight.grad.dtype), alpha=2 * weight)


def _on_grid(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in units of its scale, its integers, both in float32, and the scale."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = layer.masked_weight().float()
    scale = quantizer.current_scale(weight)
    steps = weight / scale
    return steps, steps.round().clamp_(quantizer.scheme.qmin, quantizer.scheme.qmax), scale


@dataclass(kw_only=True)
class Track:
    """What is known of the integers of some layers' weights.

    All tensors are flat, one layer's weights behind the other's: a GPU would spend longer on
    starting the work of each layer than on the work.
    """

    integers: Tensor  # int8, after the last step; of frozen weights for good
    direction: Tensor  # int8, of the last change: -1, 1, or 0 before the first one
    frequency: Tensor  # float32, of oscillations, 0..1
    average: Tensor  # float32, of the integers
    frozen: Tensor  # bool

    @classmethod
    @torch.no_grad()
    def of(cls, chosen: Sequence[Layer]) -> "Track":
        """The beginning for layers as they are now."""
        integers = torch.cat([_on_grid(layer)[1].flatten() for layer in chosen])
        return cls(
            integers=integers.to(torch.int8),
            direction=torch.zeros_like(integers, dtype=torch.int8),
            frequency=torch.zeros_like(integers),
            average=integers.clone(),
            frozen=torch.zeros_like(integers, dtype=torch.bool),
        )

    @classmethod
    def joined(cls, tracks: Sequence["Track"]) -> "Track":
        """One track of all the layers of several."""
        parts = [track.as_dict() for track in tracks]
        return cls(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def split(self, sizes: Sequence[int]) -> list["Track"]:
        """The parts of so many weights each, which are views of this track."""
        parts = {name: tensor.split(list(sizes)) for name, tensor in self.as_dict().items()}
        return [
            Track(**{name: parts[name][place] for name in parts}) for place in range(len(sizes))
        ]

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors by name; ``Track(**track.as_dict())`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @torch.no_grad()
    def follow(self, chosen: Sequence[Layer], threshold: float, momentum: float) -> None:
        """Takes in a step, and freezes what oscillates too often.

        Args:
            chosen: the layers of this track after the step; frozen weights are put back.
            threshold: the frequency above which a weight is frozen.
            momentum: share of the new step in the moving averages.
        """
        found = [_on_grid(layer) for layer in chosen]
        lives = _unpruned(chosen)
        if lives is not None:
            self.frozen &= lives  # others were pruned since
        now = torch.cat([integers.flatten() for _, integers, _ in found])
        now = torch.where(self.frozen, self.integers, now)
        change = (now - self.integers).sign_().to(torch.int8)
        oscillates = (change * self.direction) == -1
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.frequency.lerp_(oscillates.float(), momentum)
        self.average.lerp_(now, momentum)
        fresh = (self.frequency > threshold) & ~self.frozen
        if lives is not None:
            fresh &= lives
        now = torch.where(fresh, self.average.round(), now)
        self.frozen |= fresh
        self.integers.copy_(now)
        # No look at whether any are frozen, which would wait for the GPU.
        sizes = [layer.weight.numel() for layer in chosen]
        pieces = zip(chosen, found, now.split(sizes), self.frozen.split(sizes), strict=True)
        for layer, (_, _, scale), integers, frozen in pieces:
            weight = integers.view_as(layer.weight) * scale
            if layer.weight_factor is not None:
                weight = weight / layer.weight_factor
            weight = weight.to(layer.weight.dtype)
            layer.weight.copy_(torch.where(frozen.view_as(weight), weight, layer.weight))


def _unpruned(chosen: Sequence[Layer]) -> Tensor | None:
    """Which weights of the layers are not pruned, flat; None where no layer is."""
    masks = [layer.weight_mask for layer in chosen]
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [
            torch.ones_like(layer.weight, dtype=torch.bool).flatten()
            if mask is None
            else (mask != 0).flatten()
            for layer, mask in zip(chosen, masks, strict=True)
        ]
    )


class DampenOscillations(Trick):
    """Callback of ``dampen_oscillations``.

    Args:
        method: ``freeze``, ``dampen`` or ``both``.
        weight: of the loss that ``dampen`` adds, at the end of the training.
        first_threshold: oscillations a step above which ``freeze`` freezes at the beginning.
        threshold: the same at the end.
        momentum: of the moving averages, share of the new step.

    Raises:
        QatTricksError: a setting that is not allowed.
    """

    requires = ()
    # A step is followed after ``learn_scales`` has limited the scales' part in it.
    after = ("quantize", "calibrate", "learn_scales")

    def __init__(
        self,
        method: str = "freeze",
        weight: float = 0.1,
        first_threshold: float = 0.1,
        threshold: float = 0.02,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise QatTricksError(f'unknown method "{method}": {did_you_mean(method, METHODS)}')
        if not 0 < weight < math.inf:
            raise QatTricksError(f"weight={weight} is not allowed: give a number above 0")
        if not 0 < momentum < threshold <= first_threshold <= 1:
            # One oscillation alone raises the average by the momentum.
            raise QatTricksError(
                f"momentum={momentum}, threshold={threshold}, first_threshold={first_threshold} is "
                "not allowed: give shares that rise from above 0 to at most 1 in this order"
            )
        self.method, self.weight, self.momentum = method, weight, momentum
        self.first_threshold, self.threshold = first_threshold, threshold
        self._tracks: dict[str, Track] = {}
        self._of_names: dict[tuple[str, ...], Track] = {}  # of several layers, by their names
        self._handles: list[Any] = []

    def apply(self, work: Workbench) -> None:
        """Checks that there are weights that may oscillate."""
        if work.trains:
            low_bit_layers(work.network)

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begins to follow the steps of the optimizers, or goes on."""
        self._let_go()
        if self.method == "dampen":
            return
        network = workbench_of(pl_module).network
        for name, layer in low_bit_layers(network).items():
            known = self._tracks.get(name) or Track.of([layer])
            device = layer.weight.device
            self._tracks[name] = Track(**{k: v.to(device) for k, v in known.as_dict().items()})
        follow = partial(self._follow, trainer, network)
        self._handles = [o.register_step_post_hook(follow) for o in trainer.optimizers]

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Optimizer
    ) -> None:
        """Adds the gradient of the pull to the grid."""
        if self.method != "freeze":
            network = workbench_of(pl_module).network
            rise = _half_cosine(fit_progress(trainer))
            dampen_oscillations(_held(optimizer, network).values(), self.weight * rise)

    def _follow(
        self, trainer: "Trainer", network: fx.GraphModule, optimizer: Optimizer, *_: Any
    ) -> None:
        """After a step of ``optimizer``: follows the weights that it holds."""
        rise = _half_cosine(fit_progress(trainer))
        threshold = self.first_threshold + rise * (self.threshold - self.first_threshold)
        held = _held(optimizer, network)
        if held:
            self._joined(held).follow(list(held.values()), threshold, self.momentum)

    def _joined(self, held: Mapping[str, Layer]) -> Track:
        """One track of the layers held, of which those of each layer are parts."""
        names = tuple(held)
        if names not in self._of_names:
            joined = Track.joined([self._tracks[name] for name in names])
            parts = joined.split([layer.weight.numel() for layer in held.values()])
            self._tracks |= dict(zip(names, parts, strict=True))
            # Layers change hands where a finetuning callback unfreezes them.
            self._of_names = {
                known: track
                for known, track in self._of_names.items()
                if set(known).isdisjoint(names)
            } | {names: joined}
        return self._of_names[names]

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Logs the share of the weights that are frozen."""
        frozen = [track.frozen for track in self._tracks.values()]
        if frozen:
            share = sum(float(f.sum()) for f in frozen) / sum(f.numel() for f in frozen)
            pl_module.log("frozen_weights", share, batch_size=1, sync_dist=True)

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Lets go of the optimizers."""
        self._let_go()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Lets go of the optimizers."""
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._of_names.clear()  # the parts stay

    def reset(self) -> None:
        """Forgets an earlier fit."""
        self._tracks = {}

    def state_dict(self) -> dict[str, Any]:
        """What is known of the integers, by layer."""
        # Copies, for a part would be saved with the whole that it is a view of.
        return {
            name: {key: tensor.clone() for key, tensor in track.as_dict().items()}
            for name, track in self._tracks.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with what was known."""
        self._tracks = {name: Track(**tensors) for name, tensors in state_dict.items()}


def _half_cosine(progress: float) -> float:
    """Rises from 0 to 1 with the progress of the fit."""
    return (1 - math.cos(math.pi * progress)) / 2


def _held(optimizer: Optimizer, network: fx.GraphModule) -> dict[str, Layer]:
    """The low-bit layers whose weights ``optimizer`` steps, by name."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        name: layer for name, layer in low_bit_layers(network).items() if id(layer.weight) in own
    }
