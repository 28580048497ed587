"""Small files of sequence numbers by name, written whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from service.archive.segments import sync_directory

LAST_NAME = "last.json"  # by stream, the last number known to be durable
SEEN_NAME = "seen.json"  # by stream, the last number that training has taken in
PRUNED_NAME = "pruned.json"  # in a stream's directory: `until`, the last number that retention removed


def read_numbers(path: Path) -> dict[str, int]:
    """Empty when there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except (FileNotFoundError, msgspec.MsgspecError):
        return {}


def write_numbers(path: Path, numbers: Mapping[str, int]) -> None:
    """Durable on return. Raises OSError."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(msgspec.json.encode(numbers) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)
