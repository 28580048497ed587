"""Values of a PostgreSQL state, read and written beside the perpd that holds its lease.

For what must be possible at any time: asking the holder to stop. All else is written under the lease.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.directory import market_name
from service.settings import Loaded
from service.store.opening import schema_name

if TYPE_CHECKING:
    from service.store.postgres_link import Link

PUT = "insert into settings values ($1, $2) on conflict (name) do update set value = excluded.value"


class Beside:
    """`where` names the database. Raises StoreUnavailable, also where no state was made yet."""

    def __init__(self, link: "Link") -> None:
        self._link = link
        self.where = link.where

    async def get_value(self, key: str) -> str | None:
        value = await self._link.run(
            lambda db: db.fetchval("select value from settings where name = $1", key)
        )
        return None if value is None else str(value)

    async def put_unfenced(self, key: str, value: str) -> None:
        """Only for values that no holder writes."""
        await self._link.run(lambda db: db.execute(PUT, key, value))

    async def trades(self) -> bool:
        """A perpd holds the lease now."""
        held = "select expires > clock_timestamp() from lease where name = 'perpd'"
        return bool(await self._link.run(lambda db: db.fetchval(held)))

    async def holder(self) -> str:
        """Who holds the lease, or held it last."""
        held = await self._link.run(lambda db: db.fetchval("select holder from lease where name = 'perpd'"))
        return str(held or "nobody")


@asynccontextmanager
async def open_beside(loaded: Loaded) -> AsyncIterator[Beside]:
    """Needs DATABASE_URL. Raises StoreUnavailable, SettingsInvalid."""
    from service.store.postgres_link import Link

    schema = schema_name(market_name(loaded.settings))
    link = Link(loaded.secrets.database_url, schema, name="perpd beside")
    try:
        await link.open(loaded.settings.run.database_wait_s)
        yield Beside(link)
    finally:
        await link.close()
