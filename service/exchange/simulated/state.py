"""The saved state of a simulated exchange: one JSON file, replaced as a whole."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from service.errors import SettingsInvalid

VERSION = 1


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Market time and the engine's state, with the market they belong to."""

    version: int
    market: dict[str, str]
    market_ms: int
    engine: dict[str, Any]


def load_state(path: Path, market: Mapping[str, str]) -> Saved | None:
    """What was saved, or None when nothing was.

    Raises: SettingsInvalid: the file is not a state file, or belongs to another market.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise SettingsInvalid(f"{path}: its folder does not exist") from None
        return None
    except OSError as error:
        raise SettingsInvalid(f"{path}: cannot be read: {error.strerror}") from None
    try:
        saved = msgspec.json.decode(text, type=Saved)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path}: is not the state of a simulated exchange: {error}") from None
    if saved.version != VERSION:
        raise SettingsInvalid(f"{path}: state of version {saved.version}, this program reads {VERSION}")
    if saved.market != dict(market):
        differs = "; ".join(
            f"{name} is {saved.market.get(name)!r} there, {market.get(name)!r} here"
            for name in sorted({*saved.market, *market})
            if saved.market.get(name) != market.get(name)
        )
        raise SettingsInvalid(f"{path}: the state belongs to another market ({differs}); use another file")
    return saved


def encode_state(market: Mapping[str, str], market_ms: int, engine: dict[str, Any]) -> bytes:
    return msgspec.json.encode(Saved(VERSION, dict(market), market_ms, engine))


def write_state(path: Path, content: bytes) -> None:
    """Replace the file so that a crash leaves the old or the new one, never a part. Blocks on the disk."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a directory
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
