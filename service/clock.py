"""Time, the only way to read it. Venue time is UTC in milliseconds since the Unix epoch.

A simulated market runs `speed` times as fast as the wall: its clock is shared by the simulated
exchange and the daemon, since both scale the same monotonic clock of this machine.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime


class WallClock:
    """Real time, shifted by what the venue's clock is ahead of ours."""

    speed = 1.0

    def __init__(self) -> None:
        self.offset_ms = 0
        self.moved_ms = 0  # how far the newest measurement found it off what the one before had set
        self._measured = False

    def correct(self, ahead_ms: int) -> None:
        """The venue's clock was measured to be this much ahead of what `now_ms` says."""
        self.moved_ms = ahead_ms if self._measured else 0
        self._measured = True
        self.offset_ms += ahead_ms

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.offset_ms

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0))

    async def sleep_until(self, at_ms: int) -> None:
        await asyncio.sleep(max(at_ms - self.now_ms(), 0) / 1000)


class ScaledClock:
    """Market time of an accelerated simulation.

    Args: origin_ms: market time at `origin_monotonic_s` on this machine's monotonic clock;
    speed: market milliseconds per wall millisecond, > 0; monotonic_s: the clock that both read.
    `sleep_s` and `sleep_until` take market time; `monotonic_s` stays wall time, for measuring work.
    """

    def __init__(
        self,
        origin_ms: int,
        origin_monotonic_s: float,
        speed: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic_s = monotonic_s
        self.origin_ms = origin_ms
        self.origin_monotonic_s = origin_monotonic_s
        self.speed = speed

    def now_ms(self) -> int:
        return self.origin_ms + int((self._monotonic_s() - self.origin_monotonic_s) * 1000 * self.speed)

    def monotonic_s(self) -> float:
        return self._monotonic_s()

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0) / self.speed)

    async def sleep_until(self, at_ms: int) -> None:
        while (left_ms := at_ms - self.now_ms()) > 0:  # noqa: ASYNC110 - time is no event
            await asyncio.sleep(left_ms / 1000 / self.speed)  # again when woken early


class ManualClock:
    """Time that moves only when told, for tests and virtual time."""

    speed = 1.0

    def __init__(self, now_ms: int = 0) -> None:
        self._now_ms = now_ms
        self._sleepers: list[tuple[int, asyncio.Future[None]]] = []

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic_s(self) -> float:
        return self._now_ms / 1000

    async def sleep_s(self, seconds: float) -> None:
        await self.sleep_until(self._now_ms + round(seconds * 1000))

    async def sleep_until(self, at_ms: int) -> None:
        if at_ms <= self._now_ms:
            await asyncio.sleep(0)
            return
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((at_ms, sleeper))
        await sleeper

    def advance_to(self, at_ms: int) -> None:
        """Move time forward and wake, in order, whoever slept until then or before."""
        self._now_ms = max(at_ms, self._now_ms)
        due = sorted((s for s in self._sleepers if s[0] <= self._now_ms), key=lambda s: s[0])
        self._sleepers = [s for s in self._sleepers if s[0] > self._now_ms]
        for _, sleeper in due:
            if not sleeper.done():
                sleeper.set_result(None)


def boot_s() -> float:
    """Seconds since the machine started, those included in which it slept: a lease runs out meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def file_time(at_ms: int) -> str:
    """A time as part of a file name, UTC, to the millisecond."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{at_ms % 1000:03d}Z"


def utc_time(at_ms: int) -> str:
    """A time for a reader, to the second."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def parse_time(text: str) -> int:
    """Milliseconds since the Unix epoch of an ISO 8601 time, UTC when it names no zone.

    Raises: ValueError: the text is no such time.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"found {text!r}, allowed is a time like 2025-10-10T12:00 (ISO 8601)") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1_000)
