"""Tells one run of a recipe on a module from another, so that none goes on in another's files."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.recipes.recipe import StagedRecipe

SEEN = 8  # training images by which a data set is known


def run_key(module: nn.Module, recipes: Iterable[StagedRecipe], *besides: Any) -> str:
    """A hash of the module's weights and hyperparameters, of what recipes do, and of plain values
    ``besides``.
    """
    done = [
        (
            stage.name,
            stage.epochs,
            stage.lr,
            [(trick.name, _plain(trick)) for trick in stage.tricks],
        )
        for recipe in recipes
        for stage in recipe.stages
    ]
    hparams = sorted((str(key), repr(value)) for key, value in _hparams(module) if _is_plain(value))
    rate = getattr(module, "lr", None)
    digest = hashlib.sha256(repr((done, besides, hparams, rate)).encode())
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(name.encode())
            values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def training_fingerprint(loader: Any, seed: int = 0) -> str | None:
    """A hash of the training images, by a few of them; None where they cannot be told apart.

    Only a data set that has places is asked: a stream would lose what is read from it.

    Args:
        loader: of training images.
        seed: of what a data set draws, such as augmentation.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if callable(getattr(dataset, "fingerprint", None)):  # ours knows all of its images
        return dataset.fingerprint()
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None
    length = len(dataset)
    places = sorted({place * length // SEEN for place in range(SEEN)}) if length else []
    digests = []
    for _ in range(2):
        digest = hashlib.sha256(str(length).encode())
        with kept_random_state():
            seed_all(seed)
            for place in places:
                digest.update(bytes_in(dataset[place]))
        digests.append(digest.hexdigest())
    # What draws from a generator of its own gives others each time.
    return digests[0] if digests[0] == digests[1] else None


def bytes_in(batch: Any) -> bytes:
    """The values in a batch, or in one image and its label."""
    parts = []
    for leaf in tree_leaves(batch):
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            parts.append(torch.as_tensor(leaf).detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(leaf, (str, int, float)):
            parts.append(repr(leaf).encode())
    return b"".join(parts)


def plain_settings(trainer: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """The arguments of a trainer that are plain values."""
    return sorted((key, value) for key, value in (trainer or {}).items() if _is_plain(value))


def _hparams(module: nn.Module) -> Iterable[tuple[Any, Any]]:
    return getattr(module, "hparams", {}).items()


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _plain(trick: Any) -> list[tuple[str, str]]:
    """The settings of a trick: what it is before it has done anything."""
    kinds = (str, int, float, bool, type(None), tuple, list, dict)
    return sorted(
        (key, repr(value))
        for key, value in vars(trick).items()
        if isinstance(value, kinds) or key == "settings"
    )
