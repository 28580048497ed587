"""The archive's files: their names, when a new one begins, and what a crash may have left at their end.

    <archive>/<stream>/<UTC day>/<stream>-<first sequence number>.jsonl

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

VERSION = 1
SUFFIX = ".jsonl"
TORN_SUFFIX = ".torn"

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_TAIL_BYTES = 65_536
LARGEST_LINE_BYTES = 16 * 1024 * 1024  # what the readers take as one line


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


def encode_line(sequence: int, archived_ms: int, record: bytes) -> bytes:
    """One line of a segment. Args: record: a JSON object, as `msgspec.json.encode` gives it."""
    head = b'{"v":%d,"seq":%d,"archived_ms":%d' % (VERSION, sequence, archived_ms)
    return head + (b"}\n" if record == b"{}" else b"," + record[1:] + b"\n")


def utc_day(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d")


def segment_path(directory: Path, stream: str, day: str, first_sequence: int) -> Path:
    return directory / stream / day / f"{stream}-{first_sequence:012d}{SUFFIX}"


def first_sequence(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def segments(directory: Path, stream: str) -> list[Path]:
    """All segments of a stream, in the order they were written."""
    name = re.compile(rf"{re.escape(stream)}-\d{{12,}}{re.escape(SUFFIX)}")
    root = directory / stream
    if not root.is_dir():
        return []
    days = [day for day in root.iterdir() if _DAY.fullmatch(day.name) and day.is_dir()]
    found = [path for day in days for path in day.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=first_sequence)


def recover(directory: Path, stream: str) -> Tail:
    """Find where a stream ends and cut what a crash tore: only whole, readable lines stay.

    What is cut is appended to `<segment>.torn` first, so nothing is destroyed.
    """
    found = segments(directory, stream)
    if not found:
        return Tail(path=None, size_bytes=0, next_sequence=1, torn_bytes=0)
    torn_bytes = 0
    for path in reversed(found):
        size = path.stat().st_size
        end, last = _last_whole_line(path, size)
        if end < size:
            _cut(path, end)
            torn_bytes += size - end
        if last:
            # A later segment that a crash left empty is named for the number that comes next: the same one.
            return Tail(path=path, size_bytes=end, next_sequence=last + 1, torn_bytes=torn_bytes)
    return Tail(path=found[0], size_bytes=0, next_sequence=first_sequence(found[0]), torn_bytes=torn_bytes)


def _last_whole_line(path: Path, size: int) -> tuple[int, int]:
    """End offset of the last readable line and its sequence number; (0, 0) when there is none."""
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
                sequence = _sequence(data[start:end])
                if sequence:
                    return size - span + end, sequence
                end = start
            if span == size:
                return 0, 0
            span = min(span * 4, size)


def _sequence(line: bytes) -> int:
    try:
        return msgspec.json.decode(line, type=Envelope).seq
    except msgspec.DecodeError:
        return 0


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
