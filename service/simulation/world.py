"""Virtual time: nothing sleeps, time jumps to whatever is next.

The world holds one clock, one source of chance and the simulated processes. Everything that happens is
an event of the world or a turn of a process's loop, in one order that follows from the seed alone.
"""

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Protocol

from service.clock import WallClock

MOST_TURNS_AT_ONE_INSTANT = 200_000


class Runnable(Protocol):
    """A simulated process, as the world sees it."""

    def turn(self) -> bool:
        """Run what is ready now; False when nothing was."""
        ...

    def bury(self) -> None:
        """End it without a word."""
        ...

    def next_s(self) -> float:
        """When its next timer is due; infinite without one."""
        ...


class Livelock(Exception):
    """A process runs for ever without letting time pass."""


class World:
    """One seed's time, chance and trace."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self.processes: list[Runnable] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self.on_note: Callable[[float, str, str], None] | None = None

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Act at a time; acts of one instant happen in the order they were asked for."""
        self._count += 1
        heapq.heappush(self._events, (max(when_s, self.now_s), self._count, act))

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.at(self.now_s + seconds, act)

    def note(self, what: str, detail: str = "") -> None:
        """Add to the trace: two runs are the same when their traces are."""
        self._trace.update(f"{self.now_s:.6f} {what} {detail}\n".encode())
        if self.on_note is not None:
            self.on_note(self.now_s, what, detail)

    @property
    def trace(self) -> str:
        return self._trace.hexdigest()

    def end(self) -> None:
        """Nothing happens any more."""
        self.processes.clear()
        self._events.clear()

    def run(self, until_s: float) -> None:
        """Let time pass. Raises Livelock."""
        turns = 0
        while True:
            busy = False
            for process in tuple(self.processes):
                busy |= process.turn()
            if busy:
                turns += 1
                if turns > MOST_TURNS_AT_ONE_INSTANT:
                    raise Livelock(f"{turns} turns at {self.now_s:.3f} s")
                continue
            turns = 0
            next_s = min((process.next_s() for process in self.processes), default=float("inf"))
            if self._events:
                next_s = min(next_s, self._events[0][0])
            if next_s > until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, next_s)
            while self._events and self._events[0][0] <= self.now_s:
                heapq.heappop(self._events)[2]()


class VirtualClock(WallClock):
    """A host's clock in the world. `error_ms` is what it is ahead of the market's time at the start.

    It is a wall clock to the daemon, so that the offset to the venue is measured and corrected.
    """

    def __init__(self, world: World, origin_ms: int, error_ms: int = 0) -> None:
        super().__init__()
        self._world = world
        self._origin_ms = origin_ms + error_ms

    def now_ms(self) -> int:
        return self._origin_ms + int(self._world.now_s * 1_000 + 0.001) + self.offset_ms

    def monotonic_s(self) -> float:
        return self._world.now_s
