"""The description that a run's ONNX files carry in their metadata, such as recipe and model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat_tricks.errors import QatTricksError

PREFIX = "qat_tricks."  # of our keys
REQUIRED = ("recipe", "model", "data", "preprocessing")  # an evaluation needs them


def to_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """Returns plain data as the metadata of an ONNX file, each value as JSON."""
    return {f"{PREFIX}{key}": json.dumps(value) for key, value in description.items()}


def from_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Returns the required part of the description of the ONNX file at ``path``.

    Raises:
        QatTricksError: a part is missing.
    """
    missing = [key for key in REQUIRED if PREFIX + key not in metadata]
    if missing:
        raise QatTricksError(
            f"{path} was not written by train.py: it does not say its {', '.join(missing)}"
        )
    return {key: json.loads(metadata[PREFIX + key]) for key in REQUIRED}
