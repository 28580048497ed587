"""How late the event loop wakes those who sleep: the sign of something that blocks it."""

import asyncio
import time
from collections.abc import Callable

import msgspec

from service.monitor.performance import Window, percentile

INTERVAL_S = 0.05
SAMPLES = 6_000  # the last five minutes


class Lag(msgspec.Struct, frozen=True):
    """Of the last samples, in milliseconds; `longest_ms` is of the whole life."""

    samples: int
    p50_ms: float
    p99_ms: float
    longest_ms: float


class LoopLag:
    """Samples the lag of the loop that runs it.

    Args: alarm_ms: `on_alarm(lag_ms)` is called for each sample beyond it.
    """

    def __init__(
        self,
        *,
        interval_s: float = INTERVAL_S,
        samples: int = SAMPLES,
        alarm_ms: float = float("inf"),
        on_alarm: Callable[[float], None] = lambda lag_ms: None,
    ) -> None:
        self.interval_s = interval_s
        self.beat_s = 0.0  # monotonic, when the sampler last ran; 0 while it does not
        self._window = Window(samples)
        self._longest_ms = 0.0
        self._alarm_ms = alarm_ms
        self._on_alarm = on_alarm

    async def run(self) -> None:
        """Sample until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self.beat_s = time.monotonic()
                due_s = loop.time() + self.interval_s
                await asyncio.sleep(self.interval_s)
                self.add((loop.time() - due_s) * 1000)
        finally:
            self.beat_s = 0.0

    def add(self, lag_ms: float) -> None:
        lag_ms = max(lag_ms, 0.0)  # a timer may fire a clock tick early
        self._window.add(lag_ms)
        self._longest_ms = max(self._longest_ms, lag_ms)
        if lag_ms > self._alarm_ms:
            self._on_alarm(lag_ms)

    def statistics(self) -> Lag:
        """All zero before the first sample."""
        ordered = sorted(self._window.values())
        if not ordered:
            return Lag(samples=0, p50_ms=0.0, p99_ms=0.0, longest_ms=0.0)
        return Lag(
            samples=len(ordered),
            p50_ms=percentile(ordered, 0.50),
            p99_ms=percentile(ordered, 0.99),
            longest_ms=self._longest_ms,
        )
