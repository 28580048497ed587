"""What tells one archive from another: a random name, written once and copied with it."""

import os
import uuid
from pathlib import Path

import structlog

from service.archive.segments import sync_directory

log = structlog.get_logger("archive.identity")

FILE_NAME = "identity"


def identity_of(directory: Path) -> str:
    """The archive's name; made, and durable on return, when there is none. Blocks.

    A disk that refuses costs the name, not the start: it is another one then at the next.
    """
    path = directory / FILE_NAME
    made = uuid.uuid4().hex
    try:
        if path.exists() and (kept := path.read_text(errors="replace").strip()):
            return kept
        _write(path, made)
    except OSError as error:
        log.warning("the archive's name could not be kept", path=str(path), error=str(error))
    return made


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)
