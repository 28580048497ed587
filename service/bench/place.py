"""Where a benchmark writes: a directory of its own, with room enough, gone at the end however it ends."""

import argparse
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from service.bench.machine import file_system
from service.errors import EXIT_DATA_DIRECTORY, PerpdError

MB = 1_000_000
_IN_MEMORY = ("tmpfs", "ramfs")


class NoRoom(PerpdError):
    """The directory a benchmark would write to is not there, cannot be written or is too small."""

    exit_code = EXIT_DATA_DIRECTORY


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says where."""
    words = f"where to write, and to remove it after (default: the system's, {tempfile.gettempdir()})"
    parser.add_argument("--dir", "--directory", dest="directory", type=Path, metavar="DIR", help=words)


@contextmanager
def place(directory: Path | None, needed_bytes: int) -> Iterator[Path]:
    """A new directory below the one that was named, or below the system's for temporary files.

    Raises: NoRoom.
    """
    where = directory or Path(tempfile.gettempdir())
    try:
        free_bytes = shutil.disk_usage(where).free
    except OSError as error:
        raise NoRoom(f"--dir {where}: {error.strerror}; name a directory that is there") from None
    if free_bytes < needed_bytes:
        kind = file_system(where)
        memory = ", which is memory" if kind in _IN_MEMORY else ""
        raise NoRoom(
            f"{where} ({kind}{memory}) has {free_bytes / MB:,.0f} MB free, about {needed_bytes / MB:,.0f} MB "
            "are needed; name a larger directory with --dir, or fewer --records"
        )
    try:
        made = tempfile.TemporaryDirectory(prefix="perpd-bench-", dir=where)
    except OSError as error:
        raise NoRoom(f"--dir {where}: {error.strerror}; name a directory that can be written") from None
    with made as name:
        yield Path(name)


def temporary_in(directory: Path) -> dict[str, str]:
    """For a process whose own temporary files go when the directory does, even where it is killed."""
    return {"TMPDIR": str(directory)}


@contextmanager
def cleaned_up_on_signal() -> Iterator[None]:
    """SIGINT and SIGTERM leave the block in order, with the signal's exit code; a second one is not heard."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, _: FrameType | None) -> NoReturn:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        os.write(2, f"ended by {signal.Signals(number).name}, removing what was written\n".encode())
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
