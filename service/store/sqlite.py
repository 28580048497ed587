"""Durable state in one SQLite file: WAL, one writer thread, each call whole or not at all.

`synchronous=FULL`: a call that returned survives power loss. One dedicated thread owns the
connection, so no call blocks the loop, none meets a lock, and calls take effect in the order made, but
for those that no order waits for: see `turns`.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import structlog

from service.errors import DataDirectoryUnusable, SchemaUnknown, StateConflict, StateDamaged
from service.records import (
    Adjustment,
    Decision,
    Fill,
    ModelEntry,
    ModelRole,
    Order,
    Position,
    Record,
    ShadowPosition,
    Signal,
)
from service.store import rows, wal
from service.store.schema import SQLITE
from service.store.turns import Turns, Work

log = structlog.get_logger("store.sqlite")

Result = TypeVar("Result")

BUSY_MS = 5_000
WORK_LIMIT_S = 2.0


@asynccontextmanager
async def open_sqlite(path: Path) -> AsyncIterator["SqliteStore"]:
    """Open, check and migrate the store; every call made inside the block is finished when it ends.

    Raises: DataDirectoryUnusable: not writable; StateDamaged; SchemaUnknown.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
    loop = asyncio.get_running_loop()
    try:
        connection = await loop.run_in_executor(thread, connect, path)
        try:
            await loop.run_in_executor(thread, wal.lengthen, connection, path)
            turns = Turns(connection, thread, upkeep=wal.fold, upkeep_after=wal.FOLD_AFTER)
            try:
                yield SqliteStore(turns, path)
            finally:
                turns.finish()
        finally:
            await asyncio.shield(loop.run_in_executor(thread, connection.close))
    finally:
        thread.shutdown(wait=True)


class SqliteStore:
    """StateStore on SQLite.

    Raises: DataDirectoryUnusable: the file cannot be written; StateConflict: a constraint refuses it.
    """

    def __init__(self, turns: Turns, path: Path) -> None:
        self._turns = turns
        self._path = path
        # Booked in a transaction that was not waited for: found booked later, it was by us.
        self._in_doubt: set[tuple[str, ...]] = set()

    async def save_order(self, order: Order) -> None:
        await self._write(lambda db: _put_order(db, order))

    async def open_orders(self) -> list[Order]:
        found = await self._read("select payload from orders where final = 0")
        return [rows.to_order(row[0]) for row in found]

    async def order(self, client_order_id: str) -> Order | None:
        found = await self._read("select payload from orders where client_order_id = ?", client_order_id)
        return rows.to_order(found[0][0]) if found else None

    async def save_fill(
        self,
        fill: Fill,
        *,
        realised_pnl: Decimal,
        fee: Decimal,
        quantity: Decimal,
        cost: Decimal,
        position: Position | None = None,
        cooldown_until_ms: int = 0,
    ) -> bool:
        def write(db: sqlite3.Connection) -> None:
            _put_outbox(db, fill)
            _add(db, "realised_pnl", realised_pnl)
            _add(db, "fees", fee)
            _put_holding(db, fill.symbol, quantity, cost)
            if position is not None:
                _put_position(db, position, cooldown_until_ms)

        sql = "insert or ignore into fills values (?, ?, ?, ?, ?)"
        return await self._book(("fill", fill.symbol, fill.trade_id), sql, rows.fill_row(fill), write)

    async def fills(self, client_order_id: str) -> list[Fill]:
        found = await self._read(
            "select payload from fills where client_order_id = ? order by filled_ms", client_order_id
        )
        return [rows.to_fill(row[0]) for row in found]

    async def save_position(self, position: Position, *, cooldown_until_ms: int = 0) -> None:
        await self._write(lambda db: _put_position(db, position, cooldown_until_ms))

    async def save_intent(self, position: Position, order: Order) -> None:
        def write(db: sqlite3.Connection) -> None:
            _put_position(db, position)
            _put_order(db, order)

        await self._write(write)

    async def position(self, position_id: str) -> Position | None:
        found = await self._read("select payload from positions where position_id = ?", position_id)
        return rows.to_position(found[0][0]) if found else None

    async def open_positions(self) -> list[Position]:
        found = await self._read("select payload from positions where closed_ms = 0")
        return [rows.to_position(row[0]) for row in found]

    async def closed_positions(self, limit: int) -> list[Position]:
        found = await self._read(
            """select payload from positions where closed_ms > 0 and traded = 1
               order by closed_ms desc, position_id desc limit ?""",
            limit,
        )
        return [rows.to_position(row[0]) for row in found]

    async def save_shadows(self, shadows: Sequence[ShadowPosition]) -> None:
        kept = rows.shadow_rows(shadows)
        newest_ms = max((s.closed_ms for s in shadows), default=0)

        def write(db: sqlite3.Connection) -> None:
            db.executemany("insert or replace into shadows values (?, ?, ?)", kept)
            _put_outbox(db, *shadows)
            oldest_ms = newest_ms - rows.SHADOWS_KEPT_MS
            db.execute("delete from shadows where closed_ms between 1 and ?", (oldest_ms,))

        await self._write(write, put_off=True)

    async def open_shadows(self) -> list[ShadowPosition]:
        found = await self._read("select payload from shadows where closed_ms = 0", put_off=True)
        return [rows.to_shadow(row[0]) for row in found]

    async def save_signal_decided(
        self, signals: Sequence[tuple[Signal, Decision]], shadows: Sequence[ShadowPosition] = ()
    ) -> None:
        decided = rows.decided_rows(signals)
        kept = rows.shadow_rows(shadows)
        newest_ms = max((closed_ms for _, closed_ms in decided), default=0)

        def write(db: sqlite3.Connection) -> None:
            db.executemany("insert or ignore into decided values (?, ?)", decided)
            db.executemany("insert or ignore into shadows values (?, ?, ?)", kept)
            oldest_ms = newest_ms - rows.DECIDED_KEPT_MS
            db.execute("delete from decided where candle_close_ms < ?", (oldest_ms,))

        await self._write(write)

    async def decided_since(self, candle_close_ms: int) -> set[str]:
        found = await self._read("select signal_id from decided where candle_close_ms >= ?", candle_close_ms)
        return {row[0] for row in found}

    async def save_adjustment(
        self, adjustment: Adjustment, *, holding: tuple[str, Decimal, Decimal] | None = None
    ) -> bool:
        def write(db: sqlite3.Connection) -> None:
            _put_outbox(db, adjustment)
            _add(db, adjustment.total, adjustment.amount)
            if holding is not None:
                _put_holding(db, *holding)

        sql = "insert or ignore into adjustments values (?, ?, ?)"
        key = ("adjustment", adjustment.adjustment_id)
        return await self._book(key, sql, rows.adjustment_row(adjustment), write)

    async def unarchived(self, stream: str) -> list[Record]:
        sql = "select payload from outbox where stream = ? order by name"
        found = await self._read(sql, stream, put_off=True)
        return [rows.from_outbox(stream, row[0]) for row in found]

    async def archived(self, records: Sequence[tuple[str, Record]]) -> None:
        sql = "delete from outbox where name = ? and payload = ?"
        if gone := rows.outbox_marks(records):
            await self._write(lambda db: _execute_many(db, sql, gone), put_off=True)

    async def get_value(self, key: str) -> str | None:
        found = await self._read("select value from settings where name = ?", key)
        return str(found[0][0]) if found else None

    async def set_value(self, key: str, value: str) -> None:
        await self._write(
            lambda db: _execute(db, "insert or replace into settings values (?, ?)", key, value)
        )

    async def ledger_totals(self) -> dict[str, Decimal]:
        return rows.ledger_totals(await self._read("select name, amount from totals"))

    async def holdings(self) -> dict[str, tuple[Decimal, Decimal]]:
        found = await self._read("select symbol, quantity, cost from holdings")
        return {symbol: (Decimal(quantity), Decimal(cost)) for symbol, quantity, cost in found}

    async def bans(self) -> dict[str, int]:
        return dict(await self._read("select host, until_ms from bans"))

    async def save_ban(self, host: str, until_ms: int) -> None:
        sql = "insert or replace into bans values (?, ?)"
        await self._write(lambda db: _execute(db, sql, host, until_ms))

    async def cooldowns(self) -> dict[str, int]:
        return dict(await self._read("select symbol, until_ms from cooldowns"))

    async def models(self) -> list[ModelEntry]:
        found = await self._read("select payload from models order by created_ms desc, name")
        return [rows.to_model(row[0]) for row in found]

    async def save_model(self, entry: ModelEntry) -> None:
        def write(db: sqlite3.Connection) -> None:
            if entry.role is ModelRole.CHAMPION:
                sql = "select payload from models where role = 'champion' and name <> ?"
                for (payload,) in db.execute(sql, (entry.name,)).fetchall():
                    _put_model(db, rows.retired(rows.to_model(payload)))
            _put_model(db, entry)

        await self._write(write)

    async def prune(self, now_ms: int) -> int:
        ended_ms = now_ms - rows.ENDED_KEPT_MS
        deleted = await self._write(lambda db: _prune_passed(db, now_ms, ended_ms), put_off=True)
        while some := await self._write(lambda db: _prune_ended(db, ended_ms), put_off=True):
            deleted += some
        return deleted

    async def next_epoch(self) -> int:
        """One more than the run before: the fencing token of a store that one process can hold."""

        def write(db: sqlite3.Connection) -> int:
            db.execute(
                """insert into lease values ('perpd', 1)
                   on conflict (name) do update set epoch = epoch + 1"""
            )
            return int(db.execute("select epoch from lease").fetchone()[0])

        return await self._write(write)

    async def _book(
        self, key: tuple[str, ...], sql: str, row: Sequence[Any], write: Callable[[sqlite3.Connection], None]
    ) -> bool:
        """Insert a row once, and with it what it changes. True when it was booked by us, now or in doubt."""

        def change(db: sqlite3.Connection) -> bool:
            if db.execute(sql, row).rowcount == 0:
                return key in self._in_doubt
            self._in_doubt.add(key)
            write(db)
            return True

        booked = await self._write(change)
        self._in_doubt.discard(key)
        return booked

    async def _read(self, sql: str, *arguments: object, put_off: bool = False) -> list[tuple[Any, ...]]:
        return await self._run(lambda db: db.execute(sql, arguments).fetchall(), put_off=put_off)

    async def _write(self, change: Work[Result], *, put_off: bool = False) -> Result:
        return await self._run(change, writes=True, put_off=put_off)

    async def _run(self, work: Work[Result], *, writes: bool = False, put_off: bool = False) -> Result:
        try:
            async with asyncio.timeout(None if put_off else WORK_LIMIT_S):
                return await self._turns.make(work, writes=writes, put_off=put_off)
        except TimeoutError as error:
            # A disk that hangs. What was begun may still become durable; nobody's stop waits for it.
            words = f"{self._path}: the disk takes longer than {WORK_LIMIT_S:g} s"
            raise DataDirectoryUnusable(words) from error
        except sqlite3.IntegrityError as error:
            raise StateConflict(f"{self._path}: {error}") from error
        except sqlite3.OperationalError as error:
            raise DataDirectoryUnusable(f"{self._path}: {error}; free space or check permissions") from error
        except sqlite3.DatabaseError as error:
            raise StateDamaged(f"{self._path}: is damaged ({error})") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open, check and migrate a state file. Blocks. Raises as `open_sqlite` does."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise DataDirectoryUnusable(f"{path}: cannot be opened: {error}") from None
    try:
        db.execute(f"pragma busy_timeout = {BUSY_MS}")
        _check(db, path)
        wal.prepare(db)
        db.execute("pragma cache_size = -1024")  # KiB; every query is by key, so little is enough
        _migrate(db, path)
    except sqlite3.OperationalError as error:
        db.close()
        raise DataDirectoryUnusable(f"{path}: {error}; free space or check permissions") from None
    except sqlite3.Error as error:
        db.close()
        raise StateDamaged(f"{path}: is damaged ({error})") from None
    except DataDirectoryUnusable:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    found = db.execute("pragma integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise StateDamaged(f"{path}: is damaged ({found})")


def schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("pragma user_version").fetchone()[0])


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = schema_version(db)
    if version > len(SQLITE):
        raise SchemaUnknown(
            f"{path}: schema {version} was written by a newer perpd; this one knows up to {len(SQLITE)}"
        )
    for number, statements in enumerate(SQLITE[version:], start=version + 1):
        db.execute("begin immediate")
        try:
            for statement in statements:
                db.execute(statement)
            db.execute(f"pragma user_version = {number}")
            db.execute("commit")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("rollback")
            raise DataDirectoryUnusable(
                f"{path}: migration to schema {number} failed and was undone: {error}; free some space or "
                "check permissions, then start again"
            ) from error
    if version < len(SQLITE):
        log.info("state schema migrated", path=str(path), schema=len(SQLITE), before=version)


def _execute(db: sqlite3.Connection, sql: str, *arguments: object) -> None:
    db.execute(sql, arguments)


def _execute_many(db: sqlite3.Connection, sql: str, arguments: Sequence[tuple[str, ...]]) -> None:
    db.executemany(sql, arguments)


def _put_outbox(db: sqlite3.Connection, *records: Record) -> None:
    _execute_many(db, "insert or replace into outbox values (?, ?, ?)", rows.outbox_rows(records))


def _put_order(db: sqlite3.Connection, order: Order) -> None:
    db.execute(
        """insert into orders values (?, ?, ?, ?, ?, ?, ?, ?)
           on conflict (client_order_id) do update set
           venue_order_id = excluded.venue_order_id, final = excluded.final, payload = excluded.payload,
           matched_order_id = excluded.matched_order_id""",
        rows.order_row(order),
    )
    _put_outbox(db, order)


def _put_position(db: sqlite3.Connection, position: Position, cooldown_until_ms: int = 0) -> None:
    db.execute("insert or replace into positions values (?, ?, ?, ?, ?)", rows.position_row(position))
    _put_outbox(db, position)
    if cooldown_until_ms:
        db.execute(
            """insert into cooldowns values (?, ?)
               on conflict (symbol) do update set until_ms = max(until_ms, excluded.until_ms)""",
            (position.symbol, cooldown_until_ms),
        )


def _put_model(db: sqlite3.Connection, entry: ModelEntry) -> None:
    row = (entry.name, entry.created_ms, entry.role.value, rows.encode(entry))
    db.execute("insert or replace into models values (?, ?, ?, ?)", row)


def _prune_passed(db: sqlite3.Connection, now_ms: int, ended_ms: int) -> int:
    """What is over by its own time, and executions that belong to no order of ours."""
    statements = (
        ("delete from bans where until_ms < ?", now_ms),
        ("delete from cooldowns where until_ms < ?", now_ms),
        ("delete from adjustments where at_ms < ?", ended_ms),
        (
            """delete from fills where filled_ms < ? and not exists
               (select 1 from orders where orders.client_order_id = fills.client_order_id)""",
            ended_ms,
        ),
    )
    return sum(db.execute(sql, (limit_ms,)).rowcount for sql, limit_ms in statements)


def _prune_ended(db: sqlite3.Connection, ended_ms: int) -> int:
    """Some positions that closed before then, with all that belongs to them; 0 when none is left."""
    found = db.execute(
        """select position_id from positions
           where closed_ms between 1 and ? and (traded = 0 or closed_ms < coalesce(
               (select closed_ms from positions where closed_ms > 0 and traded = 1
                order by closed_ms desc limit 1 offset ?), 0))
             and not exists (select 1 from orders o
                             where o.position_id = positions.position_id and o.final = 0)
           limit ?""",
        (ended_ms, rows.CLOSED_KEPT - 1, rows.PRUNED_AT_ONCE),
    ).fetchall()
    deleted = 0
    for sql in (
        """delete from fills where client_order_id in
           (select client_order_id from orders where position_id = ?)""",
        "delete from orders where position_id = ?",
        "delete from positions where position_id = ?",
    ):
        deleted += max(db.executemany(sql, found).rowcount, 0)
    return deleted


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
