"""The venue of a run: which exchange, and which clock, by mode."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from service.clock import ScaledClock, WallClock
from service.errors import SettingsInvalid, VenueMalformed, VenueUnavailable
from service.exchange.binance.adapter import open_binance
from service.exchange.embedded import SIM_KEY, SIM_SECRET, SimulatedVenue, clock_from, embedded_exchange
from service.ports import Clock, Exchange, Recorder
from service.settings import Loaded, SimSettings

STATE_FILE = "simulated-exchange.json"


class Venue(msgspec.Struct, frozen=True, kw_only=True):
    """An open exchange and its time."""

    exchange: Exchange
    clock: Clock
    end_ms: int = 0  # market time at which a replay ends; 0 when it does not
    pids: Sequence[int] = ()  # processes that are the venue, not the daemon


@asynccontextmanager
async def open_venue(loaded: Loaded, directory: Path, recorder: Recorder) -> AsyncIterator[Venue]:
    """Open the exchange that the mode asks for, and close it with the block."""
    settings = loaded.settings
    mode = settings.run.mode
    async with AsyncExitStack() as stack:
        if mode == "sim":
            simulated = await _simulated(stack, settings.sim, directory)
            exchange_settings = msgspec.structs.replace(
                settings.exchange, rest_url=simulated.rest_url, stream_url=simulated.stream_url
            )
            exchange: Exchange = await stack.enter_async_context(
                open_binance(
                    exchange_settings,
                    simulated.clock,
                    api_key=loaded.secrets.api_key
                    if settings.sim.url and loaded.secrets.api_key
                    else SIM_KEY,
                    api_secret=loaded.secrets.api_secret
                    if settings.sim.url and loaded.secrets.api_secret
                    else SIM_SECRET,
                    stop_working_type=settings.trading.stop_working_type,
                    recorder=recorder,
                )
            )
            pids = (simulated.pid,) if simulated.pid else ()
            yield Venue(exchange=exchange, clock=simulated.clock, end_ms=simulated.end_ms, pids=pids)
            return
        clock = WallClock()
        if mode == "paper":
            from service.exchange.paper import open_paper

            market = await stack.enter_async_context(
                open_binance(settings.exchange, clock, recorder=recorder)
            )
            paper = await stack.enter_async_context(
                open_paper(market, clock, settings.sim, settings.trading.stop_working_type, directory)
            )
            yield Venue(exchange=paper, clock=clock)
            return
        _check_live(loaded)
        live = await stack.enter_async_context(
            open_binance(
                settings.exchange,
                clock,
                api_key=loaded.secrets.api_key,
                api_secret=loaded.secrets.api_secret,
                stop_working_type=settings.trading.stop_working_type,
                recorder=recorder,
            )
        )
        yield Venue(exchange=live, clock=clock)


async def _simulated(stack: AsyncExitStack, settings: SimSettings, directory: Path) -> SimulatedVenue:
    if not settings.url:
        return await stack.enter_async_context(embedded_exchange(settings, directory / STATE_FILE))
    import aiohttp

    url = settings.url.rstrip("/")
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/sim/v1/clock") as answer:
            announcement = await answer.json(content_type=None)
            clock: ScaledClock = clock_from(announcement)
    except (aiohttp.ClientError, OSError):
        raise VenueUnavailable(
            f"no simulated exchange answers at {url}; start one with `perpd sim`, or leave sim.url empty"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise VenueMalformed(f"{url} does not answer like `perpd sim`; check sim.url") from None
    stream_url = announcement.get("streamUrl") or url.replace("http", "ws", 1)
    return SimulatedVenue(
        rest_url=url,
        stream_url=stream_url,
        clock=clock,
        end_ms=int(announcement.get("endTime") or 0),
        pid=0,
    )


def _check_live(loaded: Loaded) -> None:
    """Real money needs an explicit word and keys; anything less stops here."""
    if not loaded.settings.run.live_confirmed:
        raise SettingsInvalid(
            "run.mode is 'live' and run.live_confirmed is not true; set it true to trade real money"
        )
    if not (loaded.secrets.api_key and loaded.secrets.api_secret):
        raise SettingsInvalid(
            "run.mode is 'live' and there is no key; give PERPD_API_KEY and PERPD_API_SECRET, "
            "or systemd credentials binance_key and binance_secret"
        )
