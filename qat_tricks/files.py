"""Writes JSON, text and tensors atomically: beside the path first, then in its place."""

import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qat_tricks.errors import QatTricksError

LOCK = ".lock"  # the file of a folder that a run has for itself


class InUseError(QatTricksError):
    """A folder belongs to another run, which is still going."""


class UnwritableError(QatTricksError):
    """A file or its folder cannot be written, which says nothing of what was to be kept there."""


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yields a draft's path beside ``path``, whose folder is made.

    The draft becomes ``path`` after the block. After an error it is deleted.

    Raises:
        UnwritableError: the folder cannot be made or written; a file that was at ``path`` stays.
    """
    path = Path(path)
    # in the same folder, since a move to another disk would not be one step
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
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UnwritableError:
    reason = error.strerror or error
    return UnwritableError(
        f'"{path}" cannot be written ({reason}): give a path in a folder of yours'
    )


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Makes ``folder``, and keeps others out of it until the block ends or this process dies.

    Raises:
        UnwritableError: the folder cannot be made or written.
        InUseError: another run, which is still going, has it.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InUseError(
            f'another run that is still going writes into "{folder}": wait for its end, or give '
            "another folder"
        ) from error
    except NotImplementedError:
        warnings.warn(
            f'the file system of "{folder}" has no locks: see to it that no other run writes there',
            stacklevel=3,
        )
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: no other's is taken away
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, making its folder.

    Raises:
        UnwritableError: the folder cannot be made or written.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON, atomically; infinity and NaN become null.

    Raises:
        UnwritableError: the folder cannot be made or written.
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


def write_tensors(data: Any, path: str | PathLike[str]) -> None:
    """Writes tensors with ``torch.save``, atomically.

    Raises:
        UnwritableError: the folder cannot be made or written.
    """
    import torch  # slow to load, and JSON does without

    buffer = io.BytesIO()  # written by torch, a full disk would be "unexpected pos 5376 vs 5272"
    torch.save(data, buffer)
    with replacing(path) as draft:
        draft.write_bytes(buffer.getbuffer())
