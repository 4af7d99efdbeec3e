"""The images of the guideline: those that decide, and how many it trains on."""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from lightning_utilities.core.overrides import is_overridden

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import is_loader
from qat_tricks.graph.random_state import seed_all
from qat_tricks.jobs.guideline_judge import other_images
from qat_tricks.recipes.run_key import bytes_in
from qat_tricks.trainer.framework import PACKAGES, package_of


def validation_batches(
    module: Any, data: Any, val: Any, trainer: Mapping[str, Any], seed: int
) -> Any:
    """The loader of validation images.

    Args:
        module: the LightningModule that is judged.
        data: a data module, or a loader of training images.
        val: the loader, where ``data`` is one.
        trainer: arguments of the trainer that a data module is set up with.
        seed: of what the data module draws.

    Raises:
        QatTricksError: there is none, there are several, or it gives others in each pass, or
            after each set-up of the data module.
    """
    own = val is None and _has_validation(data)
    if own:
        # Some ask their trainer for its processes.
        data.trainer = package_of(module).Trainer(**{**trainer, "enable_checkpointing": False})
        data.prepare_data()
        data.setup("fit")
        val = data.val_dataloader()
    is_list = isinstance(val, (list, tuple)) and len(val) > 0 and all(map(is_loader, val))
    if is_list and len(val) > 1:
        raise QatTricksError(f"{len(val)} validation loaders are given: give one, which decides")
    val = val[0] if is_list else val
    if val is None or _is_empty(val):
        raise QatTricksError(
            "the guideline decides on validation images, and there are none: give a data "
            "module with a val_dataloader, or val_dataloaders=LOADER"
        )
    if isinstance(val, Iterator):
        raise QatTricksError(
            "the validation loader yields its batches only once, and each step needs them: "
            "give a DataLoader, or a list of batches, list(loader)"
        )
    _check_same(val, data if own else None, seed)
    return val


def _has_validation(data: Any) -> bool:
    if not hasattr(data, "val_dataloader"):
        return False
    # Lightning's own raises.
    kinds = [import_module(name).LightningDataModule for name in PACKAGES if name in sys.modules]
    own = [kind for kind in kinds if isinstance(data, kind)]
    return all(is_overridden("val_dataloader", data, kind) for kind in own)


def _check_same(val: Any, data: Any, seed: int) -> None:
    """Raises QatTricksError unless each pass, and each set-up, gives the same images."""
    first = _first_images(val)
    seed_all(seed + 1)
    if _first_images(val) != first:
        raise other_images()
    if data is not None:
        data.setup("fit")
        if _first_images(data.val_dataloader()) != first:
            raise QatTricksError(
                f"{type(data).__name__}.setup splits otherwise each time, so that images "
                "on which it is decided would be trained on: give random_split a "
                "generator=torch.Generator().manual_seed(0)"
            )
    seed_all(seed)


def _is_empty(loader: Any) -> bool:
    try:
        return len(loader) == 0
    except TypeError:  # of a stream, for one
        return False


def _first_images(loader: Any) -> bytes:
    """What a loader's first batch holds."""
    return bytes_in(next(iter(loader), None))


def train_batches(data: Any, trainer: Mapping[str, Any]) -> float | None:
    """The batches of an epoch, as far as the loader and the trainer say."""
    loader = data.train_dataloader() if hasattr(data, "train_dataloader") else data
    try:
        batches = float(len(loader))
    except TypeError:  # of a stream, for one
        batches = float("inf")
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, float):
        batches *= limit
    elif limit is not None:
        batches = min(batches, limit)
    return batches if batches < float("inf") else None
