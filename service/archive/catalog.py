"""What is in an archive: every segment of a stream in the order of its numbers, compacted and not."""

import time
from pathlib import Path

import msgspec

from service.archive.manifest import Manifest, read_manifest
from service.archive.numbers import PRUNED_NAME, SEEN_NAME, read_numbers
from service.archive.schema import STREAMS, check_version
from service.archive.segments import (
    envelope_of,
    first_sequence,
    hot_and_compacted,
    last_envelope,
    parquet_range,
)
from service.errors import DataDirectoryUnusable


class Segment(msgspec.Struct, frozen=True):
    """One file of a stream."""

    stream: str
    path: Path
    first: int
    last: int | None  # None while it is not known without reading: an unfinished segment
    size_bytes: int
    manifest: Manifest | None

    @property
    def compacted(self) -> bool:
        return self.path.suffix == ".parquet"

    @property
    def state(self) -> str:
        return "compacted" if self.compacted else "sealed" if self.manifest else "hot"


def catalog(directory: Path, stream: str) -> list[Segment]:
    """The stream's segments, oldest first. Taken anew when a compaction changes it meanwhile."""
    for _ in range(5):
        try:
            return _catalog(directory, stream)
        except FileNotFoundError:
            time.sleep(0.05)
    return _catalog(directory, stream)


def _catalog(directory: Path, stream: str) -> list[Segment]:
    found = []
    hot, compacted = hot_and_compacted(directory, stream)
    for path in compacted:
        first, last = parquet_range(path)
        found.append(Segment(stream, path, first, last, path.stat().st_size, read_manifest(path)))
    for path in hot:
        manifest = read_manifest(path)
        last_known = manifest.last if manifest else None
        first = first_sequence(path)
        found.append(Segment(stream, path, first, last_known, path.stat().st_size, manifest))
    return sorted(found, key=lambda segment: segment.first)


def existing(directory: Path) -> Path:
    """The archive's directory. Raises DataDirectoryUnusable: there is none."""
    if not directory.is_dir():
        raise DataDirectoryUnusable(
            f"there is no archive at {directory}; name its data directory with --data-dir"
        )
    return directory


def check_versions(directory: Path) -> None:
    """Raises SchemaNewer: a segment was written by a newer perpd."""
    for stream in STREAMS:
        for segment in catalog(directory, stream):
            found = segment.manifest.version if segment.manifest else _version_of(segment.path)
            check_version(stream, found, str(segment.path))


def _version_of(path: Path) -> int:
    """The newest schema version in an unfinished segment: that of its last whole line."""
    with path.open("rb") as file:
        first = envelope_of(file.readline())
    last = last_envelope(path)
    return max(first.v if first else 1, last.v if last else 1)


def pruned_until(directory: Path, stream: str) -> int:
    """The last sequence number that retention removed; 0 when it removed none."""
    return read_numbers(directory / stream / PRUNED_NAME).get("until", 0)


def seen_by_training(directory: Path) -> dict[str, int]:
    """By stream, the last sequence number that training has taken in."""
    return read_numbers(directory / SEEN_NAME)
