"""Quantization of a plain PyTorch network, without a trainer."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import load_recipe


def quantize(
    net: nn.Module, loader: Iterable[Any], recipe: str = "int8_ptq", overrides: Sequence[str] = ()
) -> fx.GraphModule:
    """Returns a quantized copy of ``net``, in evaluation mode; ``net`` itself stays as it is.

    Neither Lightning nor W&B is imported, and Hydra only where there are overrides.

    Args:
        net: a float classifier that ``torch.fx`` can trace.
        loader: yields training images: tensors ``[N, C, H, W]``, or tuples or mappings that begin
            with one; for a network with several inputs a tuple of tensors, or tuples that begin
            with one (see ``qat_tricks.graph.inputs``).
        recipe: a recipe without training.
        overrides: Hydra overrides of the recipe.

    Raises:
        QatTricksError: an unknown recipe or setting, a recipe that trains, a network that cannot be
            traced, a loader that is empty, yields NaN or too few inputs.
    """
    loaded = load_recipe(recipe, overrides)
    # Checked before any work: the calibrated network is not the result of such a recipe.
    if loaded.training:
        names = ", ".join(stage.name for stage in loaded.training)
        raise QatTricksError(
            f'recipe "{recipe}" trains ({names}), which needs a trainer: pass '
            f'qat_tricks.recipe("{recipe}") to Trainer(callbacks=…), or set its epochs to 0'
        )
    # Tracing shares parameters with the network that it traces, and tricks change them.
    float_copy = copy.deepcopy(net).eval()
    work = Workbench(float_copy, lambda num_images: loader, untraced=loaded.untraced)
    for stage in loaded.stages:
        stage.apply(work)
    return work.network.eval()
