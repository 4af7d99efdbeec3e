"""Finetuning callbacks, such as Lightning's ``BackboneFinetuning``, beside a recipe.

They freeze parts before the training and unfreeze them later, with a parameter group of their own.
Scales follow: they train when the parts that they belong to do, in the group of the scales.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from qat_tricks.graph.layers import BATCHNORMS, activation_quantizers, layers
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.optimizers import join, take_out

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def finetuning_in(trainer: "Trainer") -> list[Any]:
    """The finetuning callbacks of a trainer."""
    kind = package_of(trainer).callbacks.BaseFinetuning
    return [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]


def remembers_groups(trainer: "Trainer") -> bool:
    """Whether a finetuning callback remembers the parameter groups of an earlier fit."""
    return any(callback._internal_optimizer_metadata for callback in finetuning_in(trainer))


def restores_groups(trainer: "Trainer") -> bool:
    """Whether the groups of this fit are restored as they were, which its session knows."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(callback, "restores_groups", False) for callback in callbacks)


def freeze_early(trainer: "Trainer", pl_module: "LightningModule", session: Any) -> list[Any]:
    """Lets the finetuning callbacks behind ``session`` freeze their parts before the surgery.

    They find the BatchNorms that they are to train. So it does not matter where they stand.

    Returns:
        The callbacks, whose own turn is still to come (see ``skip_set_up``).
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    place = callbacks.index(session)
    behind = [c for c in finetuning_in(trainer) if callbacks.index(c) > place]
    for callback in behind:
        callback.setup(trainer, pl_module, str(trainer.state.fn))
    return behind


def hold_batchnorms(pl_module: nn.Module) -> None:
    """Lets BatchNorms of frozen parts count no more, also those that tricks have made anew.

    Finetuning callbacks do so with those that they find, until they unfreeze them.
    """
    for module in pl_module.modules():
        is_counting = isinstance(module, BATCHNORMS) and module.running_mean is not None
        parameters = list(module.parameters(recurse=False))
        if is_counting and parameters and not any(p.requires_grad for p in parameters):
            module.track_running_stats = False  # type: ignore[assignment]


class _Skip:
    """Stands in for the ``setup`` of a callback, once."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        del vars(self.callback)["setup"]


def skip_set_up(callbacks: Sequence[Any]) -> None:
    """Lets the next call of the ``setup`` of each of ``callbacks`` do nothing."""
    for callback in callbacks:
        callback.setup = _Skip(callback)


def end_skips(trainer: "Trainer") -> None:
    """Gives callbacks their ``setup`` back, in a run that broke off before their turn."""
    for callback in finetuning_in(trainer):
        if isinstance(vars(callback).get("setup"), _Skip):
            del vars(callback)["setup"]


def follow_unfrozen(
    trainer: "Trainer",
    pl_module: "LightningModule",
    scales: Sequence[nn.Parameter],
    make_group: Callable[[], None],
) -> None:
    """Lets just these ``scales`` of a network train, each once, in a group of scales.

    Args:
        trainer: has the callbacks and the optimizers.
        pl_module: holds the network.
        scales: those that train now.
        make_group: puts ``scales`` into a group of their own, where no optimizer has one.
    """
    wanted = {id(scale) for scale in scales}
    for scale in _scales_in(pl_module):
        if id(scale) not in wanted:  # in its group it stays: without a gradient no step moves it
            scale.requires_grad_(False)
            scale.grad = None
    of_scales = [g for o in trainer.optimizers for g in o.param_groups if _is_of_scales(g)]
    held = {id(scale) for group in of_scales for scale in group["params"]}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if not _is_of_scales(group):
                # The callback has put them beside the weights that it has unfrozen.
                take_out(group, wanted)
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    missing = [scale for scale in scales if id(scale) not in held]
    if of_scales:
        for scale in missing:
            join(of_scales[0], names[id(scale)], scale)
    elif missing:
        make_group()
        for optimizer in trainer.optimizers:
            # Before the group that the callback has added, which it finds as the last one.
            *others, last = optimizer.param_groups
            if _is_of_scales(last):
                optimizer.param_groups[:] = [*others[:-1], last, *others[-1:]]
    _renew_memory(trainer, names)


def learned_scales(network: fx.GraphModule) -> list[nn.Parameter]:
    """The scales of ``network``, and offsets, that train now and that its spec calls learned."""
    spec = spec_of(network)
    scales = [
        parameter
        for name, quantizer in activation_quantizers(network).items()
        if spec["activations"][name.removeprefix(f"{QUANTIZERS}.")].get("learned")
        for parameter in quantizer.parameters()
    ]
    for name, layer in layers(network).items():
        scale = None if layer.weight_quantizer is None else layer.weight_quantizer.scale
        if scale is not None and spec["layers"][name].get("learned"):
            scales.append(scale)
    return [scale for scale in scales if scale.requires_grad]


def _is_of_scales(group: dict[str, Any]) -> bool:
    return "lr_factor" in group


def _scales_in(pl_module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all quantizers."""
    kinds = (ActivationQuantizer, WeightQuantizer)
    quantizers = [module for module in pl_module.modules() if isinstance(module, kinds)]
    return [scale for quantizer in quantizers for scale in quantizer.parameters()]


def _renew_memory(trainer: "Trainer", names: dict[int, str]) -> None:
    """Lets finetuning callbacks, which restore all groups in a resumed fit, remember ours too."""
    for callback in finetuning_in(trainer):
        memory = callback._internal_optimizer_metadata
        for index, optimizer in enumerate(trainer.optimizers):
            memory[index] = [
                {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
                for group in optimizer.param_groups
            ]


# What is frozen, in a checkpoint ------------------------------------------------------------------


def frozen_in(pl_module: nn.Module) -> dict[str, list[str]]:
    """The parameters that do not train, and the BatchNorms that do not count, by name."""
    return {
        "parameters": [n for n, p in pl_module.named_parameters() if not p.requires_grad],
        "batchnorms": [
            name
            for name, module in pl_module.named_modules()
            if isinstance(module, BATCHNORMS) and not module.track_running_stats
        ],
    }


def freeze_again(pl_module: nn.Module, frozen: dict[str, list[str]]) -> None:
    """Freezes what was frozen, and unfreezes the rest, as ``frozen_in`` found them.

    A callback freezes its parts before each fit, also one that goes on after it has unfrozen them.
    """
    for name, parameter in pl_module.named_parameters():
        parameter.requires_grad_(name not in frozen["parameters"])
    for name, module in pl_module.named_modules():
        if isinstance(module, BATCHNORMS) and module.running_mean is not None:
            module.track_running_stats = name not in frozen["batchnorms"]
