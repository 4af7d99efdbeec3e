"""Finds the folder of the YAML files, and what its config groups hold."""

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


def check_option(group: str, name: str) -> None:
    """Raises QatTricksError if a config group has no such name."""
    if name not in options(group):
        raise QatTricksError(f'unknown {group} "{name}": {did_you_mean(name, options(group))}')
