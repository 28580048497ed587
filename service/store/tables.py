"""All of a store's rows in one form, whatever the dialect: what is copied, counted and hashed.

Used by commands that end, in a process of their own: SQLite is called on the loop there.
"""

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any, Protocol

import msgspec

from service.errors import StateConflict
from service.store.schema import TABLES

BATCH_ROWS = 500
BYTES = ' collate "C"'  # the order that SQLite has by itself

Row = tuple[Any, ...]
"""Text, whole numbers, flags as true or false, JSON as its text, decimals as plain text."""


class Digest(msgspec.Struct, frozen=True):
    """What a table holds: equal digests are equal tables, rows in the order of their key."""

    table: str
    rows: int
    sha256: str


class Tables(Protocol):
    """The tables of one store, within one transaction."""

    where: str

    def rows(self, table: str) -> AsyncIterator[Row]:
        """In the order of the key's bytes."""
        ...

    async def add(self, table: str, rows: Sequence[Row]) -> None: ...
    async def clear(self, table: str) -> None: ...


def _sorted_by(table: str, collate: str = "") -> str:
    keys = {"fills": 2}.get(table, 1)
    return ", ".join(f"{name}{collate}" for name, _ in TABLES[table][:keys])


class SqliteTables:
    """Tables of an open SQLite connection."""

    def __init__(self, db: sqlite3.Connection, where: str) -> None:
        self._db = db
        self.where = where

    async def rows(self, table: str) -> AsyncIterator[Row]:
        kinds = [kind for _, kind in TABLES[table]]
        for row in self._db.execute(f"select * from {table} order by {_sorted_by(table)}"):
            yield tuple(_plain(value, kind) for value, kind in zip(row, kinds, strict=True))

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        kinds = [kind for _, kind in TABLES[table]]
        marks = ", ".join("?" * len(kinds))
        self._db.executemany(
            f"insert into {table} values ({marks})",
            [[v.encode() if k == "json" else v for v, k in zip(row, kinds, strict=True)] for row in rows],
        )

    async def clear(self, table: str) -> None:
        self._db.execute(f"delete from {table}")


class PostgresTables:
    """Tables of an asyncpg connection, in a transaction that the caller began."""

    def __init__(self, db: Any, where: str) -> None:
        self._db = db
        self.where = where

    async def rows(self, table: str) -> AsyncIterator[Row]:
        kinds = [kind for _, kind in TABLES[table]]
        order = _sorted_by(table, collate=BYTES)
        sql = f"select * from {table} order by {order}"
        async for record in self._db.cursor(sql, prefetch=BATCH_ROWS):
            yield tuple(_plain(value, kind) for value, kind in zip(record, kinds, strict=True))

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        kinds = [kind for _, kind in TABLES[table]]
        marks = ", ".join(f"${n}" for n in range(1, len(kinds) + 1))
        await self._db.executemany(
            f"insert into {table} values ({marks})",
            [[Decimal(v) if k == "decimal" else v for v, k in zip(row, kinds, strict=True)] for row in rows],
        )

    async def clear(self, table: str) -> None:
        await self._db.execute(f"delete from {table}")


def _plain(value: Any, kind: str) -> Any:
    if kind == "json":
        return value.decode() if isinstance(value, bytes) else value
    if kind == "flag":
        return bool(value)
    if kind == "decimal":
        return f"{Decimal(value):f}"
    return value


async def digest(tables: Tables) -> list[Digest]:
    """Count and hash every table."""
    found = []
    for table in TABLES:
        hashed, count = hashlib.sha256(), 0
        async for row in tables.rows(table):
            hashed.update(msgspec.json.encode(row) + b"\n")
            count += 1
            if count % BATCH_ROWS == 0:
                await asyncio.sleep(0)  # the lease is renewed on this loop
        found.append(Digest(table, count, hashed.hexdigest()))
    return found


async def copy(source: Tables, target: Tables) -> list[tuple[Digest, Digest]]:
    """Add every row of the source to the target, and compare both table by table.

    The caller commits the target afterwards. Raises StateConflict: they differ.
    """
    for table in TABLES:
        batch: list[Row] = []
        async for row in source.rows(table):
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                await target.add(table, batch)
                batch.clear()
                await asyncio.sleep(0)
        if batch:
            await target.add(table, batch)
    pairs = list(zip(await digest(source), await digest(target), strict=True))
    wrong = [there.table for here, there in pairs if here != there]
    if wrong:
        raise StateConflict(
            f"{target.where} differs from {source.where} after the copy in {', '.join(wrong)}"
        )
    return pairs


async def filled(tables: Tables) -> list[str]:
    """Names of the tables that hold rows."""
    found = []
    for table in TABLES:
        async for _ in tables.rows(table):
            found.append(table)
            break
    return found
