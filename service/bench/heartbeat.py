"""Loop lag as an event from outside feels it: a process apart sends its time, the loop reads it when it can.

Beats keep coming while the loop stands still, so a hold-up of 100 ms is seen by every beat that fell into it,
not by one. A loop's own timers would not do: uvloop's clock counts whole milliseconds and stands still within
one turn of the loop.
"""

import asyncio
import os
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from service.monitor.lag import LoopLag

KEPT_BEATS = 2_000_000
_PIPE_BYTES = 65_536  # what a pipe holds: a whole number of beats, each written at once


@contextmanager
def beating(interval_s: float) -> Iterator[int]:
    """A pipe into which a process of its own writes its time; yields the end to read from."""
    reading, writing = os.pipe()
    program = str(Path(__file__).with_name("heart.py"))
    try:
        arguments = [sys.executable, "-S", "-E", program, str(writing), repr(interval_s)]
        heart = subprocess.Popen(arguments, pass_fds=(writing,), stdin=subprocess.DEVNULL)
    finally:
        os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)
        heart.kill()
        heart.wait()


class HeartbeatLag(LoopLag):
    """A LoopLag that samples the beats of a pipe instead of a timer.

    A machine that starves the beating process loses beats: `seconds` tells how many there should have been.
    """

    def __init__(self, pipe: int) -> None:
        super().__init__(samples=KEPT_BEATS)
        self._pipe = pipe
        self._since_ns = 0
        self.seconds = 0.0  # it listened for, once it ended

    async def run(self) -> None:
        """Sample until cancelled."""
        os.set_blocking(self._pipe, False)
        self._since_ns = time.monotonic_ns()  # older beats waited for us, not for the loop
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe, self._read)
        try:
            await loop.create_future()  # until cancelled
        finally:
            loop.remove_reader(self._pipe)
            self.seconds = (time.monotonic_ns() - self._since_ns) / 1e9

    def _read(self) -> None:
        beats = array("q", os.read(self._pipe, _PIPE_BYTES))
        now_ns = time.monotonic_ns()
        for sent_ns in beats:
            if sent_ns >= self._since_ns:
                self.add((now_ns - sent_ns) / 1e6)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sample while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(self.run(), name="bench.lag")
            await asyncio.sleep(0)  # it listens from now on
            try:
                yield
            finally:
                sampling.cancel()
