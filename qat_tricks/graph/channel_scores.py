"""Scores the channels that can be removed: those of the lowest score go first.

* ``magnitude``: the L2 norm of a unit's weights in every layer, each in units of its layer's mean
  (Fang et al. 2023, "DepGraph", arXiv 2301.12900, section 3.3);
* ``taylor``: the divergence of the output that losing the unit costs, to second order (Molchanov et
  al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8; for
  tied channels Liu et al. 2021, "Group Fisher Pruning", arXiv 2108.00708, equation 6);
* ``output_error``: the error that losing the unit makes in the output of each layer that reads it,
  as a share of that output's energy (as Luo et al. 2017, "ThiNet", arXiv 1707.06342, section 3.2).

Where ``taylor`` differs: no labels are needed. Classes are drawn from the network's own
probabilities; so the squared gradients are the Fisher information, and half of them the divergence.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.channel_groups import Channels
from qat_tricks.graph.channel_labels import NO_CHANNEL
from qat_tricks.graph.channel_removal import channel_dim, tensor_of
from qat_tricks.graph.inputs import (
    Inputs,
    batch_size,
    call_network,
    check_batches,
    map_tensors,
)
from qat_tricks.graph.logits import drawn_classes, rows_of_logits
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.submodules import layer_at
from qat_tricks.progress import track

Scores = dict[int, float]
"""The score of each unit, by its label."""

Hessians = Callable[[], Mapping[str, Tensor]]
"""Yields the Hessians of the layers' inputs (``graph.hessians``), measured at the first call."""


def _magnitude(
    traced: fx.GraphModule, channels: Channels, batches: Sequence[Inputs], hessians: Hessians
) -> Scores:
    sums = _Sums()
    for name, units in channels.rows.items():
        tensor = tensor_of(traced, name)
        if isinstance(tensor, nn.Parameter) and not name.endswith(".bias"):
            sums.add(units, _norms(tensor, channel_dim(tensor)))
    for name, units in channels.columns.items():
        if name not in channels.grouped:  # whose rows are the same channels
            sums.add(units, _norms(layer_at(traced, name).weight, 1))
    return sums.means()


def _norms(weight: Tensor, dim: int) -> Tensor:
    """The norm of each slice along ``dim``, in units of their root mean square."""
    slices = weight.detach().double().movedim(dim, 0)
    squares = slices.reshape(len(slices), -1).square().sum(1)
    return (squares / squares.mean().clamp_min(1e-300)).sqrt()


def _taylor(
    traced: fx.GraphModule, channels: Channels, batches: Sequence[Inputs], hessians: Hessians
) -> Scores:
    index = {unit: i for i, unit in enumerate(channels.units)}
    places = {
        name: torch.tensor([index.get(unit, len(index)) for unit in units.tolist()])
        for name, units in channels.columns.items()
        if name not in channels.grouped and not set(units.tolist()).isdisjoint(index)
    }
    images = 0
    states = (evaluating(traced), kept_random_state(), torch.inference_mode(False))
    with ExitStack() as stack:
        read = stack.enter_context(_Inputs(traced, places))
        for state in states:
            stack.enter_context(state)
        total = torch.zeros(len(index) + 1, dtype=torch.float64)
        for batch in track(batches, "score channels"):
            # The same images have the same classes, however they are batched.
            seed_all(images)
            images += batch_size(batch)
            effects = _effects(traced, batch, read, places, len(index) + 1)
            total += effects.double().square().sum(0).cpu()
    return {unit: float(total[i]) / images / 2 for unit, i in index.items()}


def _effects(
    traced: fx.GraphModule,
    batch: Inputs,
    read: "_Inputs",
    places: Mapping[str, Tensor],
    count: int,
) -> Tensor:
    """``sum a * dL/da`` over all that reads a unit, for each image, ``[N, units]``."""
    read.tensors.clear()
    with torch.enable_grad():
        # Copies, for Lightning validates under ``inference_mode``, whose tensors have no gradient.
        logits = rows_of_logits(call_network(traced, map_tensors(batch, Tensor.clone)))
        classes = drawn_classes(logits)
        images = batch_size(batch)
        # Of positions, each is a class of its own; the divergence is their mean.
        loss = F.cross_entropy(logits, classes, reduction="sum") * images / len(logits)
        if not loss.requires_grad:
            raise QatTricksError(
                "criterion=taylor needs gradients, and the network computes its output without: "
                "take output_error or magnitude"
            )
        tensors = [tensor for _, tensor in read.tensors if tensor.requires_grad]
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    by_tensor = dict(zip(map(id, tensors), grads, strict=True))
    effects = torch.zeros(images, count, device=logits.device)
    for name, tensor in read.tensors:
        grad = by_tensor.get(id(tensor))
        if grad is None:
            continue
        axis = tensor.dim() - 1 if isinstance(layer_at(traced, name), nn.Linear) else 1
        products = (tensor.detach() * grad).movedim(axis, -1)
        if len(products) % len(effects):
            raise QatTricksError(
                f"criterion=taylor cannot tell the images apart in what {name} reads: take "
                "output_error or magnitude"
            )
        # An image may be several rows there, as of its tokens; they lie side by side.
        rows = products.reshape(len(effects), -1, products.shape[-1])
        per_channel = rows.sum(1).float()
        effects.index_add_(1, places[name].to(effects.device), per_channel)
    return effects


class _Inputs:
    """Collects what layers read, as tensors with a gradient."""

    def __init__(self, traced: fx.GraphModule, names: Mapping[str, Tensor]) -> None:
        self.tensors: list[tuple[str, Tensor]] = []
        self._layers = {name: layer_at(traced, name) for name in names}
        self._handles: list[Any] = []

    def __enter__(self) -> "_Inputs":
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._note(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., Any]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tensor = args[0]
            if not tensor.requires_grad:  # nothing before it is trained
                tensor = tensor.detach().requires_grad_()
            self.tensors.append((name, tensor))
            return (tensor, *args[1:])

        return see


def _output_error(
    traced: fx.GraphModule, channels: Channels, batches: Sequence[Inputs], hessians: Hessians
) -> Scores:
    sums = _Sums()
    moments = hessians()
    for name, units in channels.columns.items():
        if name in channels.grouped or name not in moments:
            continue
        weight, moment = layer_at(traced, name).weight.detach().double(), moments[name][0].double()
        columns = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        count, size = columns.shape[1:]
        if moment.dim() == 1:  # only the diagonal was kept
            errors = (columns.square() * moment.view(count, size)).sum((0, 2))
            energy = errors.sum()
        else:
            blocks = moment.view(count, size, count, size).diagonal(dim1=0, dim2=2)
            errors = torch.einsum("ocx,xyc,ocy->c", columns, blocks, columns)
            rows = columns.flatten(1)
            energy = (rows @ moment * rows).sum()
        sums.add(units, errors / energy.clamp_min(1e-300))
    return sums.totals()


class _Sums:
    """Adds up figures of channels by their unit."""

    def __init__(self) -> None:
        self._figures: dict[int, list[float]] = {}

    def add(self, units: Tensor, figures: Tensor) -> None:
        for unit, figure in zip(units.tolist(), figures.tolist(), strict=True):
            if unit != NO_CHANNEL:
                self._figures.setdefault(unit, []).append(figure)

    def means(self) -> Scores:
        return {unit: sum(each) / len(each) for unit, each in self._figures.items()}

    def totals(self) -> Scores:
        return {unit: sum(each) for unit, each in self._figures.items()}


CRITERIA: Mapping[str, Callable[[fx.GraphModule, Channels, Sequence[Inputs], Hessians], Scores]] = {
    "magnitude": _magnitude,
    "taylor": _taylor,
    "output_error": _output_error,
}


@torch.no_grad()
def score_channels(
    traced: fx.GraphModule,
    channels: Channels,
    criterion: str,
    batches: Sequence[Inputs],
    hessians: Hessians,
) -> Scores:
    """Scores the units of ``channels``.

    Args:
        traced: the network, which stays as it is.
        channels: of it.
        criterion: a name of ``CRITERIA``.
        batches: the network's inputs, a batch each.
        hessians: see ``Hessians``.

    Raises:
        QatTricksError: an unknown criterion, or no batches.
    """
    if criterion not in CRITERIA:
        raise QatTricksError(
            f'criterion="{criterion}" is not allowed: {did_you_mean(criterion, CRITERIA)}'
        )
    check_batches(batches, "to score channels on")
    return CRITERIA[criterion](traced, channels, batches, hessians)
