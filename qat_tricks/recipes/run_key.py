"""Tells one run of a recipe on a module from another, so that none goes on in another's files."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qat_tricks.recipes.recipe import StagedRecipe


def run_key(module: nn.Module, recipes: Iterable[StagedRecipe], *besides: Any) -> str:
    """A hash of the module's weights, of what recipes do, and of plain values ``besides``."""
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
    digest = hashlib.sha256(repr((done, besides)).encode())
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(name.encode())
            values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _plain(trick: Any) -> list[tuple[str, str]]:
    """The settings of a trick: what it is before it has done anything."""
    kinds = (str, int, float, bool, type(None), tuple, list, dict)
    return sorted(
        (key, repr(value))
        for key, value in vars(trick).items()
        if isinstance(value, kinds) or key == "settings"
    )
