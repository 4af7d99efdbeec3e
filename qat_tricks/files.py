"""Files that appear whole or not at all: written beside, then put in place."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from qat_tricks.errors import QatTricksError


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A path beside ``path``, whose folder is made, to write to: it takes its place if all goes
    well and is gone otherwise.

    Raises:
        QatTricksError: the folder cannot be made or written; what was there before is left as it
            was.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.touch()  # a folder that cannot be written is refused before the work
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise QatTricksError(
            f'"{path}" cannot be written ({reason}): give a path in a folder of yours'
        ) from error


def write_tensors(data: Any, path: str | PathLike[str]) -> None:
    """``torch.save``, atomically.

    Raises:
        QatTricksError: the folder cannot be made or written.
    """
    buffer = io.BytesIO()  # written by torch, a full disk would be "unexpected pos 5376 vs 5272"
    torch.save(data, buffer)
    with replacing(path) as draft:
        draft.write_bytes(buffer.getbuffer())
