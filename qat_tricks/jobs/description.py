"""The description that a run's ONNX files carry in their metadata, such as recipe and model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_tricks.data import build_data
from qat_tricks.errors import QatTricksError

PREFIX = "qat_tricks."  # of our keys
REQUIRED = ("recipe", "model", "data", "preprocessing")  # an evaluation needs them
OPTIONAL = ("class_names",)  # an older file, or one of a user's own, does not say them


def to_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """Returns plain data as the metadata of an ONNX file, each value as JSON."""
    return {f"{PREFIX}{key}": json.dumps(value) for key, value in description.items()}


def from_metadata(
    metadata: Mapping[str, str], path: Path, data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the description of the ONNX file at ``path``, as far as an evaluation asks for it.

    Args:
        metadata: of the file.
        path: of the file.
        data: settings of the data to take for a file that ``train.py`` did not write.

    Raises:
        QatTricksError: a part is missing, and there are no ``data``.
    """
    missing = [key for key in REQUIRED if PREFIX + key not in metadata]
    if missing and data is None:
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say its {', '.join(missing)}; "
            f"{NEEDS_DATA}"
        )
    known = {
        key: json.loads(metadata[PREFIX + key])
        for key in (*REQUIRED, *OPTIONAL)
        if PREFIX + key in metadata
    }
    return {**foreign(path.stem, data), **known} if data is not None else known


NEEDS_DATA = "give data=NAME with its settings, or qat_tricks.evaluate(path, loader) in Python"


def foreign(model: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a file that says nothing of itself: the data are as they are given.

    Args:
        model: a name for the network.
        data: settings of the data, whose preprocessing is taken for the network's.
    """
    preprocessing = build_data(**data).preprocessing.described()
    return {
        "recipe": None,
        "model": {"name": model},
        "data": dict(data),
        "preprocessing": preprocessing,
    }
