"""What a start finds: where each stream goes on, and what an earlier process left in the journal."""

from pathlib import Path

import msgspec
import structlog

from service.archive.journal import Journal
from service.archive.manifest import read_manifest
from service.archive.numbers import LAST_NAME, read_numbers
from service.archive.schema import STREAMS, SchemaNewer, check_version
from service.archive.segments import Tail, parquets, recover, sync_file
from service.errors import DataDirectoryUnusable

log = structlog.get_logger("archive.recovery")


class Found(msgspec.Struct, frozen=True):
    """What an earlier process left: where each stream's segments end, and what is in the journal."""

    tails: dict[str, Tail]
    journalled: list[tuple[int, str, int]]  # position, stream, sequence


def recover_all(directory: Path, journal: Journal) -> Found:
    """Cut what was torn, from segments and journal. Raises DataDirectoryUnusable."""
    try:
        journalled = journal.recover()
        names = dict.fromkeys((*STREAMS, *(stream for _, stream, _ in journalled)))
        noted = read_numbers(directory / LAST_NAME)
        tails = {stream: _tail(directory, stream, noted.get(stream, 0)) for stream in names}
        if journalled:
            # What the earlier process wrote and had not synced leaves the journal: synced first.
            for tail in tails.values():
                if tail.path is not None:
                    sync_file(tail.path)
        for stream, tail in tails.items():
            check_version(stream, _version_of(directory, stream, tail), f"the archive at {directory}")
    except OSError as error:
        raise DataDirectoryUnusable(f"the archive at {directory} cannot be read: {error}") from error
    except SchemaNewer as error:
        raise DataDirectoryUnusable(str(error)) from None
    for stream, tail in tails.items():
        if tail.torn_bytes:
            log.warning(
                "a torn end was cut from the archive", stream=stream, bytes=tail.torn_bytes, segment=tail.path
            )
    if journal.torn_bytes:
        log.warning("a torn record was set aside from the journal", bytes=journal.torn_bytes)
    return Found(tails, journalled)


def _tail(directory: Path, stream: str, noted: int) -> Tail:
    """Where the stream goes on: behind all that was ever durable, even where its last segment is gone."""
    tail = recover(directory, stream)
    if tail.next_sequence > noted:
        return tail
    log.error("records are missing from the archive", stream=stream, since=tail.next_sequence, until=noted)
    return msgspec.structs.replace(tail, next_sequence=noted + 1)


def _version_of(directory: Path, stream: str, tail: Tail) -> int:
    """The newest schema of the stream's last records; the last segment may be empty."""
    manifest = next(
        (found for path in parquets(directory, stream)[-1:] if (found := read_manifest(path))), None
    )
    return max(tail.version, manifest.version if manifest else 1)
