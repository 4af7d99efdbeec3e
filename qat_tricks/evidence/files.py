"""Text and JSON files."""

import json
import math
from pathlib import Path
from typing import Any

from qat_tricks.errors import QatTricksError
from qat_tricks.files import replacing


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, making its folder; what was there before survives a failure.

    Raises:
        QatTricksError: the folder cannot be made or written.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON, atomically. Infinite and NaN figures, which JSON has not, become
    null.

    Raises:
        QatTricksError: the folder cannot be made or written.
    """
    write_text(path, json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """Returns the data with every float that is not finite replaced by None."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        QatTricksError: it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QatTricksError(
            f'cannot read "{path}" ({error.strerror or error}): give a file that a run wrote'
        ) from error
    except ValueError as error:
        raise QatTricksError(
            f'"{path}" is not JSON ({error}): run the job again to write it anew'
        ) from error
