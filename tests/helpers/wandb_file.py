"""Reads an offline W&B run back: its ``.wandb`` file is a LevelDB log of protobuf records."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(folder: Path) -> list[Record]:
    """All records of the one run in ``folder``, once W&B has written the last of them."""
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        found = _read(path.read_bytes())
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"{path} has no end")


def _read(data: bytes) -> list[Record]:
    assert data[:4] in (b":W&B", b"")
    found, position, part = [], FILE_HEADER, b""
    while position + RECORD_HEADER <= len(data):
        if BLOCK - position % BLOCK < RECORD_HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + RECORD_HEADER])
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        position += RECORD_HEADER
        if position + length > len(data):
            break
        part += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            found.append(Record.FromString(part))
            part = b""
    return found


def history(run: list[Record]) -> dict[str, Any]:
    """The last value of each metric."""
    return _items(
        item for record in run if record.HasField("history") for item in record.history.item
    )


def summary(run: list[Record]) -> dict[str, Any]:
    """The run's summary."""
    return _items(
        item for record in run if record.HasField("summary") for item in record.summary.update
    )


def config(run: list[Record]) -> dict[str, Any]:
    """The run's config, as it was started and updated."""
    items = [item for record in run if record.HasField("run") for item in record.run.config.update]
    items += [item for record in run if record.HasField("config") for item in record.config.update]
    return _items(items)


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
