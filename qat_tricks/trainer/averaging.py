"""Averaged networks, such as Lightning's ``WeightAveraging`` keeps, with exact grids."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from qat_tricks.trainer.module import network_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_EXACT = ("weight_mask", "zero_point")


def is_averaging(callback: Any) -> bool:
    """Whether a callback keeps an averaged copy of the network."""
    return hasattr(callback, "_average_model")


def keep_grids(trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Gives averaged networks the masks and zero points of the trained one.

    They are no quantities to average: half a mask prunes nothing, and half a step belongs to no
    grid.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is None:
            continue
        # Lightning wraps the copy, so its names carry a prefix that the network's do not.
        averaged = {name.removeprefix("module."): b for name, b in average.named_buffers()}
        for name, buffer in pl_module.named_buffers():
            if name.rpartition(".")[2] in _EXACT:
                averaged[name].copy_(buffer)


def averaged_networks(trainer: "Trainer", name: str) -> list[Any]:
    """The copies of the network ``name`` that ``WeightAveraging`` callbacks keep."""
    averages = [getattr(c, "_average_model", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    # StochasticWeightAveraging's is none: it gathers the statistics in an epoch of its own.
    return [network_of(a.module, name) for a in averages if isinstance(a, AveragedModel)]


def restart_average(trainer: "Trainer") -> None:
    """Lets averages begin anew: the next network that is taken in is the first one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not is_averaging(callback):
            continue
        # WeightAveraging counts in the averaged model, StochasticWeightAveraging by itself.
        for owner in (callback, callback._average_model):
            count = getattr(owner, "n_averaged", None)
            if isinstance(count, Tensor):
                count.zero_()
        if hasattr(callback, "_init_n_averaged"):  # of a checkpoint, until it is put to use
            callback._init_n_averaged = 0
