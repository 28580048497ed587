"""The archive's lock: never two writers on one directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DataDirectoryUnusable


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the archive's lock. Raises DataDirectoryUnusable."""
    with _held(directory, ".lock", f"another process writes the archive at {directory}"):
        yield


@contextmanager
def only_upkeep(directory: Path) -> Iterator[None]:
    """Keep others from compacting or pruning; the writer goes on. Raises DataDirectoryUnusable."""
    words = (
        f"another process compacts, prunes or makes a dataset of the archive at {directory}; "
        "try again when it is done"
    )
    with _held(directory, ".upkeep.lock", words):
        yield


@contextmanager
def _held(directory: Path, name: str, refusal: str) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DataDirectoryUnusable(f"the archive at {directory} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataDirectoryUnusable(refusal) from error
        yield
    finally:
        os.close(descriptor)
