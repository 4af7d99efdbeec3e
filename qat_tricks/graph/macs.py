"""Counts the products with weights that each call of a conv or linear computes for one image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.inputs import Inputs, call_network, first_images
from qat_tricks.graph.layers import Layer, is_layer
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.numerics import ActivationQuantizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a layer."""

    layer: str
    macs: int  # products with weights, for one image
    grid: ActivationQuantizer | None  # of its input; None: float


@torch.no_grad()
def macs_of_calls(traced: fx.GraphModule, inputs: Inputs) -> list[Call]:
    """The calls of all layers of ``traced``, in the order in which they run.

    Args:
        traced: run once, on one image, in float and in evaluation mode.
        inputs: of it.
    """
    calls: list[Call] = []

    def note(name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            # Each output value takes the weights of its channel.
            positions = output.numel() // module.weight.shape[0]
            of_calls = module.calls if isinstance(module, Layer) else ()
            grid = of_calls[kwargs.get("call", 0)][0] if of_calls else None
            calls.append(Call(layer=name, macs=module.weight.numel() * positions, grid=grid))

        return see

    found = {name: module for name, module in traced.named_modules() if is_layer(module)}
    handles = [
        nn.Module.register_forward_hook(layer, note(name), with_kwargs=True)
        for name, layer in found.items()
    ]
    try:
        with evaluating(traced), float_mode(traced), kept_random_state():
            call_network(traced, first_images(inputs, 1))
    finally:
        for handle in handles:
            handle.remove()
    return calls
