"""Every record perpd makes is kept: buffered by stream, appended to the stream's active segment.

A record accepted by `put` is on disk after at most `flush_after_s`, or 49 further records of its
stream, or the drain. A disk that refuses loses nothing: buffers stay, producers wait, `writable` is False.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from service.archive.segments import (
    OpenSegment,
    SegmentFile,
    Tail,
    encode_line,
    open_segment,
    recover,
    segment_path,
    utc_day,
)
from service.errors import ArchiveNotDrained, DataDirectoryUnusable
from service.ports import Clock, Recorder
from service.records import Record
from service.settings import ArchiveSettings

log = structlog.get_logger("archive.archiver")

STREAMS = ("signals", "decisions", "orders", "fills", "positions", "adjustments", "shadow_outcomes")

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_DRAIN_RETRY_S = 0.5
_CLOSE_LIMIT_S = 1.0


class StreamStatistics(msgspec.Struct, frozen=True):
    """Counts since this start; depth is what waits in memory, sequence the last number given out."""

    received: int
    written: int
    depth: int
    sequence: int


class ArchiveStatistics(msgspec.Struct, frozen=True):
    """The archive's figures. errors: refused writes; torn_bytes: cut and set aside at this start."""

    streams: dict[str, StreamStatistics]
    errors: int
    torn_bytes: int
    writable: bool


class _Stream:
    """One stream's buffer and active segment."""

    def __init__(self, name: str, tail: Tail, now_s: float) -> None:
        self.name = name
        self.path = tail.path
        self.size_bytes = tail.size_bytes  # known to be durable
        self.next_sequence = tail.next_sequence
        self.file: SegmentFile | None = None
        self.lines: list[bytes] = []  # not yet durable, oldest first
        self.oldest_s = now_s  # monotonic; when the oldest line was accepted
        self.received = 0
        self.written = 0
        self.producers = 0  # inside `put`
        self.turn = asyncio.Lock()  # producers enter in the order they came
        self.room = asyncio.Event()
        self.room.set()

    def statistics(self) -> StreamStatistics:
        return StreamStatistics(
            received=self.received,
            written=self.written,
            depth=len(self.lines),
            sequence=self.next_sequence - 1,
        )


class DataArchiver:
    """Accepts records and writes them in batches. Made by `archiving`, which owns its writer."""

    def __init__(
        self,
        directory: Path,
        settings: ArchiveSettings,
        clock: Clock,
        tails: dict[str, Tail],
        *,
        executor: Executor,
        open_segment: OpenSegment,
        recorder: Recorder | None,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._executor = executor
        self._open_segment = open_segment
        self._recorder = recorder
        self._streams = {name: _Stream(name, tail, clock.monotonic_s()) for name, tail in tails.items()}
        self._torn_bytes = sum(tail.torn_bytes for tail in tails.values())
        self._work = asyncio.Event()
        self._draining = asyncio.Event()
        self._closed = False
        self._writable = True
        self._early = False
        self._errors = 0
        self._failure: BaseException | None = None

    async def put(self, stream: str, record: Record) -> None:
        """Accept one record. Waits while the stream's buffer is full; keeps the callers' order.

        Raises: ValueError: no such stream, or the record cannot be encoded; ArchiveNotDrained: the
        archive closed while waiting, so the record is not kept.
        """
        buffer = self._streams.get(stream)
        if buffer is None:
            raise ValueError(f"no archive stream {stream!r}; streams are {', '.join(self._streams)}")
        try:
            encoded = msgspec.json.encode(record)
        except (TypeError, msgspec.MsgspecError) as error:
            raise ValueError(f"a record of stream {stream!r} cannot be written as JSON: {error}") from error
        buffer.producers += 1
        try:
            async with buffer.turn:
                while not buffer.room.is_set() and not self._closed:
                    await buffer.room.wait()
                if self._closed:
                    raise ArchiveNotDrained(f"the archive is closed; a record of {stream!r} is not kept")
                self._accept(buffer, encoded)
        finally:
            buffer.producers -= 1

    def _accept(self, buffer: _Stream, encoded: bytes) -> None:
        if not buffer.lines:
            buffer.oldest_s = self._clock.monotonic_s()
        buffer.lines.append(encode_line(buffer.next_sequence, self._clock.now_ms(), encoded))
        buffer.next_sequence += 1
        buffer.received += 1
        if len(buffer.lines) >= self._settings.buffer_records:
            buffer.room.clear()
        # The writer sleeps without a limit while nothing is buffered, so the first line wakes it too.
        if len(buffer.lines) == 1 or not buffer.room.is_set():
            self._work.set()

    @property
    def writable(self) -> bool:
        """False from the first refused write until a write succeeds again."""
        return self._writable and not self._closed

    @property
    def archived(self) -> dict[str, int]:
        """Records durable on disk since this start, by stream."""
        return {name: stream.written for name, stream in self._streams.items()}

    def statistics(self) -> ArchiveStatistics:
        return ArchiveStatistics(
            streams={name: stream.statistics() for name, stream in self._streams.items()},
            errors=self._errors,
            torn_bytes=self._torn_bytes,
            writable=self.writable,
        )

    async def run(self) -> None:
        """Write what is due until drained."""
        retry_s = _FIRST_RETRY_S
        while True:
            await self._wait_for_work()
            if not await self._write_due():
                await self._pause(retry_s)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)
                continue
            retry_s = _FIRST_RETRY_S
            if self._draining.is_set() and not self._left():
                if not any(stream.producers for stream in self._streams.values()):
                    return
                await asyncio.sleep(0)  # a producer that waited for room comes in now

    async def _write_due(self) -> bool:
        """One round over all streams. False when the disk refused any of them."""
        refused = False
        flushed = False
        for stream in self._streams.values():
            try:
                while self._due(stream):
                    await self._flush(stream)
                    flushed = True
            except OSError as error:
                refused = True
                self._refused(stream, error)
        if flushed and not refused and not self._writable:
            self._writable = True
            log.info("the archive can be written again", errors=self._errors)
        return not refused

    async def _pause(self, seconds: float) -> None:
        """Wait before the next try; a drain that begins meanwhile tries at once."""
        if self._draining.is_set():
            await asyncio.sleep(min(seconds, _DRAIN_RETRY_S))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    def flush_early(self, early: bool) -> None:
        """While true, what is accepted is written at once: memory is worth more than few writes."""
        self._early = early
        self._work.set()

    def drain(self) -> None:
        """Ask the writer to write everything and end."""
        self._draining.set()
        self._work.set()

    def fail(self, failure: BaseException) -> None:
        """The writer died: nothing more is accepted."""
        self._failure = failure
        self.refuse()

    def refuse(self) -> None:
        """Accept nothing more and let waiting producers know."""
        self._closed = True
        for stream in self._streams.values():
            stream.room.set()

    async def close(self) -> None:
        """Close the files and answer for what was accepted. Raises ArchiveNotDrained."""
        self.refuse()
        for stream in self._streams.values():
            # What was synced is safe, the rest is counted below; a disk that hangs does not hold up the end.
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_CLOSE_LIMIT_S):
                    await self._close_file(stream)
        if left := self._left():
            parts = ", ".join(f"{s.name} {len(s.lines)}" for s in self._streams.values() if s.lines)
            raise ArchiveNotDrained(f"{left} records are not on disk: {parts}") from self._failure

    def _left(self) -> int:
        return sum(len(stream.lines) for stream in self._streams.values())

    def _due(self, stream: _Stream) -> bool:
        if not stream.lines:
            return False
        full = len(stream.lines) >= self._settings.buffer_records
        return full or self._early or self._draining.is_set() or self._age_left_s(stream) <= 0

    def _age_left_s(self, stream: _Stream) -> float:
        return stream.oldest_s + self._settings.flush_after_s - self._clock.monotonic_s()

    async def _wait_for_work(self) -> None:
        waiting = [stream for stream in self._streams.values() if stream.lines]
        if any(self._due(stream) for stream in waiting) or (self._draining.is_set() and not waiting):
            return
        self._work.clear()
        limit_s = min((self._age_left_s(stream) for stream in waiting), default=None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._work.wait()

    async def _flush(self, stream: _Stream) -> None:
        """Append the buffered lines to the active segment. Raises OSError with the buffer unchanged."""
        started_s = self._clock.monotonic_s()
        count = len(stream.lines)
        data = b"".join(stream.lines)
        try:
            file = await self._active(stream)
            await file.append(data)
        except OSError:
            # The file's end is unknown now: it is opened anew and cut to what is durable.
            with contextlib.suppress(OSError):
                await self._close_file(stream)
            raise
        self._written(stream, count, len(data))
        if self._recorder is not None:
            self._recorder.record("archive.flush", self._clock.monotonic_s() - started_s)

    def _written(self, stream: _Stream, count: int, size_bytes: int) -> None:
        del stream.lines[:count]  # lines accepted meanwhile stay
        stream.written += count
        stream.size_bytes += size_bytes
        stream.oldest_s = self._clock.monotonic_s()
        stream.room.set()

    async def _active(self, stream: _Stream) -> SegmentFile:
        """The segment to append to: a new one when the day changed or the old one is full."""
        day = utc_day(self._clock.now_ms())
        path = stream.path
        if path is None or path.parent.name != day or stream.size_bytes >= self._settings.segment_bytes:
            await self._close_file(stream)
            path = segment_path(self._directory, stream.name, day, stream.next_sequence - len(stream.lines))
            stream.path, stream.size_bytes = path, 0
        if stream.file is None:
            stream.file = await self._open_segment(path, stream.size_bytes, self._executor)
        return stream.file

    async def _close_file(self, stream: _Stream) -> None:
        file, stream.file = stream.file, None
        if file is not None:
            await file.close()

    def _refused(self, stream: _Stream, error: OSError) -> None:
        self._errors += 1
        self._writable = False
        if self._recorder is not None:
            self._recorder.count("archive.errors")
        log.error("the archive cannot be written", stream=stream.name, error=str(error), waiting=self._left())


@asynccontextmanager
async def archiving(
    directory: Path,
    settings: ArchiveSettings,
    clock: Clock,
    *,
    drain_limit_s: float,
    recorder: Recorder | None = None,
    open_segment: OpenSegment = open_segment,
) -> AsyncIterator[DataArchiver]:
    """Every record accepted inside the block is on disk when it ends, or ArchiveNotDrained is raised.

    Args: directory: the archive's own, made when missing; drain_limit_s: wall seconds the end may take.
    Raises: DataDirectoryUnusable: not writable, or another daemon archives there.
    """
    # One thread for all files: the disk is one, and a thread costs memory.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive")
    try:
        with _only_writer(directory):
            loop = asyncio.get_running_loop()
            tails = await loop.run_in_executor(executor, _recover_all, directory)
            archiver = DataArchiver(
                directory,
                settings,
                clock,
                tails,
                executor=executor,
                open_segment=open_segment,
                recorder=recorder,
            )
            async with _writer_of(archiver, drain_limit_s):
                yield archiver
    finally:
        # Not waited for: a disk that hangs must not hold up the rest of the drain.
        executor.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def _writer_of(archiver: DataArchiver, drain_limit_s: float) -> AsyncIterator[None]:
    """Own the writer's task: drained and awaited at the end, its failure known to producers at once."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            archiver.fail(failure)
            log.error("the archive's writer failed", exc_info=failure)

    writer = asyncio.create_task(archiver.run(), name="archive.writer")
    writer.add_done_callback(ended)
    try:
        yield
    finally:
        archiver.drain()
        try:
            await asyncio.wait((writer,), timeout=drain_limit_s)
        finally:
            writer.cancel()
            await asyncio.wait((writer,), timeout=_CLOSE_LIMIT_S)
            await archiver.close()


def _recover_all(directory: Path) -> dict[str, Tail]:
    try:
        tails = {stream: recover(directory, stream) for stream in STREAMS}
    except OSError as error:
        raise DataDirectoryUnusable(f"the archive at {directory} cannot be read: {error}") from error
    for stream, tail in tails.items():
        if tail.torn_bytes:
            log.warning(
                "a torn end was cut from the archive", stream=stream, bytes=tail.torn_bytes, segment=tail.path
            )
    return tails


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Hold the archive's lock. Raises DataDirectoryUnusable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DataDirectoryUnusable(f"the archive at {directory} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataDirectoryUnusable(f"another process writes the archive at {directory}") from error
        yield
    finally:
        os.close(descriptor)
