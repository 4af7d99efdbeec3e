"""Finds the folder of the YAML files."""

from pathlib import Path


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return (inside if inside.is_dir() else package.parent / "conf").absolute()
