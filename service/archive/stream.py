"""One stream of the archive: its buffer, its active segment, and how far each of its records got.

A record is in memory (buffered), in its file (unsynced), or in the journal alone (behind); the journal keeps
it in every one of these until its segment is synced.
"""

import asyncio
import sys

import msgspec

from service.archive.schema import version
from service.archive.segments import SegmentFile, Tail

NOWHERE = sys.maxsize  # as a position: nothing waits


class StreamStatistics(msgspec.Struct, frozen=True):
    """Counts since this start; depth is the buffer's, sequence the last number given out."""

    received: int
    written: int
    depth: int
    sequence: int


class Stream:
    """One stream: its buffer, its active segment, and how far each of its records got."""

    def __init__(self, name: str, tail: Tail, now_s: float) -> None:
        self.name = name
        self.code = name.encode("ascii")
        self.version = version(name)
        self.path = tail.path
        self.size_bytes = tail.size_bytes  # known to be durable
        self.file: SegmentFile | None = None
        self.file_turn = asyncio.Lock()  # held to sync, change or close the file, not to write
        self.durable_sequence = tail.next_sequence - 1
        self.next_sequence = tail.next_sequence
        self.opened_sequence = tail.next_sequence
        # In memory: lines that the segment's file does not have, oldest first, with their journal positions.
        self.lines: list[bytes] = []
        self.positions: list[int] = []
        self.buffered_bytes = 0  # of these lines
        self.oldest_s = now_s  # monotonic; when the oldest line was accepted
        # In the file, not synced.
        self.unsynced_position = NOWHERE
        self.unsynced_bytes = 0
        self.unsynced_sequence = 0
        self.syncing_position = NOWHERE
        # In the journal alone, since the disk refused or a process was killed.
        self.behind_position = NOWHERE
        self.last_position = -1
        self.received = 0
        self.producers = 0  # inside `put`
        self.turn = asyncio.Lock()  # producers enter in the order they came
        self.room = asyncio.Event()

    @property
    def behind(self) -> bool:
        return self.behind_position != NOWHERE

    @property
    def first_position(self) -> int:
        """The oldest record of the stream that only the journal is sure to keep."""
        buffered = self.positions[0] if self.positions else NOWHERE
        return min(self.behind_position, self.syncing_position, self.unsynced_position, buffered)

    @property
    def left(self) -> int:
        return self.next_sequence - 1 - self.durable_sequence

    def fall_behind(self) -> None:
        """The file cannot be trusted beyond what is durable; the journal has the rest."""
        self.behind_position = self.first_position
        self.lines.clear()
        self.positions.clear()
        self.buffered_bytes = 0
        self.unsynced_position = self.syncing_position = NOWHERE
        self.unsynced_bytes = 0
        self.room.set()

    def statistics(self) -> StreamStatistics:
        return StreamStatistics(
            received=self.received,
            written=self.durable_sequence + 1 - self.opened_sequence,
            depth=len(self.lines),
            sequence=self.next_sequence - 1,
        )
