"""Loop lag measured against the processor's clock, not the loop's own."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.monitor.lag import LoopLag

SAMPLES = 1_000_000  # 8 MB when full; a benchmark keeps all of its own


class PreciseLag(LoopLag):
    """uvloop's clock stands still within one turn of the loop and counts whole milliseconds: too coarse here.

    Its timers do too, so a sample may be up to 1 ms too high; one that is early counts as no lag.
    """

    def __init__(self, *, interval_s: float) -> None:
        super().__init__(interval_s=interval_s, samples=SAMPLES)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            due_s = time.perf_counter() + self._interval_s
            await asyncio.sleep(self._interval_s)
            self.add((time.perf_counter() - due_s) * 1000)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sample while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(self.run(), name="bench.lag")
            try:
                yield
            finally:
                sampling.cancel()
