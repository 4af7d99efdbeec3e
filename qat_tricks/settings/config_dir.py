"""Finds the folder of the YAML files, and what its config groups hold."""

import re
from collections.abc import Collection
from pathlib import Path

from qat_tricks.errors import QatTricksError, did_you_mean


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return (inside if inside.is_dir() else package.parent / "conf").absolute()


def options(group: str) -> list[str]:
    """The names in a config group, such as ``recipe`` or ``trick``."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def no_such_part(key: str, parts: Collection[str]) -> str:
    """A message for a key that is none of a config's ``parts``.

    Args:
        key: that was given.
        parts: the keys of the whole config; the groups in it are among them.
    """
    for group in sorted(parts):
        for name in options(group):
            text = (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
            # Such a file adds keys to the whole config, beside its own group.
            if "@package _global_" in text and re.search(rf"^{re.escape(key)}:", text, re.M):
                return f"{key} belongs to {group}={name}: give that, or leave {key} out"
    return f'the config has no setting "{key}": {did_you_mean(key, parts)}'


def check_option(group: str, name: str) -> None:
    """Raises QatTricksError if a config group has no such name."""
    if name not in options(group):
        raise QatTricksError(f'unknown {group} "{name}": {did_you_mean(name, options(group))}')
