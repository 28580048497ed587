"""Whether the kill switch is tripped: all else may pass while nothing can be opened."""

import asyncio
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from service.check.result import Check, passed, skipped, warned
from service.errors import PerpdError
from service.settings import Loaded
from service.trading.halting import KEY, read_switch
from service.trading.kill_request import REQUEST
from service.trading.killswitch import Level, Trip

NAME = "kill switch"
NAMES = (KEY, REQUEST)
EFFECTS = {Level.FLATTEN: "nothing is opened and the next start closes every position of ours at market"}


class _Kept(msgspec.Struct, frozen=True):
    values: Mapping[str, str]

    async def get_value(self, key: str) -> str | None:
        return self.values.get(key)


async def kill_switch(loaded: Loaded, file: Path, now_ms: int) -> Check:
    """As it is kept, with what was asked for and not taken up yet; beside a running daemon too.

    Args: file: the state's, where no database is named.
    """
    try:
        values = await _from_database(loaded) if loaded.secrets.database_url else await _from_file(file)
    except (sqlite3.Error, PerpdError) as error:
        transient = isinstance(error, PerpdError) and error.transient
        return skipped(NAME, f"the state cannot be read: {error}", transient=transient)
    if values is None:
        return passed(NAME, "no state yet")
    switch = await read_switch(_Kept(values), now_ms)
    if switch.level is None:
        return passed(NAME, "free")
    effect = EFFECTS.get(switch.level, "nothing is opened")
    return warned(
        NAME,
        f"tripped, {effect}: {'; '.join(_words(trip) for trip in switch.trips)}",
        "lift with perpd resume --reason TEXT",
    )


def _words(trip: Trip) -> str:
    since = datetime.fromtimestamp(trip.tripped_ms / 1000, UTC)
    return f"{trip.level} since {since:%Y-%m-%d %H:%M:%S} UTC: {trip.words}"


async def _from_file(file: Path) -> Mapping[str, str] | None:
    return await asyncio.to_thread(_read, file)


def _read(file: Path) -> Mapping[str, str] | None:
    if not file.exists():
        return None
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as database:
        if not database.execute("pragma user_version").fetchone()[0]:
            return None
        return dict(database.execute("select name, value from settings where name in (?, ?)", NAMES))


async def _from_database(loaded: Loaded) -> Mapping[str, str] | None:
    from service.check import database

    return await database.values(loaded, NAMES)
