"""`perpd store migrate | backup | restore | copy`: work on the state while no daemon trades on it.

A backup is the exception: it is taken from a running daemon too, and is always one SQLite file.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from service.clock import WallClock, file_time, utc_time
from service.directory import data_path, locked, marked_name, market_name
from service.errors import DataDirectoryUnusable, SettingsInvalid
from service.logs import configure
from service.output import check_output
from service.settings import Loaded, RunSettings, Secrets, check_database_url
from service.store.backup import copy_file, digest_file, put_back, reading, write_file
from service.store.holding import Holding, holding_lease
from service.store.opening import STATE_FILE, open_links, schema_name
from service.store.schema import POSTGRES, SQLITE, TABLES
from service.store.sqlite import connect, schema_version
from service.store.tables import Digest, PostgresTables, SqliteTables, Tables, copy, filled

if TYPE_CHECKING:
    from service.store.postgres_link import Link

SQLITE_PREFIX = "sqlite:"
DONE = {
    "migrate": "the schema is up to date; a start of perpd finds it so",
    "backup": "a backup was written; the state is as it was, and a running perpd goes on",
    "restore": "the state is that of the backup; in force from the next start of perpd, which first compares "
    "positions and orders with the venue",
    "copy": "copied, all tables equal; the state is as it was: a start of perpd uses the copy only where "
    "DATABASE_URL or the data directory names it",
}
"""By action: what was done, and when it takes effect."""
VERSION = "select version from schema_version"


def add_arguments(
    parser: argparse.ArgumentParser, add_run_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The actions of `perpd store`; where the state is comes from the settings, as for `perpd run`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    migrate = actions.add_parser("migrate", help="bring the schema up to date, as a start of the daemon does")
    backup = actions.add_parser("backup", help="write a backup, also beside a running daemon")
    backup.add_argument("--out", type=Path, metavar="FILE", help="default: backups/ in the data directory")
    restore = actions.add_parser("restore", help="replace the state by a backup; the old is kept")
    restore.add_argument("file", type=Path, metavar="FILE")
    copied = actions.add_parser("copy", help="copy the state into an empty store and compare both")
    copied.add_argument(
        "--to",
        required=True,
        metavar="URL",
        help="postgresql://... or sqlite:FILE; - reads the URL from standard input, out of sight of others",
    )
    for action in (migrate, backup, restore, copied):
        action.add_argument("--json", action="store_true", help="print one JSON object")
        add_run_arguments(action)


def run(loaded: Loaded, args: argparse.Namespace) -> int:
    """Do one action and say what was done. Raises PerpdError with what to do instead."""
    url = ""
    if args.action == "copy":
        url = sys.stdin.readline().strip() if args.to == "-" else args.to
        _check_target(url, loaded.secrets.database_url)
    target = Secrets(database_url=url)
    # For machines the answer or the error is all there is; a person is told of waiting.
    log = msgspec.structs.replace(loaded.settings.log, level="error" if args.json else "warn")
    configure(log, secrets=(*loaded.secrets.values(), *target.values()))
    place = _place(loaded)
    if args.action == "migrate":
        result = asyncio.run(_migrate(place))
    elif args.action == "backup":
        result = asyncio.run(_backup(place, args.out))
    elif args.action == "restore":
        result = asyncio.run(_restore(place, args.file))
    else:
        result = asyncio.run(_copy(place, url))
    at = f"{utc_time(WallClock().now_ms())}, by this machine's clock"
    _tell({"done": DONE[args.action], **result, "at": at}, as_json=args.json)
    return 0


def _check_target(url: str, source_url: str) -> None:
    """What can be known of --to without opening anything. Raises SettingsInvalid."""
    if not url:
        raise SettingsInvalid("--to is empty; allowed is postgresql://HOST:PORT/DATABASE or sqlite:FILE")
    if url.startswith(SQLITE_PREFIX):
        if not url.removeprefix(SQLITE_PREFIX).removeprefix("//"):
            raise SettingsInvalid("--to names no file; allowed is sqlite:FILE")
        return
    check_database_url(url, "--to", "sqlite:FILE")
    if source_url:
        from service.store.postgres_link import where

        if where(url) == where(source_url):
            raise SettingsInvalid(
                f"--to is {where(url)}, where the state is already (DATABASE_URL); name another database"
            )


class Place(msgspec.Struct, frozen=True):
    """Where the state is: a database, or without its URL the file in the data directory."""

    url: str
    schema: str
    directory: Path
    settings: RunSettings
    url_source: str = "DATABASE_URL"

    @property
    def file(self) -> Path:
        return self.directory / STATE_FILE


def _place(loaded: Loaded) -> Place:
    """A directory that says whose books it holds is believed: no flag of the run need be repeated."""
    directory = data_path(loaded.settings)
    books = marked_name(directory) or market_name(loaded.settings)
    return Place(loaded.secrets.database_url, schema_name(books), directory, loaded.settings.run)


async def _migrate(place: Place) -> dict[str, Any]:
    if place.url:
        async with _exclusive(place) as (link, _):
            return {"state": link.where, "schema": len(POSTGRES)}
    with locked(place.directory):
        before = _version_of(place.file)
        db = connect(place.file)
        try:
            return {"state": str(place.file), "before": before, "schema": schema_version(db)}
        finally:
            db.close()


def _version_of(file: Path) -> int:
    """0 where there is no state yet."""
    if not file.is_file():
        return 0
    with reading(file) as db:
        return schema_version(db)


async def _backup(place: Place, out: Path | None) -> dict[str, Any]:
    if out is not None:
        check_output(out)
    target = out or _aside(place.directory / "backups" / STATE_FILE)
    if not place.url:
        copy_file(place.file, target)
        return {"backup": str(target), "of": str(place.file), "tables": await digest_file(target)}
    async with open_links(place.url, place.schema, place.settings.database_wait_s) as (link, _):
        pairs = await link.alone(lambda db: _whole(db, link.where, target))
    return {"backup": str(target), "of": link.where, "tables": [there for _, there in pairs]}


async def _whole(db: Any, where: str, target: Path) -> list[tuple[Digest, Digest]]:
    """All of a database as of one moment, while others write."""
    version = await db.fetchval(VERSION)
    if not version:
        raise DataDirectoryUnusable(f"{where}: there is no state here")
    if version != len(POSTGRES):
        raise DataDirectoryUnusable(
            f"{where}: has schema {version}, this perpd backs up schema {len(POSTGRES)}; use the perpd that "
            "runs on it, or `perpd store migrate` first"
        )
    async with db.transaction(isolation="repeatable_read", readonly=True):
        return await write_file(PostgresTables(db, where), target)


async def _restore(place: Place, file: Path) -> dict[str, Any]:
    if not place.url:
        with locked(place.directory):
            before = put_back(file, place.file, _aside(place.file))
        tables = await digest_file(place.file)
        return {"state": str(place.file), "from": str(file), "kept": str(before or ""), "tables": tables}
    kept = _aside(place.directory / "backups" / STATE_FILE)
    with reading(file) as source:
        if schema_version(source) < len(SQLITE):
            raise DataDirectoryUnusable(
                f"{file}: is of an older schema; restore it to SQLite first, which migrates it, then copy it"
            )
        async with _exclusive(place) as (link, epoch):
            await link.alone(lambda db: _whole(db, link.where, kept))
            tables_of_file = SqliteTables(source, str(file))
            pairs = await link.alone(lambda db: _replace(db, tables_of_file, link.where, epoch))
    tables = [there for _, there in pairs]
    return {"state": link.where, "from": str(file), "kept": str(kept), "tables": tables}


async def _replace(db: Any, source: Tables, where: str, epoch: int) -> list[tuple[Digest, Digest]]:
    from service.store.postgres import fenced

    target = PostgresTables(db, where)
    async with db.transaction():
        await fenced(db, epoch, where)
        for table in TABLES:
            await target.clear(table)
        return await copy(source, target)


async def _copy(place: Place, url: str) -> dict[str, Any]:
    if url.startswith(SQLITE_PREFIX):
        check_output(_file_of(url))
    async with _source(place) as source:
        if url.startswith(SQLITE_PREFIX):
            where = str(_file_of(url))
            pairs = await write_file(source, _file_of(url))
        else:
            async with _exclusive(msgspec.structs.replace(place, url=url, url_source="--to")) as (
                link,
                epoch,
            ):
                pairs = await link.alone(lambda db: _fill(db, source, link.where, epoch))
                where = link.where
    return {"from": source.where, "to": where, "tables": pairs}


def _file_of(url: str) -> Path:
    return Path(url.removeprefix(SQLITE_PREFIX).removeprefix("//"))


async def _fill(db: Any, source: Tables, where: str, epoch: int) -> list[tuple[Digest, Digest]]:
    from service.store.postgres import fenced

    target = PostgresTables(db, where)
    async with db.transaction():
        await fenced(db, epoch, where)
        held = await filled(target)
        if held:
            raise DataDirectoryUnusable(
                f"{where}: holds rows already in {', '.join(held)}; copy into an empty store, or use restore"
            )
        return await copy(source, target)


@asynccontextmanager
async def _source(place: Place) -> AsyncIterator[Tables]:
    """The state of the settings, which nobody changes meanwhile."""
    if place.url:
        async with _exclusive(place, filled=True) as (link, _), link.borrowed() as db:
            async with db.transaction(isolation="repeatable_read", readonly=True):
                yield PostgresTables(db, link.where)
        return
    with locked(place.directory):
        if place.file.is_file():
            connect(place.file).close()  # of the newest schema, as what it is copied to
        with reading(place.file) as file:
            yield SqliteTables(file, str(place.file))


@asynccontextmanager
async def _exclusive(place: Place, *, filled: bool = False) -> AsyncIterator[tuple["Link", int]]:
    """A database whose lease we hold, under this epoch, and whose schema is up to date. Raises LeaseHeld."""
    from service.store.postgres import migrate
    from service.store.postgres_lease import PostgresLeaseRow

    wait_s = place.settings.database_wait_s
    async with open_links(place.url, place.schema, wait_s, place.url_source) as (link, lease_link):
        holding = Holding(PostgresLeaseRow(lease_link), place.settings.lease_s)
        async with holding_lease(holding, standing_by=None) as lease:
            if filled and not await link.alone(lambda db: db.fetchval(VERSION)):
                raise DataDirectoryUnusable(f"{link.where}: there is no state in schema {place.schema}")
            await migrate(link)
            yield link, lease.epoch


def _aside(path: Path) -> Path:
    """The path with the time in its name."""
    return path.with_name(f"{path.stem}-{file_time(WallClock().now_ms())}{path.suffix}")


def _tell(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(result).decode())  # noqa: T201
        return
    for name, value in result.items():
        if name != "tables" and value != "":
            print(f"{name:<7} {value}")  # noqa: T201
    for line in _table(result.get("tables", [])):
        print(line)  # noqa: T201


def _table(rows: Sequence[Digest | tuple[Digest, Digest]]) -> list[str]:
    lines = []
    for row in rows:
        if isinstance(row, Digest):
            lines.append(f"{row.table:<12} {row.rows:>9}  {row.sha256}")
        else:
            here, there = row
            counts = f"{here.rows:>9} {there.rows:>9}"
            lines.append(f"{here.table:<12} {counts}  {here.sha256[:16]} {there.sha256[:16]}  equal")
    return lines
