"""Quantization of a plain PyTorch network, without a trainer."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.recipe import Recipe, Stage, load_recipe


def quantize(
    net: nn.Module, loader: Iterable[Any], recipe: str = "int8_ptq", overrides: Sequence[str] = ()
) -> fx.GraphModule:
    """Returns a quantized copy of ``net``, in evaluation mode; ``net`` itself stays as it is.

    Args:
        net: a float classifier that ``torch.fx`` can trace.
        loader: yields training images: tensors ``[N, C, H, W]``, or tuples or mappings that begin
            with one; for a network with several inputs a tuple of tensors, or tuples that begin
            with one (see ``qat_tricks.graph.inputs``).
        recipe: a recipe without training; of one that trains, the tricks before the training are
            not enough, and it is refused.
        overrides: Hydra overrides of the recipe.

    Raises:
        QatTricksError: an unknown recipe or setting, a network that cannot be traced, a loader that
            is empty, yields NaN or too few inputs.
    """
    loaded: Recipe = load_recipe(recipe, overrides)
    training = [stage.name for stage in loaded.stages if stage.epochs > 0]
    if training:
        raise QatTricksError(
            f'recipe "{recipe}" trains ({", ".join(training)}), which needs a trainer: pass '
            f'qat_tricks.recipe("{recipe}") to '
            "pl.Trainer(callbacks=…), or set its epochs to 0"
        )
    work = Workbench(copy.deepcopy(net).eval(), lambda num_images: loader, untraced=loaded.whole)
    for stage in loaded.stages:
        do_stage(stage, work)
    return work.network.eval()


def do_stage(stage: Stage, work: Workbench) -> None:
    """Does the tricks of a stage without training."""
    work.applied.clear()
    for trick in stage.tricks:
        trick.do(work)
    work.drop_reference()
