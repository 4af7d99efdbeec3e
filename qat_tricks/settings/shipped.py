"""Composes a recipe without Hydra, whose import takes as long as a small calibration.

Shipped recipes use three forms of Hydra's defaults list: another recipe, ``_self_``, and
``/trick@PLACE: [NAME, …]``. Recipes with overrides, or with other forms, go through Hydra.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from qat_tricks.settings.plain import as_plain


class NeedsHydraError(Exception):
    """The recipe uses a form of Hydra's that is not read here."""


def compose_recipe(name: str, folder: Path) -> dict[str, Any]:
    """The settings of the recipe ``name`` in ``folder/recipe``, as Hydra composes them.

    Raises:
        NeedsHydraError: only Hydra can compose it.
    """
    return as_plain(_compose(name, folder), f"recipe {name}")


def _compose(name: str, folder: Path) -> DictConfig:
    path = folder / "recipe" / f"{name}.yaml"
    # To OmegaConf this is a comment; to Hydra it is an instruction.
    if "@package" in path.read_text(encoding="utf-8"):
        raise NeedsHydraError(name)
    own = _read(path)
    parts = []
    # Later entries override earlier ones, as in Hydra.
    for entry in own.pop("defaults", ["_self_"]):
        if entry == "_self_":
            parts.append(own)
        elif isinstance(entry, str):
            parts.append(_compose(entry, folder))
        else:
            parts.append(_tricks(entry, folder))
    return OmegaConf.merge(*parts)  # type: ignore[return-value]


def _tricks(entry: DictConfig, folder: Path) -> DictConfig:
    """The settings that ``/trick@stages.ptq.tricks: [NAME, …]`` stands for."""
    group, names = next(iter(entry.items()), ("", None))
    kind, _, place = str(group).partition("@")
    if len(entry) > 1 or kind != "/trick" or not place or not isinstance(names, ListConfig):
        raise NeedsHydraError(str(group))
    tricks = OmegaConf.merge(*(_read(folder / "trick" / f"{name}.yaml") for name in names))
    nested = OmegaConf.create()
    OmegaConf.update(nested, place, tricks)
    return nested


def _read(path: Path) -> DictConfig:
    settings = OmegaConf.load(path)
    if not isinstance(settings, DictConfig):
        raise NeedsHydraError(path.stem)
    return settings
