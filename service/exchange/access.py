"""How the venue of a run is reached: its addresses, its time and our key, by mode."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from service.clock import ScaledClock, WallClock
from service.errors import SettingsInvalid, VenueMalformed, VenueUnavailable
from service.exchange.embedded import SIM_KEY, SIM_SECRET, clock_from, embedded_exchange
from service.ports import Clock
from service.settings import ExchangeSettings, Loaded, SimSettings

STATE_FILE = "simulated-exchange.json"


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """A venue that can be spoken to. Without a key only its public data can."""

    settings: ExchangeSettings
    clock: Clock
    api_key: str = ""
    api_secret: str = ""
    end_ms: int = 0  # market time at which a replay ends; 0 when it does not
    pids: Sequence[int] = ()  # processes that are the venue, not the daemon


@asynccontextmanager
async def reaching(loaded: Loaded, directory: Path) -> AsyncIterator[Access]:
    """Reach the venue that the mode asks for; an embedded one lives as long as the block.

    Raises: SettingsInvalid: live without its confirmation or a key; VenueUnavailable, VenueMalformed: the
    simulated exchange does not answer.
    """
    settings, secrets = loaded.settings, loaded.secrets
    if settings.run.mode == "live":
        _check_live(loaded)
        yield Access(
            settings=settings.exchange,
            clock=WallClock(),
            api_key=secrets.api_key,
            api_secret=secrets.api_secret,
        )
    elif settings.run.mode == "paper":
        yield Access(settings=settings.exchange, clock=WallClock())
    elif settings.sim.url:
        yield await _simulated(settings.sim, settings.exchange, loaded)
    else:
        async with embedded_exchange(settings.sim, directory / STATE_FILE) as own:
            yield Access(
                settings=_at(settings.exchange, own.rest_url, own.stream_url),
                clock=own.clock,
                api_key=SIM_KEY,
                api_secret=SIM_SECRET,
                end_ms=own.end_ms,
                pids=(own.pid,),
            )


def _at(settings: ExchangeSettings, rest_url: str, stream_url: str) -> ExchangeSettings:
    return msgspec.structs.replace(settings, rest_url=rest_url, stream_url=stream_url, wallet_url=rest_url)


async def _simulated(sim: SimSettings, exchange: ExchangeSettings, loaded: Loaded) -> Access:
    """A `perpd sim` that runs apart."""
    import aiohttp

    url = sim.url.rstrip("/")
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/sim/v1/clock") as answer:
            announcement: dict[str, Any] = await answer.json(content_type=None)
            clock: ScaledClock = clock_from(announcement)
    except (aiohttp.ClientError, OSError):
        raise VenueUnavailable(
            f"no simulated exchange answers at {url}; start one with `perpd sim`, or leave sim.url empty"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise VenueMalformed(f"{url} does not answer like `perpd sim`; check sim.url") from None
    return Access(
        settings=_at(exchange, url, announcement.get("streamUrl") or url.replace("http", "ws", 1)),
        clock=clock,
        api_key=loaded.secrets.api_key or SIM_KEY,
        api_secret=loaded.secrets.api_secret or SIM_SECRET,
        end_ms=int(announcement.get("endTime") or 0),
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
