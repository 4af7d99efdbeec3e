"""The layers of a quantized network that cost its output most, each measured alone."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, batch_size, first_images
from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.graph.sensitivity import measure_sensitivity
from qat_tricks.graph.spec import QUANTIZERS
from qat_tricks.jobs.evaluation import metrics_of
from qat_tricks.recipes.guideline_steps import SENSITIVE_SHARE
from qat_tricks.recipes.recipe import StagedRecipe
from qat_tricks.trainer.module import workbench_of

IMAGES = 64
ROUNDING = ("gptq", "learned_rounding", "correct_weights", "correct_bias")


def parts_of(module: nn.Module) -> int:
    """About how many images' passes it takes to measure each layer of ``module`` alone."""
    convs_and_linears = sum(
        isinstance(part, (nn.modules.conv._ConvNd, nn.Linear)) for part in module.modules()
    )
    # Weights and activations of each; on average half of the network has to be run again.
    return convs_and_linears * IMAGES


def without_rounding(recipe: StagedRecipe) -> StagedRecipe:
    """``recipe`` without the tricks that put weights on their grids, or make good for that.

    Weights that lie on their grids already have no error of their own that could be measured.
    """
    return replace(
        recipe,
        stages=[
            replace(stage, tricks=[trick for trick in stage.tricks if trick.name not in ROUNDING])
            for stage in recipe.stages
        ],
    )


def sensitive_layers(module: Any, batches: Iterable[Any], data: Any = None) -> list[str]:
    """A tenth of the convs and linears of fewest decibels, of those that could have more bits.

    The noise of a layer is that of its weights and of the activations that it reads, each alone.

    Args:
        module: a LightningModule whose network is quantized and calibrated, and whose weights are
            those of the float network: see ``without_rounding``.
        batches: of labelled images, of which the first 64 are used.

    Raises:
        QatTricksError: no layer could have more bits.
    """
    network: Any = workbench_of(module).network
    sensitivities = measure_sensitivity(network, _inputs(module, network, batches, data))
    noise = Counter[str]()
    for part in sensitivities.parts:
        noise[part.name] = 10 ** (-part.error.sqnr_db / 10)  # type: ignore[assignment]
    names = {quantizer: name for name, quantizer in activation_quantizers(network).items()}
    found: dict[str, float] = {}
    bits: dict[str, int] = {}
    for name, layer in layers(network).items():
        if layer.weight_quantizer is None:
            continue
        read = [names[q].removeprefix(f"{QUANTIZERS}.") for q in layer.input_quantizer]
        found[name] = noise[name] + sum(noise[one] for one in read)
        bits[name] = min(
            [layer.weight_quantizer.scheme.bits, *(q.scheme.bits for q in layer.input_quantizer)]
        )
    fewest = min(bits.values())
    open_to_more = [name for name in found if fewest == 8 or bits[name] < 8]
    count = math.ceil(SENSITIVE_SHARE * len(found))
    chosen = sorted(open_to_more, key=lambda name: -found[name])[:count]
    if not chosen:
        raise QatTricksError("no conv or linear of the network could have more bits")
    return sorted(chosen)


def _inputs(
    module: nn.Module, network: nn.Module, batches: Iterable[Any], data: Any
) -> Sequence[Inputs]:
    """What the module hands to its network for the first images."""
    seen: list[Any] = []
    missing = IMAGES

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal missing
        inputs = args[0] if len(args) == 1 else args
        if missing > 0:
            seen.append(first_images(inputs, missing))
            missing -= batch_size(inputs)

    handle = network.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            metrics_of(module, takewhile(lambda _: missing > 0, batches), data)
    finally:
        handle.remove()
    return seen
