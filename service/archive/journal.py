"""The journal: a ring in a preallocated file, mapped into memory, that holds every record not yet durable.

A record is in the journal once its bytes are stored in the mapping: the kernel owns the page from then on,
so it survives SIGKILL of the process. It costs no system call, and its space is taken when the file is made,
so a full disk cannot refuse it. Only power loss can take it, until its segment is synced.

The file: two superblocks, written in turn, then the ring. A position counts bytes since the archive began and
never repeats; its place in the ring is its remainder. An entry never wraps: it is padded to the next round.
"""

import contextlib
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import structlog

from service.errors import DataDirectoryUnusable

log = structlog.get_logger("archive.journal")

FILE_NAME = "journal"
TORN_NAME = "journal.torn"

_MAGIC = b"PERPDJ1\n"
_SUPER = struct.Struct("<8sQQQI")  # magic, capacity, start, generation, checksum of what is before
_SUPER_BYTES = 4_096
_SUPER_PLACES = (0, 2_048)
_ENTRY = struct.Struct("<IIQQ16s")  # checksum of what follows, bytes of the line, position, sequence, stream
_POSITION = struct.Struct("<Q")
_POSITION_PLACE = 8  # of an entry's position, within it
_PAD = 0xFFFF_FFFF  # as length: nothing more before the ring's end
_ALIGNMENT = 8
_ZEROS = b"\0" * 65_536
RESERVE_FRACTION = 0.25  # used only while the disk refuses: no position is opened then, exits go on
LARGEST_FRACTION = 0.125  # a longer line goes to its segment directly


class Entry(NamedTuple):
    """One record in the journal. `line` is what its segment will hold."""

    position: int
    stream: str
    sequence: int
    line: bytes


class Journal:
    """Appends and reads entries. Only one thread appends and releases; any may read what was appended."""

    def __init__(self, path: Path, descriptor: int, capacity: int, start: int, generation: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._capacity = capacity
        self._generation = generation
        self._memory = mmap.mmap(descriptor, _SUPER_BYTES + capacity)
        self._reserve = int(capacity * RESERVE_FRACTION)
        self.largest_bytes = int(capacity * LARGEST_FRACTION)
        self.start = start
        self.end = start
        self.torn_bytes = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def used_bytes(self) -> int:
        return self.end - self.start

    def append(self, stream: bytes, sequence: int, line: bytes, *, use_reserve: bool) -> int:
        """Take one line; its position, or -1 when there is no room for it now."""
        size = _entry_bytes(len(line))
        place = self.end % self._capacity
        pad = self._capacity - place if place + size > self._capacity else 0
        room = self._capacity - (self.end - self.start) - (0 if use_reserve else self._reserve)
        if size + pad > room:
            return -1
        if pad:
            self._pad(place, pad)
            place = 0
        position = self.end
        head = _ENTRY.pack(0, len(line), position, sequence, stream)
        checksum = zlib.crc32(line, zlib.crc32(head[4:]))
        at = _SUPER_BYTES + place
        # The head comes last: an entry is there once its last byte is.
        self._memory[at + _ENTRY.size : at + _ENTRY.size + len(line)] = line
        self._memory[at : at + _ENTRY.size] = checksum.to_bytes(4, "little") + head[4:]
        self.end = position + size
        return position

    def _pad(self, place: int, pad: int) -> None:
        if pad >= _ENTRY.size:
            head = _ENTRY.pack(0, _PAD, self.end, 0, b"")
            at = _SUPER_BYTES + place
            self._memory[at : at + _ENTRY.size] = zlib.crc32(head[4:]).to_bytes(4, "little") + head[4:]
        self.end += pad

    def read(self, since: int, until: int, limit_bytes: int) -> tuple[list[Entry], int]:
        """Entries between two positions, about `limit_bytes` of them, and the position behind the last."""
        entries: list[Entry] = []
        position = since
        until = min(until, since + limit_bytes)
        while position < until:
            entry, position = self._entry_at(position)
            if entry is not None:
                entries.append(entry)
        return entries, position

    def release(self, start: int) -> bool:
        """What lies before `start` is durable elsewhere. True when that made room.

        An empty journal goes on at the ring's beginning, so that a quiet archive touches few pages.
        """
        if start >= self.end:
            place = self.end % self._capacity
            start = self.end = self.end + (self._capacity - place if place else 0)
        if start == self.start:
            return False
        self.start = start
        self._write_super()
        return True

    def flush(self) -> None:
        """Bring the mapping to the disk, for what stays in it after the end."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        try:
            self._memory.close()
        finally:
            os.close(self._descriptor)

    def _write_super(self) -> None:
        self._generation += 1
        head = _SUPER.pack(_MAGIC, self._capacity, self.start, self._generation, 0)[:-4]
        at = _SUPER_PLACES[self._generation % 2]
        self._memory[at : at + _SUPER.size] = head + zlib.crc32(head).to_bytes(4, "little")

    def _entry_at(self, position: int) -> tuple[Entry | None, int]:
        """The entry there (None is padding) and the position after it. Raises _Torn."""
        place = position % self._capacity
        left = self._capacity - place
        if left < _ENTRY.size:
            return None, position + left
        at = _SUPER_BYTES + place
        head = self._memory[at : at + _ENTRY.size]
        checksum, length, written_at, sequence, stream = _ENTRY.unpack(head)
        if written_at != position:
            raise _Torn(0)
        if length == _PAD and zlib.crc32(head[4:]) == checksum:
            return None, position + left
        size = _entry_bytes(length)
        if size > left:
            raise _Torn(_ENTRY.size)
        line = self._memory[at + _ENTRY.size : at + _ENTRY.size + length]
        if zlib.crc32(line, zlib.crc32(head[4:])) != checksum:
            raise _Torn(size)
        name = stream.rstrip(b"\0").decode("ascii", "replace")
        if not name:
            return None, position + size  # stands where something damaged was
        return Entry(position, name, sequence, line), position + size

    def recover(self) -> list[tuple[int, str, int]]:
        """Find the end of what an earlier process left: (position, stream, sequence) of each entry.

        What is damaged is set aside in `journal.torn`; the entries behind it count when they are whole.
        """
        found: list[tuple[int, str, int]] = []
        position, last = self.start, self.start + self._capacity
        while position < last:
            try:
                entry, after = self._entry_at(position)
            except _Torn as torn:
                behind = self._next_whole(position + _ALIGNMENT, last)
                if behind is None and not torn.size:
                    break
                # The length of a damaged entry says nothing: it ends where the next whole one begins.
                until = position + torn.size if behind is None else behind
                self._set_aside(position, until)
                if not found and behind is not None:
                    self._begin_at(behind)
                position = until
                continue
            if after > last:
                break
            position = after
            if entry is not None:
                found.append((entry.position, entry.stream, entry.sequence))
                self.end = position
        return found

    def _next_whole(self, since: int, last: int) -> int | None:
        """The first position from `since` on where a whole entry, or padding, stands."""
        for position in range(since, last, _ALIGNMENT):
            place = position % self._capacity
            if self._capacity - place < _ENTRY.size:
                continue
            (written_at,) = _POSITION.unpack_from(self._memory, _SUPER_BYTES + place + _POSITION_PLACE)
            if written_at != position:
                continue
            with contextlib.suppress(_Torn):
                self._entry_at(position)
                return position
        return None

    def _begin_at(self, position: int) -> None:
        """Nothing before it can be read."""
        self.start = self.end = position
        self._write_super()

    def _set_aside(self, since: int, until: int) -> None:
        while since < until:
            place = since % self._capacity
            size = min(until - since, self._capacity - place)  # to the ring's end, then from its beginning
            self._set_aside_at(place, since, size)
            since += size

    def _set_aside_at(self, place: int, position: int, size: int) -> None:
        at = _SUPER_BYTES + place
        self.torn_bytes += size
        with self._path.with_name(TORN_NAME).open("ab") as kept:
            kept.write(self._memory[at : at + size])
            kept.flush()
            os.fsync(kept.fileno())
        if size < _ENTRY.size:
            return  # too short for an entry: the ring's end, or before the first one that counts
        # Skipped by later reads, which must not stumble over it again.
        filler = _ENTRY.pack(0, size - _ENTRY.size, position, 0, b"")
        body = b"\0" * (size - _ENTRY.size)
        checksum = zlib.crc32(body, zlib.crc32(filler[4:]))
        self._memory[at : at + size] = checksum.to_bytes(4, "little") + filler[4:] + body


class _Torn(Exception):
    """No whole entry here. `size`: bytes of a damaged one, 0 where none begins."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def _entry_bytes(length: int) -> int:
    return (_ENTRY.size + length + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def open_journal(directory: Path, capacity: int) -> Journal:
    """Open the archive's journal; made, with all its space taken, when missing.

    One that an earlier process left keeps its size until it is empty.
    Raises: DataDirectoryUnusable: not readable, not writable, or the disk is full.
    """
    path = directory / FILE_NAME
    capacity = capacity // _ALIGNMENT * _ALIGNMENT
    try:
        if not path.exists():
            _make(path, capacity)
        journal = _open(path)
        if journal is None:
            kept = path.with_name(f"{FILE_NAME}.unreadable")
            log.error("the journal has no readable head and is set aside", kept=str(kept))
            path.replace(kept)
            _make(path, capacity)
            journal = _open(path)
            assert journal is not None
        if journal.capacity != capacity and not journal.recover():
            journal.close()
            _make(path, capacity)
            journal = _open(path)
            assert journal is not None
        return journal
    except OSError as error:
        raise DataDirectoryUnusable(
            f"the archive's journal {path} cannot be used: {error}; it needs {capacity} bytes of free space"
        ) from error


def _make(path: Path, capacity: int) -> None:
    """Written, not only allocated: overwriting it later needs no space on the disk."""
    new = path.with_name(path.name + ".new")
    # Positions begin a round later than 0, so that the zeros of a fresh file are no entry.
    head = _SUPER.pack(_MAGIC, capacity, capacity, 1, 0)[:-4]
    super_block = head + zlib.crc32(head).to_bytes(4, "little")
    with new.open("wb") as file:
        file.write(b"\0" * _SUPER_PLACES[1] + super_block.ljust(_SUPER_BYTES - _SUPER_PLACES[1], b"\0"))
        left = capacity
        while left:
            left -= file.write(_ZEROS[:left])
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> Journal | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = _super_of(os.pread(descriptor, _SUPER_BYTES, 0), os.fstat(descriptor).st_size)
        if found is None:
            os.close(descriptor)
            return None
        capacity, start, generation = found
        return Journal(path, descriptor, capacity, start, generation)
    except BaseException:
        os.close(descriptor)
        raise


def _super_of(data: bytes, size: int) -> tuple[int, int, int] | None:
    """Capacity, start and generation of the newest whole superblock."""
    found = []
    for place in _SUPER_PLACES:
        block = data[place : place + _SUPER.size]
        if len(block) < _SUPER.size:
            continue
        magic, capacity, start, generation, checksum = _SUPER.unpack(block)
        if magic == _MAGIC and zlib.crc32(block[:-4]) == checksum and size == _SUPER_BYTES + capacity:
            found.append((generation, capacity, start))
    if not found:
        return None
    generation, capacity, start = max(found)
    return capacity, start, generation
