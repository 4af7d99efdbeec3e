"""Reads checkpoints under ``weights_only=True``, and writes and rebuilds them.

Writing needs no trainer, and rebuilding no recipe.
"""

from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.files import write_tensors
from qat_tricks.graph.surgery import rebuild
from qat_tricks.graph.workbench import Workbench
from qat_tricks.trainer.framework import package_of
from qat_tricks.trainer.module import (
    CHECKPOINT_KEY,
    attach_workbench,
    describe,
    find_network,
    has_workbench,
    network_of,
)
from qat_tricks.trainer.own_hooks import make_network

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint under ``weights_only=True``.

    Raises:
        QatTricksError: the file is missing, truncated, or not a Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(f"there is no checkpoint {path}: give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QatTricksError(
            f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or no checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise QatTricksError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return checkpoint


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
        "hyper_parameters": dict(pl_module.hparams),
    }
    if has_workbench(pl_module):
        checkpoint[CHECKPOINT_KEY] = describe(pl_module)
    write_tensors(checkpoint, path)


def load_from_checkpoint(
    module_class: "type[LightningModule]", path: str | Path, *, strict: bool = True, **kwargs: Any
) -> "LightningModule":
    """Builds a ``module_class`` and gives it the structure and the values of the checkpoint.

    No recipe is needed, and either of Lightning's packages will do.

    Args:
        module_class: the LightningModule's class; built from ``kwargs`` over the hyperparameters
            saved in the checkpoint.
        path: a checkpoint, quantized or float.
        strict: whether the keys must match exactly.

    Raises:
        QatTricksError: the file is missing or damaged, or the checkpoint is of another network.
    """
    checkpoint = load_checkpoint(path)
    hyperparameters = dict(checkpoint.get("hyper_parameters", {}))
    parameters = signature(module_class.__init__).parameters
    # As in Lightning, a class gets only the saved hyperparameters that it takes.
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        hyperparameters = {
            key: value for key, value in hyperparameters.items() if key in parameters
        }
    module = module_class(**{**hyperparameters, **kwargs})
    make_network(module, checkpoint["state_dict"])
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is not None:
        name = find_network(module, saved["network"])
        network = rebuild(network_of(module, name), saved["spec"])
        attach_workbench(module, Workbench(network), name)
    module.on_load_checkpoint(checkpoint)
    load_state(module, checkpoint, path, strict=strict)
    module.eval()
    return module


def load_state(
    module: nn.Module, checkpoint: dict[str, Any], path: str | Path, *, strict: bool
) -> None:
    """Loads the weights of a checkpoint, read from ``path``, into ``module``.

    Raises:
        QatTricksError: the checkpoint is of another network.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise QatTricksError(f"{path} does not fit {type(module).__name__}: {reason}") from error


def is_mid_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written with batches of its epoch left to train on."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    # ``ready`` counts the batches of the epoch so far; it is reset only by the next epoch.
    return progress["current"]["ready"] > 0 and not progress["is_last_batch"]
