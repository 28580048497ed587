"""Durable state in one SQLite file: WAL, one writer thread, each call one transaction.

`synchronous=FULL`: a call that returned survives power loss. One dedicated thread owns the
connection, so no call blocks the loop, none meets a lock, and calls take effect in the order made.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from service.errors import DataDirectoryUnusable, StateConflict
from service.records import (
    Adjustment,
    Decision,
    Fill,
    Order,
    Position,
    ShadowPosition,
    Signal,
)
from service.store.schema import MIGRATIONS

Result = TypeVar("Result")

DECIDED_KEPT_MS = 2 * 86_400_000  # a signal is decided within minutes of its candle
SHADOWS_KEPT_MS = 7 * 86_400_000  # closed ones live on in the archive
BUSY_MS = 5_000
TOTALS = ("realised_pnl", "fees", "funding", "deposits", "corrections")

_encode = msgspec.json.encode
_order = msgspec.json.Decoder(Order).decode
_fill = msgspec.json.Decoder(Fill).decode
_position = msgspec.json.Decoder(Position).decode
_shadow = msgspec.json.Decoder(ShadowPosition).decode


@asynccontextmanager
async def open_sqlite(path: Path) -> AsyncIterator["SqliteStore"]:
    """Open, check and migrate the store; every call made inside the block is finished when it ends.

    Raises: DataDirectoryUnusable: not writable, damaged, or written by a newer perpd.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
    loop = asyncio.get_running_loop()
    try:
        connection = await loop.run_in_executor(thread, _open, path)
        try:
            yield SqliteStore(connection, thread, path)
        finally:
            await asyncio.shield(loop.run_in_executor(thread, connection.close))
    finally:
        thread.shutdown(wait=True)


class SqliteStore:
    """StateStore on SQLite.

    Raises: DataDirectoryUnusable: the file cannot be written; StateConflict: a constraint refuses it.
    """

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path) -> None:
        self._connection = connection
        self._thread = thread
        self._path = path

    async def save_order(self, order: Order) -> None:
        await self._write(lambda db: _put_order(db, order))

    async def open_orders(self) -> list[Order]:
        rows = await self._read("select payload from orders where final = 0")
        return [_order(row[0]) for row in rows]

    async def order(self, client_order_id: str) -> Order | None:
        rows = await self._read("select payload from orders where client_order_id = ?", client_order_id)
        return _order(rows[0][0]) if rows else None

    async def save_fill(
        self,
        fill: Fill,
        *,
        realised_pnl: Decimal,
        fee: Decimal,
        quantity: Decimal,
        cost: Decimal,
        position: Position | None = None,
    ) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            row = (fill.symbol, fill.trade_id, fill.client_order_id, fill.filled_ms, _encode(fill))
            if db.execute("insert or ignore into fills values (?, ?, ?, ?, ?)", row).rowcount == 0:
                return False
            _add(db, "realised_pnl", realised_pnl)
            _add(db, "fees", fee)
            _put_holding(db, fill.symbol, quantity, cost)
            if position is not None:
                _put_position(db, position)
            return True

        return await self._write(write)

    async def fills(self, client_order_id: str) -> list[Fill]:
        rows = await self._read(
            "select payload from fills where client_order_id = ? order by filled_ms", client_order_id
        )
        return [_fill(row[0]) for row in rows]

    async def save_position(self, position: Position) -> None:
        await self._write(lambda db: _put_position(db, position))

    async def save_intent(self, position: Position, order: Order) -> None:
        def write(db: sqlite3.Connection) -> None:
            _put_position(db, position)
            _put_order(db, order)

        await self._write(write)

    async def position(self, position_id: str) -> Position | None:
        rows = await self._read("select payload from positions where position_id = ?", position_id)
        return _position(rows[0][0]) if rows else None

    async def open_positions(self) -> list[Position]:
        rows = await self._read("select payload from positions where closed_ms = 0")
        return [_position(row[0]) for row in rows]

    async def closed_positions(self, limit: int) -> list[Position]:
        rows = await self._read(
            """select payload from positions where closed_ms > 0 and traded = 1
               order by closed_ms desc, position_id desc limit ?""",
            limit,
        )
        return [_position(row[0]) for row in rows]

    async def save_shadows(self, shadows: Sequence[ShadowPosition]) -> None:
        rows = [(s.position_id, s.closed_ms, _encode(s)) for s in shadows]
        newest_ms = max((s.closed_ms for s in shadows), default=0)

        def write(db: sqlite3.Connection) -> None:
            db.executemany("insert or replace into shadows values (?, ?, ?)", rows)
            db.execute("delete from shadows where closed_ms between 1 and ?", (newest_ms - SHADOWS_KEPT_MS,))

        await self._write(write)

    async def open_shadows(self) -> list[ShadowPosition]:
        rows = await self._read("select payload from shadows where closed_ms = 0")
        return [_shadow(row[0]) for row in rows]

    async def save_signal_decided(self, signals: Sequence[tuple[Signal, Decision]]) -> None:
        rows = [(signal.signal_id, signal.candle_close_ms) for signal, _ in signals]
        newest_ms = max((closed_ms for _, closed_ms in rows), default=0)

        def write(db: sqlite3.Connection) -> None:
            db.executemany("insert or ignore into decided values (?, ?)", rows)
            db.execute("delete from decided where candle_close_ms < ?", (newest_ms - DECIDED_KEPT_MS,))

        await self._write(write)

    async def decided_since(self, candle_close_ms: int) -> set[str]:
        rows = await self._read("select signal_id from decided where candle_close_ms >= ?", candle_close_ms)
        return {row[0] for row in rows}

    async def save_adjustment(
        self, adjustment: Adjustment, *, holding: tuple[str, Decimal, Decimal] | None = None
    ) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            row = (adjustment.adjustment_id, adjustment.at_ms, _encode(adjustment))
            if db.execute("insert or ignore into adjustments values (?, ?, ?)", row).rowcount == 0:
                return False
            _add(db, adjustment.total, adjustment.amount)
            if holding is not None:
                _put_holding(db, *holding)
            return True

        return await self._write(write)

    async def get_value(self, key: str) -> str | None:
        rows = await self._read("select value from settings where name = ?", key)
        return str(rows[0][0]) if rows else None

    async def set_value(self, key: str, value: str) -> None:
        await self._write(
            lambda db: _execute(db, "insert or replace into settings values (?, ?)", key, value)
        )

    async def ledger_totals(self) -> dict[str, Decimal]:
        stored = dict(await self._read("select name, amount from totals"))
        return {name: Decimal(stored.get(name, "0")) for name in TOTALS}

    async def holdings(self) -> dict[str, tuple[Decimal, Decimal]]:
        rows = await self._read("select symbol, quantity, cost from holdings")
        return {symbol: (Decimal(quantity), Decimal(cost)) for symbol, quantity, cost in rows}

    async def _read(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        return await self._run(lambda db: db.execute(sql, arguments).fetchall())

    async def _write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        def transaction(db: sqlite3.Connection) -> Result:
            db.execute("begin immediate")
            try:
                result = change(db)
                db.execute("commit")
            except BaseException:
                if db.in_transaction:  # a full disk may have ended it already
                    db.execute("rollback")
                raise
            return result

        return await self._run(transaction)

    async def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work, self._connection)
        except sqlite3.IntegrityError as error:
            raise StateConflict(f"{self._path}: {error}") from error
        except sqlite3.OperationalError as error:
            raise DataDirectoryUnusable(f"{self._path}: {error}; free space or check permissions") from error


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise DataDirectoryUnusable(f"{path}: cannot be opened: {error}") from None
    try:
        db.execute(f"pragma busy_timeout = {BUSY_MS}")
        _check(db, path)
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        db.execute("pragma cache_size = -1024")  # KiB; every query is by key, so little is enough
        _migrate(db, path)
    except sqlite3.Error as error:
        db.close()
        raise DataDirectoryUnusable(f"{path}: {error}; check the directory, or restore a copy") from None
    except DataDirectoryUnusable:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    found = db.execute("pragma quick_check(1)").fetchone()[0]
    if found != "ok":
        raise DataDirectoryUnusable(f"{path}: is damaged ({found}); restore a copy")


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = int(db.execute("pragma user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise DataDirectoryUnusable(
            f"{path}: schema {version} was written by a newer perpd; this one knows up to {len(MIGRATIONS)}"
        )
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        db.execute("begin immediate")
        try:
            for statement in statements:
                db.execute(statement)
            db.execute(f"pragma user_version = {number}")
            db.execute("commit")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("rollback")
            raise


def _execute(db: sqlite3.Connection, sql: str, *arguments: object) -> None:
    db.execute(sql, arguments)


def _put_order(db: sqlite3.Connection, order: Order) -> None:
    row = (
        order.client_order_id,
        order.venue_order_id,
        order.type.conditional,
        order.symbol,
        order.position_id,
        order.status.final,
        _encode(order),
    )
    db.execute(
        """insert into orders values (?, ?, ?, ?, ?, ?, ?)
           on conflict (client_order_id) do update set
           venue_order_id = excluded.venue_order_id, final = excluded.final, payload = excluded.payload""",
        row,
    )


def _put_position(db: sqlite3.Connection, position: Position) -> None:
    row = (
        position.position_id,
        position.symbol,
        position.entry_price > 0,
        position.closed_ms,
        _encode(position),
    )
    db.execute("insert or replace into positions values (?, ?, ?, ?, ?)", row)


def _put_holding(db: sqlite3.Connection, symbol: str, quantity: Decimal, cost: Decimal) -> None:
    if quantity:
        row = (symbol, str(quantity), str(cost))
        db.execute("insert or replace into holdings values (?, ?, ?)", row)
    else:
        db.execute("delete from holdings where symbol = ?", (symbol,))


def _add(db: sqlite3.Connection, name: str, amount: Decimal) -> None:
    row = db.execute("select amount from totals where name = ?", (name,)).fetchone()
    total = (Decimal(row[0]) if row else Decimal(0)) + amount
    db.execute("insert or replace into totals values (?, ?)", (name, str(total)))
