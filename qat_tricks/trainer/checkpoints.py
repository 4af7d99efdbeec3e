"""Reads checkpoints, and writes and rebuilds them.

Writing needs no trainer, and rebuilding no recipe.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.files import write_tensors
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.unwrap import unwrapped
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.hyperparameters import KEYS as HYPERPARAMETERS
from qat_tricks.trainer.hyperparameters import (
    make_module,
    read_hyperparameters,
    saved_hyperparameters,
)
from qat_tricks.trainer.module import (
    CHECKPOINT_KEY,
    attach_workbench,
    describe,
    find_network,
    has_workbench,
    is_whole,
    network_of,
)
from qat_tricks.trainer.own_hooks import make_network
from qat_tricks.trainer.reading import DamagedError, not_read, read, unread_in
from qat_tricks.trainer.state_keys import bare, matched

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


# The keys of a run in a checkpoint, beside the weights; the states of the data module and of the
# precision have names of their own.
RUN_STATE = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def load_checkpoint(
    path: str | Path,
    *,
    map_location: Any = None,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint; under ``weights_only=True`` unless the user trusts it.

    Args:
        path: of the file.
        map_location: as of ``torch.load``; None is the CPU.
        weights_only: see ``reading.read``. Without trust, hyperparameters and the run's state may
            hold an ``Unread`` in the place of an object.

    Raises:
        DamagedError: the file is truncated, or not a Lightning checkpoint.
        QatTricksError: it is missing, or holds objects that only a trusted file gives.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise QatTricksError(
            f"a checkpoint is read from its path, not from a {type(path).__name__}: give the path"
        )
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(f"there is no checkpoint {path}: give the path of a .ckpt file")
    where = "cpu" if map_location is None else map_location
    checkpoint = read(path, map_location=where, weights_only=weights_only)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise DamagedError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    check_read(checkpoint, path, (*HYPERPARAMETERS, *RUN_STATE))
    return checkpoint


def check_read(checkpoint: dict[str, Any], path: str | Path, besides: Collection[str]) -> None:
    """Raises QatTricksError for what was not read from ``path``, but under the keys ``besides``."""
    needed = {key: value for key, value in checkpoint.items() if key not in besides}
    if unread := unread_in(needed):
        raise not_read(path, unread, "")


def save_checkpoint(pl_module: "LightningModule", path: str | Path) -> None:
    """Writes a checkpoint of ``pl_module`` as a trainer would, without one; atomically.

    Raises:
        QatTricksError: the path cannot be written.
    """
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": package_of(pl_module).__version__,
        "state_dict": pl_module.state_dict(),
        **saved_hyperparameters(pl_module),
    }
    if has_workbench(pl_module):
        checkpoint[CHECKPOINT_KEY] = describe(pl_module)
    write_tensors(checkpoint, path)


def load_from_checkpoint(
    module_class: "type[LightningModule]",
    path: str | Path,
    *,
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> "LightningModule":
    """Builds a ``module_class`` and gives it the structure and the values of the checkpoint.

    No recipe is needed, and either of Lightning's packages will do. Beside tensors and plain data,
    hyperparameters may be DictConfigs, Namespaces, paths, members of an Enum, partials of torch's
    optimizers and schedules, and torch's own layers.

    Args:
        module_class: the LightningModule's class; built from ``kwargs`` over the hyperparameters
            saved in the checkpoint.
        path: a checkpoint, quantized or float.
        map_location: as of ``torch.load``, for the module too; None is the CPU.
        hparams_file: a YAML or CSV file of hyperparameters in the place of the saved ones.
        strict: whether the keys must match exactly; None is the module's ``strict_loading``.
        weights_only: False, for a file that is trusted, makes objects of any class in it.

    Raises:
        QatTricksError: the file is missing or damaged, holds what only a trusted one gives, or is
            of another network.
    """
    checkpoint = load_checkpoint(path, map_location=map_location, weights_only=weights_only)
    if hparams_file is not None:
        checkpoint[HYPERPARAMETERS[0]] = read_hyperparameters(module_class, hparams_file)
    module = make_module(module_class, checkpoint, path, kwargs)
    strict = _strictness(module, strict)
    make_network(module, map(bare, checkpoint["state_dict"]))
    _take_structure(module, checkpoint)
    # By the class: that of the object is for Lightning's own reading.
    module_class.on_load_checkpoint(module, checkpoint)
    load_state(module, checkpoint, path, strict=strict)
    module.eval()
    tensors = [v for v in checkpoint["state_dict"].values() if isinstance(v, torch.Tensor)]
    return module.to(tensors[0].device) if tensors else module


def load_into(module: "LightningModule", path: str | Path) -> "LightningModule":
    """Gives a float module the structure and the values of a checkpoint of its quantized self.

    For a module that lives in this process; ``load_from_checkpoint`` builds one.

    Args:
        module: of the class that was saved, in float; changed in place.
        path: of a file by ``save_checkpoint``.

    Raises:
        QatTricksError: the file is missing or damaged, or is of another network.
    """
    checkpoint = load_checkpoint(path)
    _take_structure(module, checkpoint)
    load_state(module, checkpoint, path, strict=True)
    return module


def _take_structure(module: "LightningModule", checkpoint: dict[str, Any]) -> None:
    """Rebuilds the network of a float module as the checkpoint's spec says, without its values."""
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        return
    name = saved["network"]
    name = find_network(module, name if _has(module, name) else bare(f"{name}.")[:-1])
    network = unwrapped(network_of(module, name))
    if not is_whole(module, name):
        module.set_submodule(name, network)  # of torch.compile, for example
    # A hyperparameter may be the network itself, quantized as it was when it was saved.
    if "qat_tricks" not in getattr(network, "meta", {}):
        network = rebuild(network, saved["spec"])
    attach_workbench(module, Workbench(network), name)


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())


def _strictness(module: "LightningModule", strict: bool | None) -> bool:
    """Whether keys must match, by the argument and by what the module says of itself."""
    own = getattr(module, "_strict_loading", None)
    if strict is not None and own is not None and strict != own:
        raise QatTricksError(
            f"strict={strict} contradicts {type(module).__name__}.strict_loading={own}: give one "
            "of them, or the same"
        )
    return bool(module.strict_loading) if strict is None else strict


def load_state(
    module: nn.Module, checkpoint: dict[str, Any], path: str | Path, *, strict: bool
) -> None:
    """Loads the weights of a checkpoint, read from ``path``, into ``module``.

    Without ``strict`` a warning names what one of them lacks.

    Raises:
        QatTricksError: the checkpoint is of another network.
    """
    state = matched(checkpoint["state_dict"], module)
    try:
        keys = module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise QatTricksError(f"{path} does not fit {type(module).__name__}: {reason}") from error
    for what, names in (("lacks", keys.missing_keys), ("has besides", keys.unexpected_keys)):
        if names:
            more = f" and {len(names) - 5} others" if len(names) > 5 else ""
            rank_zero_warn(f"{path} {what} {', '.join(names[:5])}{more}")


def is_mid_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written with batches of its epoch left to train on."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    # ``ready`` counts the batches of the epoch so far; it is reset only by the next epoch.
    return progress["current"]["ready"] > 0 and not progress["is_last_batch"]
