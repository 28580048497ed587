"""What can be seen at a start of an archive that is not whole, without reading its records.

Names, sizes, manifests and both ends of a Parquet file are looked at; `perpd archive verify` reads all.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from service.archive.manifest import Manifest, manifest_path
from service.archive.schema import STREAMS
from service.archive.segments import hot_and_compacted

log = structlog.get_logger("archive.damage")

MAGIC = b"PAR1"
LEAST_PARQUET_BYTES = 12  # magic, length of the footer, magic
SHOWN = 10
ADVICE = (
    "nothing was changed and recording goes on; run `perpd archive verify` for all of it, and put the file "
    "back from a copy; a query fails on a damaged Parquet file until it is put back or moved elsewhere"
)


class Damage(msgspec.Struct, frozen=True):
    """One file and what is wrong with it."""

    path: Path
    words: str


def tell(directory: Path) -> None:
    """Log what is damaged, once, and change nothing."""
    found = list(look(directory))
    if found:
        shown = [f"{one.path.relative_to(directory)}: {one.words}" for one in found[:SHOWN]]
        log.error("the archive is damaged", files=len(found), first=shown, advice=ADVICE)


def look(directory: Path) -> Iterator[Damage]:
    """Of every stream, in the order of their names. A file that goes away meanwhile is none."""
    for stream in STREAMS:
        hot, compacted = hot_and_compacted(directory, stream)
        for path in sorted(hot) + sorted(compacted):
            try:
                if words := _wrong(path):
                    yield Damage(path, words)
            except FileNotFoundError:
                continue
            except OSError as error:
                yield Damage(path, f"cannot be read: {error.strerror}")


def _wrong(path: Path) -> str:
    """What is wrong with a segment, or ''."""
    manifest = None
    try:
        manifest = msgspec.json.decode(manifest_path(path).read_bytes(), type=Manifest)
    except FileNotFoundError:
        pass  # unfinished
    except msgspec.MsgspecError:
        return f"{manifest_path(path).name} cannot be read"
    size_bytes = path.stat().st_size
    if path.suffix == ".parquet" and not _is_parquet(path, size_bytes):
        return f"is no whole Parquet file ({size_bytes} bytes)"
    if manifest is not None and manifest.size_bytes != size_bytes:
        return f"has {size_bytes} bytes, its manifest says {manifest.size_bytes}"
    return ""


def _is_parquet(path: Path, size_bytes: int) -> bool:
    if size_bytes < LEAST_PARQUET_BYTES:
        return False
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
        file.seek(-len(MAGIC), os.SEEK_END)
        return head == file.read() == MAGIC
