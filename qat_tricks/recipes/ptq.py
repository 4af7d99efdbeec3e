"""Quantization of a plain PyTorch network, without a trainer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Replayed, call_network, first_images, input_names, inputs_of
from qat_tricks.graph.layers import activation_quantizers
from qat_tricks.graph.traceable import check_traceable, copy_of
from qat_tricks.graph.tracer import TRACING
from qat_tricks.graph.unwrap import unwrapped
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe


def quantize(
    net: nn.Module, loader: Iterable[Any], recipe: str = "int8_ptq", overrides: Sequence[str] = ()
) -> fx.GraphModule:
    """Returns a quantized copy of ``net``, in evaluation mode; ``net`` itself stays as it is.

    Neither Lightning nor W&B is imported, and Hydra only where there are overrides.

    Args:
        net: a float classifier that ``torch.fx`` can trace.
        loader: yields training images: tensors ``[N, C, H, W]``, or tuples or mappings that hold
            them; for a network with several inputs a tuple of tensors, or tuples that begin with
            one (see ``qat_tricks.graph.inputs``). An iterator is asked for no more batches than the
            recipe needs.
        recipe: a recipe without training.
        overrides: Hydra overrides of the recipe.

    Raises:
        QatTricksError: an unknown recipe or setting, a recipe that trains, a network that cannot be
            traced, a loader that is empty, is none, yields NaN or too few inputs.
    """
    loaded = load_recipe(recipe, overrides)
    # Checked before any work: the calibrated network is not the result of such a recipe.
    if loaded.training:
        names = ", ".join(stage.name for stage in loaded.training)
        raise QatTricksError(
            f'recipe "{recipe}" trains ({names}), which needs a trainer: pass '
            f'qat_tricks.recipe("{recipe}") to Trainer(callbacks=…), or set its epochs to 0'
        )
    batches = Replayed(loader)  # each trick goes through them from the first on
    # Tracing shares parameters with the network that it traces, and tricks change them.
    net = unwrapped(net)
    check_traceable(net, loaded.untraced)  # what cannot be traced can often not be copied
    if activation_quantizers(net):
        raise QatTricksError(
            f"{type(net).__name__} is quantized already: give the float network that it came from"
        )
    # Of several threads one after the other: no network can run while another one is traced.
    with TRACING:
        float_copy = copy_of(net)
        float_copy.eval()  # a network's own may return nothing
        work = Workbench(
            float_copy, lambda num_images: _taken_by(float_copy, batches), untraced=loaded.untraced
        )
        for stage in loaded.stages:
            stage.apply(work, prove=loaded.prove)
        work.network.eval()
    return work.network


def _taken_by(network: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields ``batches``; integers are tried first, which most networks do not take."""
    names = input_names(network)
    device = next((parameter.device for parameter in network.parameters()), None)
    for index, batch in enumerate(batches):
        inputs = inputs_of(batch, names)
        if index == 0 and isinstance(inputs, Tensor) and not inputs.is_floating_point():
            with torch.no_grad():
                call_network(network, first_images(inputs.to(device), 1))
        yield batch
