"""How a run is asked to end: a signal, the last cycle, or the end of the market."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

EXIT_SECOND_SIGNAL = 130

log = structlog.get_logger("perpd")


class StopRequest:
    """Why and when the run shall end: a signal, the last cycle, or the end of the market."""

    def __init__(self) -> None:
        self.reason = ""
        self._event = asyncio.Event()

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    async def wait(self, limit_s: float | None = None) -> None:
        """Return when a stop was asked for, or after the limit (wall seconds)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._event.wait()


@contextmanager
def stop_on_signal(stop: StopRequest) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for a drain; the second ends the process at once."""
    loop = asyncio.get_running_loop()

    def received(number: signal.Signals) -> None:
        if stop:
            log.error("second stop signal, ending at once", signal=number.name)
            sys.stdout.flush()
            os._exit(EXIT_SECOND_SIGNAL)
        log.info("stop signal, draining", signal=number.name)
        stop.set(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def cancel_start(stop: StopRequest, started: asyncio.Event, work: asyncio.Task[None]) -> None:
    """End the work when a stop is asked for before it has started; returns once either happened."""
    asked = asyncio.ensure_future(stop.wait())
    begun = asyncio.ensure_future(started.wait())
    work.add_done_callback(lambda _: started.set())
    await asyncio.wait({asked, begun}, return_when=asyncio.FIRST_COMPLETED)
    if not started.is_set():
        work.cancel()
    for waiting in (asked, begun):
        waiting.cancel()
