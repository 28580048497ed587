"""What a finished segment holds, in a small file beside it: what `verify` and compaction compare it with.

signals-000000000001.jsonl     signals-000000000001.manifest.json
"""

import hashlib
import os
from pathlib import Path

import msgspec

from service.archive.segments import LONGEST_LINE_BYTES, Envelope, sync_directory

SUFFIX = ".manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One segment at the moment it was sealed or compacted."""

    stream: str
    version: int  # newest schema version in it
    first: int  # sequence numbers
    last: int
    records: int
    missing: list[tuple[int, int]] = []  # ranges set aside because they could not be read
    first_ms: int  # archived_ms of the first and the last record
    last_ms: int
    size_bytes: int
    sha256: str
    source_bytes: int  # of the JSON lines
    longest_bytes: int = LONGEST_LINE_BYTES  # of one line


def manifest_path(segment: Path) -> Path:
    return segment.with_suffix(SUFFIX)


def read_manifest(segment: Path) -> Manifest | None:
    """None when there is none that can be read."""
    try:
        return msgspec.json.decode(manifest_path(segment).read_bytes(), type=Manifest)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write_manifest(segment: Path, manifest: Manifest) -> None:
    """Whole or not at all, and durable on return."""
    path = manifest_path(segment)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(msgspec.json.encode(manifest) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)


def seal(segment: Path, stream: str) -> Manifest | None:
    """Describe a segment of JSON lines that nothing is appended to any more; None for an empty one.

    Raises: OSError; ValueError: its first or last line cannot be read.
    """
    manifest = describe(segment, stream)
    if manifest is not None:
        write_manifest(segment, manifest)
    return manifest


def describe(segment: Path, stream: str, missing: list[tuple[int, int]] | None = None) -> Manifest | None:
    """The manifest of a file of JSON lines, not written; None for an empty one. Raises as `seal` does."""
    sha256, records, size, longest = hashlib.sha256(), 0, 0, 0
    first_line = line = b""
    with segment.open("rb") as file:
        for line in file:
            sha256.update(line)
            first_line = first_line or line
            records += 1
            size += len(line)
            longest = max(longest, len(line))
    if not size:
        return None
    try:
        first = msgspec.json.decode(first_line, type=Envelope)
        last = msgspec.json.decode(line, type=Envelope)
    except msgspec.DecodeError as error:
        raise ValueError(f"{segment} begins or ends with a line that cannot be read") from error
    return Manifest(
        stream=stream,
        version=max(first.v, last.v),
        first=first.seq,
        last=last.seq,
        records=records,
        missing=missing or [],
        first_ms=first.archived_ms,
        last_ms=last.archived_ms,
        size_bytes=size,
        sha256=sha256.hexdigest(),
        source_bytes=size,
        longest_bytes=longest,
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
