"""The archive's files: their names, when a new one begins, and what a crash may have left at their end.

    <archive>/<stream>/<UTC day>/<stream>-<first sequence number>.jsonl             JSON lines, while hot
    <archive>/<stream>/<UTC day>/<stream>-<first number>-<last number>.parquet      the same, compacted

One line is one record: {"v":1,"seq":12,"archived_ms":...,<the record's fields>}. The last segment of a
stream is the one with the highest number, whatever its day: a simulated market's days may repeat.
"""

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import aiofiles
import msgspec
from aiofiles.threadpool.binary import AsyncFileIO

SUFFIX = ".jsonl"
TORN_SUFFIX = ".torn"
PARQUET_SUFFIX = ".parquet"

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_TAIL_BYTES = 65_536
LARGEST_RECORD_BYTES = 16 * 1024 * 1024
LONGEST_LINE_BYTES = LARGEST_RECORD_BYTES + 4_096  # with its envelope


class Envelope(msgspec.Struct, frozen=True):
    """What stands before a record's own fields in each line."""

    v: int
    seq: int  # per stream, from 1, without gaps, across restarts
    archived_ms: int  # venue time


class Tail(msgspec.Struct, frozen=True):
    """Where a stream goes on after a start."""

    path: Path | None  # the last segment, None in a new archive
    size_bytes: int
    next_sequence: int
    torn_bytes: int  # cut from the end and kept beside the segment
    version: int = 1  # the schema of the last record


def encode_line(sequence: int, archived_ms: int, record: bytes, version: int = 1) -> bytes:
    """One line of a segment. Args: record: a JSON object, as `msgspec.json.encode` gives it."""
    head = b'{"v":%d,"seq":%d,"archived_ms":%d' % (version, sequence, archived_ms)
    return head + (b"}\n" if record == b"{}" else b"," + record[1:] + b"\n")


def utc_day(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d")


def segment_path(directory: Path, stream: str, day: str, first_sequence: int) -> Path:
    return directory / stream / day / f"{stream}-{first_sequence:012d}{SUFFIX}"


def first_sequence(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def parquet_path(segment: Path, last_sequence: int) -> Path:
    """Where a segment of JSON lines is kept once compacted."""
    return segment.with_name(f"{segment.stem}-{last_sequence:012d}{PARQUET_SUFFIX}")


def parquet_range(path: Path) -> tuple[int, int]:
    """First and last sequence number of a compacted segment."""
    first, last = path.stem.split("-")[-2:]
    return int(first), int(last)


def segments(directory: Path, stream: str) -> list[Path]:
    """All segments of JSON lines of a stream, in the order they were written."""
    return sorted(_named(directory, stream, rf"\d{{12,}}{re.escape(SUFFIX)}"), key=_place)


def _place(path: Path) -> tuple[int, bool]:
    """An empty segment may have the number of the next one, on another day: what holds records is newer."""
    try:
        return first_sequence(path), path.stat().st_size > 0
    except FileNotFoundError:
        return first_sequence(path), False


def parquets(directory: Path, stream: str) -> list[Path]:
    """All compacted segments of a stream, in the order they were written."""
    found = _named(directory, stream, rf"\d{{12,}}-\d{{12,}}{re.escape(PARQUET_SUFFIX)}")
    return sorted(found, key=parquet_range)


def hot_segments(directory: Path, stream: str) -> list[Path]:
    """Segments of JSON lines that are not compacted: one that is may still be there for a moment."""
    return hot_and_compacted(directory, stream)[0]


def hot_and_compacted(directory: Path, stream: str) -> tuple[list[Path], list[Path]]:
    """Segments of JSON lines that are not compacted, and those that are; each segment in one of the two.

    Lines are listed first: one that is compacted meanwhile is in both lists, never in neither.
    """
    lines = segments(directory, stream)
    compacted = parquets(directory, stream)
    firsts = {parquet_range(path)[0] for path in compacted}
    return [path for path in lines if first_sequence(path) not in firsts], compacted


def _named(directory: Path, stream: str, numbers: str) -> list[Path]:
    name = re.compile(rf"{re.escape(stream)}-{numbers}")
    root = directory / stream
    if not root.is_dir():
        return []
    days = [day for day in root.iterdir() if _DAY.fullmatch(day.name) and day.is_dir()]
    return [path for day in days for path in day.iterdir() if name.fullmatch(path.name)]


def recover(directory: Path, stream: str) -> Tail:
    """Find where a stream ends and cut what a crash tore: only whole, readable lines stay.

    What is cut is appended to `<segment>.torn` first, so nothing is destroyed. The stream goes on in its
    newest segment even where that is empty: every other counts as finished and may be compacted and removed.
    """
    found, parquet = hot_and_compacted(directory, stream)
    compacted = max((parquet_range(path)[1] for path in parquet), default=0)
    if not found or first_sequence(found[-1]) <= compacted:
        return Tail(path=None, size_bytes=0, next_sequence=compacted + 1, torn_bytes=0)
    newest, torn_bytes = found[-1], 0
    for path in reversed(found):
        if first_sequence(path) <= compacted:
            break  # what is compacted came later
        size = path.stat().st_size
        end, last = _last_whole_line(path, size)
        if end < size:
            _cut(path, end)
            torn_bytes += size - end
        if last is not None:
            return Tail(newest, end if path == newest else 0, last.seq + 1, torn_bytes, last.v)
    next_sequence = compacted + 1 if compacted else first_sequence(found[0])
    return Tail(path=newest, size_bytes=0, next_sequence=next_sequence, torn_bytes=torn_bytes)


def _last_whole_line(path: Path, size: int) -> tuple[int, Envelope | None]:
    """End offset of the last readable line and its envelope; (0, None) when there is none."""
    with path.open("rb") as file:
        span = min(_TAIL_BYTES, size)
        while True:
            file.seek(size - span)
            data = file.read(span)
            end = data.rfind(b"\n") + 1
            while end > 0:
                start = data.rfind(b"\n", 0, end - 1) + 1
                if start == 0 and span < size:
                    break  # the line may begin before what was read
                envelope = envelope_of(data[start:end])
                if envelope is not None:
                    return size - span + end, envelope
                end = start
            if span == size:
                return 0, None
            span = min(span * 4, size)


def envelope_of(line: bytes) -> Envelope | None:
    """None for a line that is no record."""
    try:
        return msgspec.json.decode(line, type=Envelope)
    except msgspec.DecodeError:
        return None


def last_envelope(path: Path) -> Envelope | None:
    """Of the last record that can be read. Raises OSError."""
    return _last_whole_line(path, path.stat().st_size)[1]


def _cut(path: Path, end: int) -> None:
    with path.open("r+b") as segment:
        segment.seek(end)
        with path.with_name(path.name + TORN_SUFFIX).open("ab") as kept:
            kept.write(segment.read())
            kept.flush()
            os.fsync(kept.fileno())
        segment.truncate(end)
        segment.flush()
        os.fsync(segment.fileno())


def remove_segment(path: Path) -> None:
    """Remove a segment that holds nothing. Durable on return."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)


class SegmentFile(Protocol):
    """An open segment. Every method raises OSError when the disk refuses."""

    async def write(self, data: bytes) -> None:
        """Append; return once the kernel has all of `data`. After an OSError any part of it may be there."""
        ...

    async def sync(self) -> None:
        """Return once everything written before is on disk; writes may go on meanwhile."""
        ...

    async def close(self) -> None: ...


class Threads(NamedTuple):
    """Where blocking calls run: one thread writes while the other waits for the disk."""

    write: Executor
    sync: Executor


OpenSegment = Callable[[Path, int, Threads], Awaitable[SegmentFile]]
"""Open the segment at `path` for appending, cut to `size_bytes` first."""


class DiskSegment:
    """A segment on disk: unbuffered writes, fsync apart."""

    def __init__(self, file: AsyncFileIO, threads: Threads) -> None:
        self._file = file
        self._threads = threads

    async def write(self, data: bytes) -> None:
        written = await self._file.write(data)
        if written != len(data):
            raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written")

    async def sync(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads.sync, os.fsync, self._file.fileno())

    async def close(self) -> None:
        await self._file.close()


async def open_segment(path: Path, size_bytes: int, threads: Threads) -> DiskSegment:
    """See `OpenSegment`. The file's name is durable on return, so a crash cannot lose a synced file."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(threads.write, _prepare, path, size_bytes)
    file = await aiofiles.open(path, "ab", buffering=0, executor=threads.write)
    return DiskSegment(file, threads)


def _prepare(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        # After a failed write or fsync the end is unknown: what is not known to be durable goes.
        if os.fstat(descriptor).st_size > size_bytes:
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if size_bytes == 0:
        for directory in (path.parent, path.parent.parent, path.parent.parent.parent):
            sync_directory(directory)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
