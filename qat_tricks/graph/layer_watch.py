"""Watches the quantized layers of a network during one training step.

It reads the values that pass and changes none of them. Figures stay tensors on the network's device
until they are asked for, so that the device is waited for once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.graph.spec import QUANTIZERS
from qat_tricks.numerics import ActivationQuantizer


class LayerWatch:
    """The figures of a network as it begins a step, and of the activations in that step.

    Args:
        network: traced, quantized or pruned; its weights are read at once.
        activations: whether to count the values that are clipped, until ``close``.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, *, activations: bool = True) -> None:
        self._figures: dict[str, Tensor] = {}
        self._seen: list[_Clipped] = []
        # Layers that are held in evaluation hand on values that were rounded and clipped already.
        held = {
            after
            for layer in layers(network).values()
            if not layer.training
            for _, after in layer.calls
        }
        for name, quantizer in activation_quantizers(network).items():
            if quantizer.is_on:
                name = name.removeprefix(f"{QUANTIZERS}.")
                self._figures |= _range(name, quantizer)
                if activations and quantizer.training and quantizer not in held:
                    self._seen.append(_Clipped(name, quantizer))
        for name, layer in layers(network).items():
            if layer.is_quantizing or layer.weight_mask is not None:
                is_zero = layer.effective_weight() == 0
                self._figures[f"{name}/weight_sparsity"] = is_zero.float().mean()
            own = layer.weight_quantizer.scale if layer.weight_quantizer is not None else None
            if layer.is_quantizing and own is not None:
                self._figures[f"{name}/weight_scale"] = own.detach().mean()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The figures by ``NAME/FIGURE``; see docs/logging.md. Waits for the device."""
        found = self._figures | {
            f"{seen.name}/clip_rate": seen.clipped / seen.values
            for seen in self._seen
            if seen.values
        }
        if not found:
            return {}
        values = torch.stack([value.detach().double().reshape(()) for value in found.values()])
        return dict(zip(found, values.tolist(), strict=True))

    def close(self) -> None:
        """Looks no longer."""
        for seen in self._seen:
            seen.handle.remove()


class _Clipped:
    """Counts the values of one quantizer beyond its grid."""

    def __init__(self, name: str, quantizer: ActivationQuantizer) -> None:
        self.name = name
        self.values = 0
        self.clipped: Any = 0  # a tensor, once values have passed
        self.handle = quantizer.register_forward_hook(self._note)

    def _note(self, quantizer: ActivationQuantizer, given: tuple[Tensor], output: Tensor) -> None:
        """A forward hook."""
        if torch.compiler.is_compiling():
            return  # it would become a part of what is compiled
        if not torch.is_grad_enabled():
            return  # a pass of a trick, such as one that estimates statistics, and none of training
        with torch.no_grad():
            self._count(quantizer, given[0].float())

    def _count(self, quantizer: ActivationQuantizer, values: Tensor) -> None:
        figures = _range("", quantizer)
        low, high, half = figures["/low"], figures["/high"], figures["/scale"] / 2
        self.values += values.numel()
        if quantizer.activation is None:
            self.clipped = self.clipped + torch.count_nonzero(values < low - half)
        above = torch.count_nonzero(values > high + half)
        # A ReLU6 ends values at its cap, and the grid clips none of them where it reaches there.
        self.clipped = self.clipped + torch.where(high + half < quantizer.cap, above, 0)


def _range(name: str, quantizer: ActivationQuantizer) -> dict[str, Tensor]:
    """The ends of a quantizer's grid, and its scale, on its device."""
    scale, zero_point = quantizer.current_scale().detach(), quantizer.current_zero_point()
    # Behind a ReLU no integer below the zero point is in use.
    lowest = zero_point if quantizer.activation is not None else quantizer.scheme.qmin
    return {
        f"{name}/low": scale * (lowest - zero_point),
        f"{name}/high": scale * (quantizer.scheme.qmax - zero_point),
        f"{name}/scale": scale,
    }
