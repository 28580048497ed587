"""Segments with a damaged middle: the whole file is kept aside, its readable lines stay in the archive.

<archive>/quarantine/<segment>      as it was found; <segment>.2 and so on where one of that name is kept
"""

import os
from pathlib import Path

import structlog

from service.archive.manifest import Manifest, describe, manifest_path, write_manifest
from service.archive.segments import envelope_of, first_sequence, sync_directory

log = structlog.get_logger("archive.quarantine")

NAME = "quarantine"
Range = tuple[int, int]


def missing_ranges(segment: Path, stop: int | None = None) -> list[Range]:
    """Sequence numbers that the segment should have and that cannot be read, in order.

    Args: stop: the number behind its last record where that is known, to see a damaged end.
    """
    missing: list[Range] = []
    expected = first_sequence(segment)
    with segment.open("rb") as file:
        for line in file:
            envelope = envelope_of(line)
            if envelope is None or envelope.seq < expected:
                continue
            if envelope.seq > expected:
                missing.append((expected, envelope.seq - 1))
            expected = envelope.seq + 1
    if stop is not None and expected < stop:
        missing.append((expected, stop - 1))
    return missing


def set_aside(directory: Path, segment: Path, stream: str, missing: list[Range]) -> Manifest | None:
    """Move the segment into quarantine and put its readable lines in its place; their manifest.

    Killed at any moment, the damaged segment is in the archive or in quarantine, and what takes its place
    has a manifest that says what is missing.
    """
    kept = _keep(directory / NAME, segment)
    new = segment.with_name(segment.name + ".new")
    expected = 0
    with segment.open("rb") as damaged, new.open("wb") as readable:
        for line in damaged:
            envelope = envelope_of(line)
            if envelope is not None and envelope.seq >= expected:
                expected = envelope.seq + 1
                readable.write(line if line.endswith(b"\n") else line + b"\n")
        readable.flush()
        os.fsync(readable.fileno())
    manifest = describe(new, stream, missing)
    if manifest is None:
        manifest_path(segment).unlink(missing_ok=True)
    else:
        write_manifest(segment, manifest)
    new.replace(segment)
    sync_directory(segment.parent)
    log.error("a damaged segment was set aside", stream=stream, missing=missing, kept=str(kept))
    return manifest


def _keep(place: Path, segment: Path) -> Path:
    """Give the segment a name in quarantine that no other has; an earlier run may have done so."""
    place.mkdir(exist_ok=True)
    kept, number = place / segment.name, 1
    while kept.exists() and not kept.samefile(segment):
        number += 1
        kept = place / f"{segment.name}.{number}"
    if not kept.exists():
        os.link(segment, kept)
    sync_directory(place)
    return kept
