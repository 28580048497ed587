"""Every record perpd makes is kept: journalled at once, buffered by stream, appended to its stream's segment.

A record accepted by `put` is in the journal and survives SIGKILL; it is synced to its segment, and survives
power loss, after at most `flush_after_s`, 49 further records of its stream, or the drain. A disk that is slow
makes producers wait. One that refuses loses nothing: `writable` is False, which keeps the daemon from opening
positions; what still comes goes to the journal alone, its reserve too, and all of it is written by itself
once the disk takes again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from service.archive.damage import tell as tell_damage
from service.archive.identity import identity_of
from service.archive.journal import Entry, Journal, open_journal
from service.archive.lock import only_writer
from service.archive.manifest import seal
from service.archive.numbers import LAST_NAME, write_numbers
from service.archive.recovery import Found, recover_all
from service.archive.segments import (
    LARGEST_RECORD_BYTES,
    OpenSegment,
    SegmentFile,
    Threads,
    encode_line,
    open_segment,
    remove_segment,
    segment_path,
    utc_day,
)
from service.archive.stream import NOWHERE, Stream, StreamStatistics
from service.errors import ArchiveNotDrained
from service.ports import Clock, Recorder
from service.records import Record
from service.settings import ArchiveSettings

log = structlog.get_logger("archive.archiver")

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_DRAIN_RETRY_S = 0.5
_CLOSE_LIMIT_S = 1.0
_CATCH_UP_BYTES = 1 << 20


class ArchiveStatistics(msgspec.Struct, frozen=True):
    """The archive's figures. errors: refused writes; replayed: records that an earlier process left in the
    journal; torn_bytes: cut or damaged and set aside at this start."""

    streams: dict[str, StreamStatistics]
    errors: int
    replayed: int
    torn_bytes: int
    journal_bytes: int
    writable: bool


class DataArchiver:
    """Accepts records and writes them in batches. Made by `archiving`, which owns its writer."""

    def __init__(
        self,
        directory: Path,
        settings: ArchiveSettings,
        clock: Clock,
        journal: Journal,
        found: Found,
        *,
        threads: Threads,
        open_segment: OpenSegment,
        recorder: Recorder | None,
        identity: str,
    ) -> None:
        self.identity = identity
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._journal = journal
        self._threads = threads
        self._open_segment = open_segment
        self._recorder = recorder
        self._streams = {name: Stream(name, tail, clock.monotonic_s()) for name, tail in found.tails.items()}
        self._found_in_journal = found.journalled
        self._torn_bytes = sum(tail.torn_bytes for tail in found.tails.values()) + journal.torn_bytes
        self._replayed = 0
        self._ended: list[tuple[Path, str]] = []  # segments to be sealed
        self._longest_bytes = journal.largest_bytes
        self._buffered_bytes = 0  # of all streams together
        self._work = asyncio.Event()
        self._unsynced = asyncio.Event()
        self._draining = asyncio.Event()
        self._closed = False
        self._writable = True
        self._early = False
        self._crowded = False  # the journal has no room until more is synced
        self._refused_long: set[str] = set()  # streams whose long record the disk refused
        self._errors = 0
        self._failure: BaseException | None = None

    # -- accepting

    async def put(self, stream: str, record: Record) -> None:
        """Accept one record; it is in the journal on return. Waits while the disk is slow, in the callers'
        order.

        NaN and the infinities are kept as null, which is what JSON has for them. A record too long for the
        journal is on its segment's disk on return instead.
        Raises: ValueError: no such stream, or the record cannot be encoded; ArchiveNotDrained: the
        archive closed while waiting, so the record is not kept.
        """
        buffer = self._streams.get(stream)
        if buffer is None:
            raise ValueError(f"no archive stream {stream!r}; streams are {', '.join(self._streams)}")
        encoded = _encoded(stream, record)
        if not buffer.producers and self._accept(buffer, encoded):
            return  # nobody waits and there is room
        buffer.producers += 1
        try:
            async with buffer.turn:
                if len(encoded) > self._longest_bytes:
                    await self._put_long(buffer, encoded)
                    return
                while not self._accept(buffer, encoded):
                    buffer.room.clear()
                    await buffer.room.wait()
        finally:
            buffer.producers -= 1

    def _accept(self, buffer: Stream, encoded: bytes) -> bool:
        """Journal and buffer one record. False when there is no room for it now."""
        if self._closed:
            raise ArchiveNotDrained(f"the archive is closed; a record of {buffer.name!r} is not kept")
        if len(encoded) > self._longest_bytes:
            return False
        depth = len(buffer.lines)
        if depth >= self._settings.buffer_records or self._heavy:
            if self._writable:
                return False
            self._fall_behind(buffer)  # a disk that refuses: the journal is where it waits
            depth = 0
        sequence = buffer.next_sequence
        line = encode_line(sequence, self._clock.now_ms(), encoded, buffer.version)
        position = self._journal.append(buffer.code, sequence, line, use_reserve=not self._writable)
        if position < 0:
            self._crowded = True
            self._work.set()
            return False
        buffer.next_sequence = sequence + 1
        buffer.last_position = position
        buffer.received += 1
        if buffer.behind_position != NOWHERE:
            return True
        if not depth:
            buffer.oldest_s = self._clock.monotonic_s()
        buffer.lines.append(line)
        buffer.positions.append(position)
        buffer.buffered_bytes += len(line)
        self._buffered_bytes += len(line)
        # The writer sleeps without a limit while nothing is buffered, so the first line wakes it too.
        if not depth or depth + 1 >= self._settings.buffer_records or self._heavy:
            self._work.set()
        return True

    async def _put_long(self, stream: Stream, encoded: bytes) -> None:
        """Write one record past the journal, once all before it are durable; returns when it is."""
        retry_s = _FIRST_RETRY_S
        try:
            while not await self._long_written(stream, encoded):
                await self._pause(retry_s)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)
        finally:
            self._refused_long.discard(stream.name)
            self._work.set()  # the writer says when the archive can be written again

    async def _long_written(self, stream: Stream, encoded: bytes) -> bool:
        """Write it once there is nothing before it; False when the disk refused."""
        while True:
            if self._closed:
                raise ArchiveNotDrained(f"the archive is closed; a record of {stream.name!r} is not kept")
            if stream.left:
                stream.oldest_s = float("-inf")  # due now
                self._work.set()
                stream.room.clear()
                await stream.room.wait()
                continue
            try:
                await self._write_long(stream, encoded)
                return True
            except OSError as error:
                self._refused_long.add(stream.name)
                self._refused(stream, error)
                return False

    async def _write_long(self, stream: Stream, encoded: bytes) -> None:
        sequence = stream.next_sequence
        line = encode_line(sequence, self._clock.now_ms(), encoded, stream.version)
        async with stream.file_turn:
            try:
                file = await self._active(stream, sequence)
                await file.write(line)
                await file.sync()
            except BaseException:
                # Cancelled, it would leave a record whose number the next one has too.
                await self._discard_file(stream)
                await self._cut(stream)
                raise
            stream.next_sequence = sequence + 1
            stream.received += 1
            stream.durable_sequence = sequence
            stream.size_bytes += len(line)

    # -- what others ask

    def sequence(self, stream: str) -> int:
        """The last number given out in a stream; after a start, of what is on disk."""
        return self._streams[stream].next_sequence - 1

    @property
    def writable(self) -> bool:
        """False from the first refused write until all that waits is written again."""
        return self._writable and not self._closed

    @property
    def archived(self) -> dict[str, int]:
        """Records durable in segments since this start, by stream; those of an earlier process count too."""
        return {name: stream.statistics().written for name, stream in self._streams.items()}

    def statistics(self) -> ArchiveStatistics:
        return ArchiveStatistics(
            streams={name: stream.statistics() for name, stream in self._streams.items()},
            errors=self._errors,
            replayed=self._replayed,
            torn_bytes=self._torn_bytes,
            journal_bytes=self._journal.used_bytes,
            writable=self.writable,
        )

    def depth(self, stream: str) -> int:
        """Records in the stream's buffer now."""
        return len(self._streams[stream].lines)

    def flush_early(self, early: bool) -> None:
        """While true, what is accepted is written at once: memory is worth more than few writes."""
        self._early = early
        self._work.set()

    # -- the two tasks

    async def run(self) -> None:
        """Write what is due, and sync what was written, until drained."""
        async with asyncio.TaskGroup() as tasks:
            syncing = tasks.create_task(self._sync_loop(), name="archive.sync")
            await self._write_loop()
            syncing.cancel()

    async def _write_loop(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            await self._wait_for_work()
            for stream in self._streams.values():
                while self._due(stream):
                    await self._write(stream)
            if not await self._catch_up_all():
                await self._pause(retry_s)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)
                continue
            retry_s = _FIRST_RETRY_S
            if self._draining.is_set() and await self._drained():
                if not any(stream.producers for stream in self._streams.values()):
                    return
                await asyncio.sleep(0)  # a producer that waited for room comes in now

    async def _sync_loop(self) -> None:
        while True:
            await self._unsynced.wait()
            self._unsynced.clear()
            for stream in self._streams.values():
                if stream.unsynced_position != NOWHERE:
                    await self._sync(stream)
            if not self._unsynced.is_set():
                await self._seal_ended()

    async def _seal_ended(self) -> None:
        """Describe segments that ended; what fails here is done by the next compaction."""
        while self._ended:
            path, stream = self._ended.pop()
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads.sync, seal, path, stream)
            except (OSError, ValueError) as error:
                log.warning("a segment could not be sealed, compaction tries again", reason=str(error))
            else:
                await self._note_last()

    async def _note_last(self) -> None:
        """Write down how far each stream got: a newest segment that goes later is missed then."""
        last = {stream.name: stream.durable_sequence for stream in self._streams.values()}
        with contextlib.suppress(OSError):  # known from the segments as well
            await asyncio.get_running_loop().run_in_executor(
                self._threads.sync, write_numbers, self._directory / LAST_NAME, last
            )

    async def _drained(self) -> bool:
        """Whether all that was accepted is durable, after a last sync."""
        for stream in self._streams.values():
            await self._sync(stream)
        return not self._left()

    def _due(self, stream: Stream) -> bool:
        if not stream.lines:
            return False
        full = len(stream.lines) >= self._settings.buffer_records or (
            self._heavy and stream.buffered_bytes == max(one.buffered_bytes for one in self._streams.values())
        )
        return (
            full or self._early or self._crowded or self._draining.is_set() or self._age_left_s(stream) <= 0
        )

    @property
    def _heavy(self) -> bool:
        """All buffers together hold what they may: the largest is written before anything is added."""
        limit = self._settings.buffers_bytes
        return 0 < limit <= self._buffered_bytes

    def _age_left_s(self, stream: Stream) -> float:
        return stream.oldest_s + self._settings.flush_after_s - self._clock.monotonic_s()

    async def _wait_for_work(self) -> None:
        waiting = [stream for stream in self._streams.values() if stream.lines]
        if any(self._due(stream) for stream in waiting) or any(s.behind for s in self._streams.values()):
            return
        if self._draining.is_set() and not waiting:
            return
        if not self._writable and not self._refused_long:
            return  # there is nothing left to be written: it is said, and entries are on again
        self._work.clear()
        limit_s = min((self._age_left_s(stream) for stream in waiting), default=None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._work.wait()

    async def _pause(self, seconds: float) -> None:
        """Wait before the next try; a drain that begins meanwhile tries at once."""
        if self._draining.is_set():
            await asyncio.sleep(min(seconds, _DRAIN_RETRY_S))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    # -- writing

    async def _write(self, stream: Stream) -> None:
        """Append the buffer to the active segment with one write; what is written waits for its sync."""
        count, position = len(stream.lines), stream.positions[0]
        last_sequence = stream.next_sequence - 1
        data = b"".join(stream.lines)
        try:
            file = await self._active(stream, last_sequence + 1 - count)
            await file.write(data)
        except OSError as error:
            self._refused(stream, error)
            return
        if stream.behind:
            return  # a sync failed meanwhile: the journal has these lines too
        del stream.lines[:count], stream.positions[:count]  # lines accepted meanwhile stay
        stream.buffered_bytes -= len(data)
        self._buffered_bytes -= len(data)
        stream.unsynced_position = min(stream.unsynced_position, position)
        stream.unsynced_bytes += len(data)
        stream.unsynced_sequence = last_sequence
        stream.oldest_s = self._clock.monotonic_s()
        self._make_room()
        self._unsynced.set()

    async def _sync(self, stream: Stream) -> None:
        """Make durable what was written before; what is written meanwhile waits for the next."""
        async with stream.file_turn:
            if stream.behind or stream.file is None or stream.unsynced_position == NOWHERE:
                return
            size_bytes, sequence = stream.unsynced_bytes, stream.unsynced_sequence
            stream.syncing_position, stream.unsynced_position = stream.unsynced_position, NOWHERE
            started_s = self._clock.monotonic_s()
            try:
                await stream.file.sync()
            except OSError as error:
                self._refused(stream, error)
                return
            if stream.behind_position != NOWHERE:
                return  # a write failed meanwhile: the file's end is unknown, and it is written anew
            stream.syncing_position = NOWHERE
            stream.unsynced_bytes -= size_bytes
            self._durable(stream, sequence, size_bytes)
            if self._recorder is not None:
                self._recorder.record("archive.flush", self._clock.monotonic_s() - started_s)

    def _durable(self, stream: Stream, sequence: int, size_bytes: int) -> None:
        stream.durable_sequence = sequence
        stream.size_bytes += size_bytes
        start = min(one.first_position for one in self._streams.values())
        if self._journal.release(start):
            self._crowded = False
        self._make_room()

    def _make_room(self) -> None:
        """Let producers look again: what they wait for may be another stream's bytes or the journal's."""
        for one in self._streams.values():
            if one.producers:
                one.room.set()

    async def _active(self, stream: Stream, sequence: int) -> SegmentFile:
        """The segment to append to: a new one when the day changed or the old one is full."""
        day = utc_day(self._clock.now_ms())
        path = stream.path
        size_bytes = stream.size_bytes + stream.unsynced_bytes
        if path is None or path.parent.name != day or size_bytes >= self._settings.segment_bytes:
            await self._end_segment(stream)
            path = segment_path(self._directory, stream.name, day, sequence)
            stream.path, stream.size_bytes = path, 0
        if stream.file is None:
            stream.file = await self._open_segment(path, stream.size_bytes, self._threads)
        return stream.file

    async def _end_segment(self, stream: Stream) -> None:
        """Everything in it is durable before the next begins."""
        while stream.unsynced_position != NOWHERE or stream.syncing_position != NOWHERE:
            await self._sync(stream)
            if stream.behind:
                raise OSError("the segment could not be synced")
            await asyncio.sleep(0)
        if stream.path is None:
            return
        if stream.file is None and stream.path.exists():
            # What a refused write left behind the durable end is written anew, to the next one.
            stream.file = await self._open_segment(stream.path, stream.size_bytes, self._threads)
        await self._close_file(stream)
        if stream.size_bytes:
            self._ended.append((stream.path, stream.name))
            self._unsynced.set()
        else:  # the next one has the same number
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads.write, remove_segment, stream.path)

    async def _close_file(self, stream: Stream) -> None:
        file, stream.file = stream.file, None
        if file is not None:
            await asyncio.shield(file.close())

    async def _discard_file(self, stream: Stream) -> None:
        """The file's end is unknown: it is opened anew and cut to what is durable."""
        with contextlib.suppress(OSError):
            await self._close_file(stream)

    async def _cut(self, stream: Stream) -> None:
        """Open the segment anew now rather than with the next record, which may never come."""
        if stream.path is not None:
            with contextlib.suppress(OSError):
                stream.file = await self._open_segment(stream.path, stream.size_bytes, self._threads)

    # -- when the disk refuses, and after a kill

    def _refused(self, stream: Stream, error: OSError) -> None:
        self._errors += 1
        self._writable = False
        if not stream.behind and stream.first_position != NOWHERE:
            self._fall_behind(stream)
        if self._recorder is not None:
            self._recorder.count("archive.errors")
        log.error("the archive cannot be written", stream=stream.name, error=str(error), waiting=self._left())
        self._work.set()

    def _fall_behind(self, stream: Stream) -> None:
        self._buffered_bytes -= stream.buffered_bytes
        stream.fall_behind()
        self._make_room()

    async def replay(self) -> None:
        """Write what an earlier process left in the journal: each record once, by its sequence number."""
        for position, name, sequence in self._found_in_journal:
            stream = self._streams[name]
            if sequence < stream.next_sequence:
                continue  # its segment has it
            if sequence > stream.next_sequence:
                log.error("records are missing", stream=name, since=stream.next_sequence, until=sequence - 1)
            stream.behind_position = min(stream.behind_position, position)
            stream.last_position = position
            stream.next_sequence = sequence + 1
            self._replayed += 1
        if self._replayed:
            log.warning("records of an earlier process are in the journal", records=self._replayed)
        if not await self._catch_up_all():
            return
        self._journal.release(NOWHERE)

    async def _catch_up_all(self) -> bool:
        """Write what only the journal has. False when the disk refused any of it."""
        refused = False
        for stream in self._streams.values():
            if stream.behind:
                try:
                    await self._catch_up(stream)
                except OSError as error:
                    refused = True
                    self._refused(stream, error)
        if not refused and not self._writable and not self._refused_long:
            self._writable = True
            log.info("the archive can be written again", errors=self._errors)
        return not refused

    async def _catch_up(self, stream: Stream) -> None:
        """Bring a stream's records from the journal to its segment, until there are no more."""
        async with stream.file_turn:
            await self._discard_file(stream)
            try:
                while stream.behind:
                    entries, until = await self._from_journal(stream)
                    await self._write_entries(stream, entries)
                    # Records that came meanwhile went to the journal too: the last one ends it.
                    stream.behind_position = NOWHERE if until > stream.last_position else until
                    self._durable(stream, stream.durable_sequence, 0)
            except OSError:
                await self._discard_file(stream)
                raise

    async def _from_journal(self, stream: Stream) -> tuple[list[Entry], int]:
        """Some of the stream's entries that its segment lacks, and the position up to which that is all."""
        since, until = stream.behind_position, self._journal.end
        loop = asyncio.get_running_loop()
        entries, until = await loop.run_in_executor(
            self._threads.write, self._journal.read, since, until, _CATCH_UP_BYTES
        )
        missing = [e for e in entries if e.stream == stream.name and e.sequence > stream.durable_sequence]
        return missing, until

    async def _write_entries(self, stream: Stream, entries: list[Entry]) -> None:
        size = self._settings.buffer_records
        for some in (entries[i : i + size] for i in range(0, len(entries), size)):
            data = b"".join(entry.line for entry in some)
            file = await self._active(stream, some[0].sequence)
            await file.write(data)
            await file.sync()
            stream.size_bytes += len(data)
            stream.durable_sequence = some[-1].sequence

    # -- the end

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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_LIMIT_S):
                await self._note_last()
        if left := self._left():
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_CLOSE_LIMIT_S):
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._threads.sync, self._journal.flush)
            parts = ", ".join(f"{s.name} {s.left}" for s in self._streams.values() if s.left)
            raise ArchiveNotDrained(
                f"{left} records are in the journal only: {parts}; "
                "the next start brings them to their segments"
            ) from self._failure

    def _left(self) -> int:
        return sum(stream.left for stream in self._streams.values())


def _encoded(stream: str, record: Record) -> bytes:
    try:
        encoded = msgspec.json.encode(record)
    except (TypeError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise ValueError(f"a record of stream {stream!r} cannot be written as JSON: {error}") from error
    if len(encoded) > LARGEST_RECORD_BYTES:
        raise ValueError(f"a record of stream {stream!r} has {len(encoded)} bytes, more than is readable")
    return encoded


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
    """Every record accepted inside the block is in its segment when it ends, or ArchiveNotDrained is raised.

    Args: directory: the archive's own, made when missing; drain_limit_s: wall seconds the end may take.
    Raises: DataDirectoryUnusable: not writable, full, or another daemon archives there.
    """
    threads = Threads(
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive-write"),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive-sync"),
    )
    try:
        with only_writer(directory):
            loop = asyncio.get_running_loop()
            journal = await loop.run_in_executor(
                threads.write, open_journal, directory, settings.journal_bytes
            )
            try:
                archiver = DataArchiver(
                    directory,
                    settings,
                    clock,
                    journal,
                    await loop.run_in_executor(threads.write, recover_all, directory, journal),
                    threads=threads,
                    open_segment=open_segment,
                    recorder=recorder,
                    identity=await loop.run_in_executor(threads.write, identity_of, directory),
                )
                await archiver.replay()
                await loop.run_in_executor(threads.sync, tell_damage, directory)
                async with _writer_of(archiver, drain_limit_s):
                    yield archiver
            finally:
                journal.close()
    finally:
        # Not waited for: a disk that hangs must not hold up the rest of the drain.
        threads.write.shutdown(wait=False, cancel_futures=True)
        threads.sync.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def _writer_of(archiver: DataArchiver, drain_limit_s: float) -> AsyncIterator[None]:
    """Own the writer's task: drained and awaited at the end, its failure known to producers at once."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            if isinstance(failure, BaseExceptionGroup):
                failure = failure.exceptions[0]
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
