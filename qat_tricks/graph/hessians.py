"""Measures the Hessian of each layer's output error: the second moments of the layer's inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph.inputs import Inputs, batch_size, call_network, check_batches
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.patches import windows_of
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.progress import track

WIDEST = 8192  # inputs of an output value; of more, only the diagonal is kept, to spare memory
CHUNK = 8  # images whose patches are laid out at a time


@torch.no_grad()
def input_hessians(
    traced: fx.GraphModule, found: Mapping[str, Layer], batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """``sum x x^T`` over the positions of an image, the mean over images, for each layer.

    Args:
        traced: the network, run as it is, in evaluation mode.
        found: its layers of interest, by name.
        batches: the network's inputs, a batch each.

    Returns:
        For each layer ``[groups, inputs, inputs]``, the inputs of one output value in the order of
        the weight; or the diagonal ``[groups, inputs]`` where there are more than ``WIDEST``.

    Raises:
        QatTricksError: no batches.
    """
    check_batches(batches, "to measure Hessians on")
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Tensor, ...]) -> None:
            for chunk in args[0].float().split(CHUNK):
                moments = _moments(patches(module, chunk))
                sums[name] = sums[name].add_(moments) if name in sums else moments

        return see

    handles = [
        nn.Module.register_forward_pre_hook(layer, note(name)) for name, layer in found.items()
    ]
    try:
        with evaluating(traced), kept_random_state():
            for batch in track(batches, "measure Hessians"):
                call_network(traced, batch)
    finally:
        for handle in handles:
            handle.remove()
    images = sum(map(batch_size, batches))
    # A layer that evaluation does not reach has no inputs to tell anything.
    return {name: sums[name] / images for name in found if name in sums}


def _moments(rows: Tensor) -> Tensor:
    """Second moments of ``[groups, rows, inputs]``, or their diagonal."""
    if rows.shape[-1] > WIDEST:
        return rows.square().sum(1)
    return rows.transpose(1, 2) @ rows


def patches(layer: Any, input: Tensor) -> Tensor:
    """The inputs of each output value of a conv or linear.

    Args:
        layer: a conv of any dimensions, or a linear.
        input: as the layer takes it.

    Returns:
        ``[groups, rows, inputs]``; a weight's row times one of them is an output value.
    """
    if isinstance(layer, nn.Linear):
        return input.reshape(1, -1, input.shape[-1])
    dims = len(layer.kernel_size)
    # [N, C, positions.., window..] to [groups, N * positions, C / groups * window]
    windows = windows_of(layer, input).unflatten(1, (layer.groups, -1))
    positions = range(3, 3 + dims)
    order = [1, 0, *positions, 2, *range(3 + dims, 3 + 2 * dims)]
    windows = windows.permute(order)
    return windows.reshape(layer.groups, -1, layer.weight[0].numel())
