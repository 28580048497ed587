"""The venue of a run: which exchange, and which clock, by mode."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from service.exchange.access import Access, reaching
from service.exchange.binance.adapter import open_binance
from service.exchange.gate import OPEN, Gate
from service.ports import Clock, Exchange, Recorder
from service.settings import Loaded


class Venue(msgspec.Struct, frozen=True, kw_only=True):
    """An open exchange and its time."""

    exchange: Exchange
    access: Access

    @property
    def clock(self) -> Clock:
        return self.access.clock

    @property
    def end_ms(self) -> int:
        """Market time at which a replay ends; 0 when it does not."""
        return self.access.end_ms

    @property
    def pids(self) -> Sequence[int]:
        """Processes that are the venue, not the daemon."""
        return self.access.pids


@asynccontextmanager
async def open_venue(
    loaded: Loaded, directory: Path, recorder: Recorder, gate: Gate = OPEN
) -> AsyncIterator[Venue]:
    """Open the exchange that the mode asks for, and close it with the block."""
    settings = loaded.settings
    async with AsyncExitStack() as stack:
        access = await stack.enter_async_context(reaching(loaded, directory))
        exchange: Exchange = await stack.enter_async_context(
            open_binance(
                access.settings,
                access.clock,
                api_key=access.api_key,
                api_secret=access.api_secret,
                stop_working_type=settings.trading.stop_working_type,
                recorder=recorder,
                gate=gate,
            )
        )
        if settings.run.mode == "paper":
            from service.exchange.paper import open_paper

            exchange = await stack.enter_async_context(
                open_paper(
                    exchange, access.clock, settings.sim, settings.trading.stop_working_type, directory
                )
            )
        yield Venue(exchange=exchange, access=access)
