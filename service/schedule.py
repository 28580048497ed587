"""When cycles run: on the clock's grid, one at a time, until a stop, the last one or the market's end."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import structlog

from service.errors import CycleStalled
from service.ports import Clock, Recorder
from service.settings import CycleSettings
from service.stopping import StopRequest

STALLED_S = 300.0
CLOSE_POLL_S = 0.01

log = structlog.get_logger("perpd")


class Schedule:
    """Gives out the slots of cycles and tells when none has finished for too long.

    Args: cycles: how many to run, 0 for no end; end_ms: market time at which the market ends, 0 when it
    does not; awaits_close: whether a candle that closed just now has not arrived yet.
    """

    def __init__(
        self,
        settings: CycleSettings,
        clock: Clock,
        stop: StopRequest,
        recorder: Recorder,
        *,
        cycles: int,
        end_ms: int,
        awaits_close: Callable[[int], bool],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._stop = stop
        self._recorder = recorder
        self._cycles = cycles
        self._end_ms = end_ms
        self._awaits_close = awaits_close
        self.finished_s = clock.monotonic_s()  # of the last sign of life

    async def slots(self) -> AsyncGenerator[int, None]:
        """The number of each cycle, from 1, when it is due; ends with the reason in the stop request."""
        interval_ms = round(self._settings.interval_s * 1000)
        due_ms = self._clock.now_ms()
        number = 0
        while not await self._ended(due_ms):
            number += 1
            await self._closes_arrived()
            yield number
            if self._cycles and number >= self._cycles:
                self._stop.set("cycles done")
                return
            due_ms = self._next_due(due_ms, interval_ms)

    def sign_of_life(self) -> None:
        """A cycle has finished, or what comes before the first one went on."""
        self.finished_s = self._clock.monotonic_s()

    async def stalled(self) -> None:
        """Raises CycleStalled once cycles stop finishing: alive is not healthy."""
        limit_s = max(STALLED_S, 5 * self._settings.interval_s / self._clock.speed)
        while (age_s := self._clock.monotonic_s() - self.finished_s) <= limit_s:  # noqa: ASYNC110
            await asyncio.sleep(min(limit_s - age_s + 0.1, 60.0))
        raise CycleStalled(f"no cycle has finished for {age_s:.0f} s")

    async def _ended(self, due_ms: int) -> bool:
        """Wait for the next slot; true when the run shall end instead."""
        await self._stop.wait(max(due_ms - self._clock.now_ms(), 0) / 1000 / self._clock.speed)
        if self._end_ms and self._clock.now_ms() >= self._end_ms:
            self._stop.set("market ended")
        return bool(self._stop)

    def _next_due(self, due_ms: int, interval_ms: int) -> int:
        """The next slot on the clock's grid that is not over; missed ones are told, never stacked."""
        next_ms = (due_ms // interval_ms + 1) * interval_ms
        missed = (self._clock.now_ms() - next_ms) // interval_ms
        if missed > 0:
            self._recorder.count("cycles.missed", missed)
            log.warning("cycle overran its interval", missed=missed)
            next_ms += missed * interval_ms
        return next_ms

    async def _closes_arrived(self) -> None:
        """Give candles that closed just now the time to arrive, within the limit."""
        limit_ms = max(self._settings.close_wait_s * 1000, 250 * self._clock.speed)
        limit_ms = min(limit_ms, self._settings.interval_s * 1000 / 2)
        until_ms = self._clock.now_ms() + limit_ms
        while self._clock.now_ms() < until_ms and self._awaits_close(self._clock.now_ms()):  # noqa: ASYNC110
            await asyncio.sleep(CLOSE_POLL_S)
