"""Opening the state of a run: SQLite in the data directory, or PostgreSQL where DATABASE_URL says so."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from service.directory import market_name
from service.ports import StateStore
from service.settings import Loaded
from service.store.holding import Holding, StandingBy, holding_lease
from service.store.lease import Lease, LocalLease
from service.store.sqlite import open_sqlite

if TYPE_CHECKING:
    from service.store.postgres_link import Link

STATE_FILE = "state.sqlite3"


class State(msgspec.Struct, frozen=True):
    """An open store, and the right to trade on it."""

    store: StateStore
    lease: Lease


def schema_name(books: str) -> str:
    """The PostgreSQL schema of one market's books: as with data directories, those of two never mix."""
    return "perpd_" + re.sub(r"[^a-z0-9]+", "_", books.lower())[:50]


@asynccontextmanager
async def open_state(
    loaded: Loaded, directory: Path, standing_by: StandingBy | None = None
) -> AsyncIterator[State]:
    """Open the store, hold its lease, and migrate it; `directory` is locked by the caller.

    Args: standing_by: see `StandingBy`; None refuses to wait.
    Raises: DataDirectoryUnusable and its kin; SettingsInvalid; LeaseHeld; LeaseLost, into the block.
    """
    if not loaded.secrets.database_url:
        async with open_sqlite(directory / STATE_FILE) as sqlite:
            yield State(sqlite, LocalLease(await sqlite.next_epoch()))
        return
    from service.store.postgres import PostgresStore, migrate
    from service.store.postgres_lease import PostgresLeaseRow

    run = loaded.settings.run
    schema = schema_name(market_name(loaded.settings))
    async with open_links(loaded.secrets.database_url, schema, run.database_wait_s) as (link, lease_link):
        holding = Holding(PostgresLeaseRow(lease_link), run.lease_s)
        async with holding_lease(holding, standing_by=standing_by) as lease:
            await migrate(link)
            yield State(PostgresStore(link, lease.epoch), lease)


@asynccontextmanager
async def open_links(
    url: str, schema: str, wait_s: float, source: str = "DATABASE_URL"
) -> AsyncIterator[tuple["Link", "Link"]]:
    """Two connections: one for state, one for the lease, which no long transaction may hold up.

    Args: source: where the URL was given, for messages.
    """
    from service.store.postgres_link import Connection, Link
    from service.store.schema import POSTGRES_LEASE

    link, lease_link = Link(url, schema, source=source), Link(url, schema, name="perpd lease", source=source)

    async def prepare(db: Connection) -> None:
        async with db.transaction():
            # two that start at once would both find nothing and both make it
            await db.execute("select pg_advisory_xact_lock(hashtext($1))", schema)
            await db.execute(f'create schema if not exists "{schema}"')
            await db.execute(POSTGRES_LEASE)

    try:
        await link.open(wait_s)
        await link.run(prepare)
        yield link, lease_link
    finally:
        await asyncio.shield(asyncio.ensure_future(lease_link.close()))
        await asyncio.shield(asyncio.ensure_future(link.close()))
