"""Garbage collected at the end of each cycle, at a bounded cost.

What start-up made is frozen and records are made so that the collector may skip them: a full collection looks
at about a thousand objects. Should a strategy or a large market leave many more, full collections become
rarer, so that what they cost a cycle stays within the limit; the young are collected every time.
"""

import gc
import time
from collections.abc import Callable

from service.ports import Recorder

_YOUNG = 1  # generations 0 and 1: what was made since the last full collection but one


class Collector:
    """Collects when asked, times it and counts what it found.

    Args: limit_ms: CPU time of the calling thread that full collections may cost a cycle on average.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        limit_ms: float,
        wall_s: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.thread_time,
        collect: Callable[[int], int] = gc.collect,
    ) -> None:
        self._recorder = recorder
        self._limit_s = limit_ms / 1000
        self._wall_s = wall_s
        self._cpu_s = cpu_s
        self._collect = collect
        self._owed_s = 0.0  # CPU time beyond the limits of the cycles since
        self.last_cpu_s = 0.0  # of the last collection: wall time has other programs' turns in it

    def freeze(self) -> None:
        """Collect, then leave what is alive out of later collections: it lives as long as the process."""
        self._collect(2)
        gc.freeze()

    def collect(self) -> float:
        """Collect at the end of a cycle. Returns the wall seconds it took."""
        generation = _YOUNG if self._owed_s > 0 else 2
        wall_s, cpu_s = self._wall_s(), self._cpu_s()
        found = self._collect(generation)
        self.last_cpu_s = self._cpu_s() - cpu_s
        self._owed_s = max(self._owed_s + self.last_cpu_s - self._limit_s, 0.0)
        seconds = self._wall_s() - wall_s
        self._recorder.record("garbage", seconds)
        self._recorder.count("garbage.young" if generation == _YOUNG else "garbage.full")
        self._recorder.count("garbage.objects", found)
        return seconds
