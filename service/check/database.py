"""The check of a state that is kept in PostgreSQL. Makes nothing there."""

from collections.abc import Mapping, Sequence

from service.check.result import Check, failed, failed_with, passed
from service.directory import market_name
from service.errors import PerpdError
from service.settings import Loaded
from service.store.opening import schema_name


async def state(loaded: Loaded) -> Check:
    """Reachable, and of a schema that this perpd knows, beside a running daemon too."""
    from service.store.postgres import kept_version
    from service.store.postgres_link import Link
    from service.store.schema import POSTGRES

    schema = schema_name(market_name(loaded.settings))
    link = Link(loaded.secrets.database_url, schema, name="perpd check")
    try:
        version = await link.run(lambda db: kept_version(db, schema))
    except PerpdError as error:
        return failed_with("state", error)
    finally:
        await link.close()
    if version > len(POSTGRES):
        return failed(
            "state",
            f"{link.where} has schema {version}, this perpd knows {len(POSTGRES)}",
            "run the newer perpd that wrote it, or restore an older backup",
        )
    if not version:
        return passed("state", f"none yet in {link.where}, it is made at the first start")
    return passed("state", f"schema {version} of {len(POSTGRES)} in {link.where}")


async def values(loaded: Loaded, names: Sequence[str]) -> Mapping[str, str] | None:
    """Those of the names that the state has; None where none was made yet. Raises StoreUnavailable."""
    from service.store.postgres import kept_version
    from service.store.postgres_link import Connection, Link

    schema = schema_name(market_name(loaded.settings))

    async def read(db: Connection) -> Mapping[str, str] | None:
        if not await kept_version(db, schema):
            return None
        return dict(await db.fetch("select name, value from settings where name = any($1)", list(names)))

    link = Link(loaded.secrets.database_url, schema, name="perpd check")
    try:
        return await link.run(read)
    finally:
        await link.close()


async def bans(loaded: Loaded) -> dict[str, int]:
    """Host to venue time until which it wants silence; none of a state that `state` fails."""
    from service.store.postgres_link import Link

    link = Link(loaded.secrets.database_url, schema_name(market_name(loaded.settings)), name="perpd check")
    try:
        return dict(await link.run(lambda db: db.fetch("select host, until_ms from bans")))
    except PerpdError:
        return {}
    finally:
        await link.close()
