"""Figures of each quantized tensor of a network by itself: its range, error, clipping and zeros.

Each error is of that tensor's own rounding and clipping, of the values that it has while all else
is in float. It says where error enters, not how much of it the output feels: that is what
``sensitivity`` measures.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.inputs import Inputs, batch_size, call_network
from qat_tricks.graph.layers import Layer, activation_quantizers, is_calibrated, layers
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.spec import QUANTIZERS
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics.decibels import decibels

FEW_IMAGES = 256  # tell an error to a hundredth


def layer_figures(network: nn.Module | None, batches: Iterable[Inputs]) -> dict[str, Any] | None:
    """``tensor_figures`` of the first images, as a report has them; None of a float network."""
    if not isinstance(network, TracedNetwork) or not is_calibrated(network):
        return None
    few = _few(batches)
    images = sum(map(batch_size, few))
    return {"images": images, "tensors": tensor_figures(network, few)}


def activation_shifts(
    network: nn.Module | None, first: Iterable[Inputs], second: Iterable[Inputs]
) -> dict[str, float]:
    """How far the mean of each quantized activation lies apart on two sets of images.

    Args:
        network: nothing is told of a float one.
        first: inputs of the network, of which a few are run.
        second: likewise.

    Returns:
        The distances by the names of the tensors, in units of the tensor's range.
    """
    if not isinstance(network, TracedNetwork) or not is_calibrated(network):
        return {}
    one, other = (_mean_activations(network, _few(batches)) for batches in (first, second))
    quantizers = activation_quantizers(network)
    shifts = {}
    for name in one:
        low, high = quantizers[name].range
        shifts[name.removeprefix(f"{QUANTIZERS}.")] = abs(other[name] - one[name]) / (high - low)
    return shifts


def _few(batches: Iterable[Inputs]) -> list[Inputs]:
    """The first batches, of ``FEW_IMAGES`` images or a few more."""
    few: list[Inputs] = []
    images = 0
    for inputs in batches:
        few.append(inputs)
        images += batch_size(inputs)
        if images >= FEW_IMAGES:
            break
    return few


@torch.no_grad()
def _mean_activations(traced: fx.GraphModule, batches: Iterable[Inputs]) -> dict[str, float]:
    """The mean of each quantized activation in float; of those that have a value at all."""
    sums: dict[str, list[float]] = {}  # and counts

    def note(name: str) -> Any:
        def hook(quantizer: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            total, count = sums.setdefault(name, [0.0, 0])
            sums[name] = [total + float(out.double().sum()), count + out.numel()]

        return hook

    quantizers = {n: q for n, q in activation_quantizers(traced).items() if q.is_on}
    handles = [q.register_forward_hook(note(name)) for name, q in quantizers.items()]
    try:
        with evaluating(traced), float_mode(traced):
            for inputs in batches:
                call_network(traced, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, (total, count) in sums.items() if count}


@torch.no_grad()
def tensor_figures(traced: fx.GraphModule, batches: Iterable[Inputs]) -> list[dict[str, Any]]:
    """Measures the weights and activations of a quantized network, in its order.

    Args:
        traced: quantized and calibrated; it stays as it is.
        batches: inputs of the network.

    Returns:
        A row a tensor: ``name``, ``kind`` (``weight`` or ``activation``), ``bits``; ``low`` and
        ``high``, the ends of its grid; ``sqnr_db`` of its rounding, None of a tensor without
        values, and of weights that a trick has put on their grid; ``clipped``, the share beyond the
        grid by more than half a step; ``zeros``.
    """
    sums = {q: _Sums(q) for q in activation_quantizers(traced).values() if q.is_on}
    handles = [quantizer.register_forward_hook(own.note) for quantizer, own in sums.items()]
    try:
        with evaluating(traced):
            rows = {name: _weight(layer) for name, layer in layers(traced).items()}
            with float_mode(traced):
                for inputs in batches:
                    call_network(traced, inputs)
    finally:
        for handle in handles:
            handle.remove()
    by_name = {
        name: {"name": name.removeprefix(f"{QUANTIZERS}."), **sums[quantizer].row()}
        for name, quantizer in activation_quantizers(traced).items()
        if quantizer in sums
    }
    by_name |= {name: {"name": name, **row} for name, row in rows.items() if row is not None}
    called = dict.fromkeys(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    return [by_name[name] for name in called if name in by_name]


class _Sums:
    """What a quantizer has seen: sums of squares, and counts."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.signal = self.noise = 0.0
        self.count = self.clipped = self.zeros = 0

    def note(self, quantizer: ActivationQuantizer, given: tuple[Tensor], out: Tensor) -> None:
        """A forward hook."""
        values = out.float()  # behind the activation function, for the quantizer is off
        on_grid = quantizer.on_grid(values)
        low, high = quantizer.range
        half = float(quantizer.current_scale()) / 2
        self.signal += float(values.double().square().sum())
        self.noise += float((values - on_grid).double().square().sum())
        self.count += values.numel()
        self.clipped += int(((values < low - half) | (values > high + half)).sum())
        self.zeros += int((on_grid == 0).sum())

    def row(self) -> dict[str, Any]:
        """The figures so far."""
        low, high = self.quantizer.range
        return {
            "kind": "activation",
            "bits": self.quantizer.scheme.bits,
            "low": low,
            "high": high,
            "sqnr_db": decibels(self.signal, self.noise) if self.signal else None,
            "clipped": self.clipped / max(self.count, 1),
            "zeros": self.zeros / max(self.count, 1),
        }


def _weight(layer: Layer) -> dict[str, Any] | None:
    """The figures of a layer's weight; None of one that stays float."""
    if not layer.is_quantizing or layer.weight_quantizer is None:
        return None
    weight, on_grid = layer.deployed_weight(), layer.effective_weight()
    scale, scheme = layer.weight_scale(weight), layer.weight_quantizer.scheme
    steps = weight / scale
    outside = (steps > scheme.qmax + 0.5) | (steps < scheme.qmin - 0.5)
    signal = float(weight.double().square().sum())
    noise = float((weight - on_grid).double().square().sum())
    return {
        "kind": "weight",
        "bits": scheme.bits,
        "low": float((scale * scheme.qmin).min()),
        "high": float((scale * scheme.qmax).max()),
        "sqnr_db": decibels(signal, noise) if signal and noise else None,
        "clipped": float(outside.double().mean()),
        "zeros": float((on_grid == 0).double().mean()),
    }
