"""`perpd check`: is everything as trading needs it? Asks here and at the venue, changes nothing."""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from service.check import here
from service.check.kill import kill_switch
from service.check.result import Check, as_json, exit_code, failures, lines
from service.check.venue import VenueChecks
from service.directory import data_path
from service.errors import CheckFailed, CheckFailedForNow
from service.exchange.access import Access, reaching
from service.exchange.gate import Gate
from service.logs import configure
from service.settings import Loaded
from service.store.opening import STATE_FILE


def run(loaded: Loaded, args: argparse.Namespace) -> int:
    """Check and print the table. Exit code 1 when something fails, 69 when all that may pass by itself."""
    import msgspec
    import uvloop

    # The table says it all: what the parts log meanwhile would only stand in its way.
    configure(msgspec.structs.replace(loaded.settings.log, level="error"), secrets=loaded.secrets.values())
    checks = uvloop.run(_check(loaded, os.environ))
    print(json.dumps(as_json(checks)) if args.json else "\n".join(lines(checks)))  # noqa: T201
    return exit_code(checks)


async def _check(loaded: Loaded, environment: Mapping[str, str]) -> list[Check]:
    settings = loaded.settings
    directory = data_path(settings)
    checks = check_here(loaded, directory, environment)
    # An embedded exchange keeps its account in a place of its own: a running daemon's is not disturbed.
    with tempfile.TemporaryDirectory(prefix="perpd-check-") as apart:
        async with reaching(loaded, Path(apart)) as access:
            checks += await _kept(loaded, directory)
            checks.append(await kill_switch(loaded, directory / STATE_FILE, access.clock.now_ms()))
            bans = await _bans(loaded, directory)
            gate = Gate(silent_until_ms=lambda host: bans.get(host, 0))
            return checks + await VenueChecks(settings, access, gate).run()


def check_here(loaded: Loaded, directory: Path, environment: Mapping[str, str]) -> list[Check]:
    """The checks that need no venue."""
    settings = loaded.settings
    live = settings.run.mode == "live"
    return [
        here.data_directory(
            directory,
            live=live,
            state_elsewhere=bool(loaded.secrets.database_url),
            environment=environment,
        ),
        here.disk_space(directory),
        here.memory(settings),
    ]


async def _kept(loaded: Loaded, directory: Path) -> list[Check]:
    """The state, wherever it is kept."""
    if not loaded.secrets.database_url:
        return [await asyncio.to_thread(here.state, directory / STATE_FILE)]
    from service.check import database

    return [await database.state(loaded)]


async def _bans(loaded: Loaded, directory: Path) -> dict[str, int]:
    """Bans that runs on this state were given, by host; see `store.bans`."""
    if not loaded.secrets.database_url:
        return await asyncio.to_thread(here.bans, directory / STATE_FILE)
    from service.check import database

    return await database.bans(loaded)


async def require(loaded: Loaded, directory: Path, access: Access, gate: Gate) -> None:
    """Live trading starts only when nothing fails. Raises CheckFailed, naming what does; CheckFailedForNow
    where all of it may pass by itself: positions must not stay alone after an outage.

    Args: gate: the daemon's, which knows of bans, hears of new ones and of the right to send.
    """
    found = await asyncio.to_thread(check_here, loaded, directory, os.environ)
    found += await _kept(loaded, directory)
    found += await VenueChecks(loaded.settings, access, gate).run()
    if bad := failures(found):
        error = CheckFailedForNow if all(check.transient for check in bad) else CheckFailed
        raise error("; ".join(f"{check.name}: {check.found}" for check in bad))
