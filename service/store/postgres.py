"""Durable state in PostgreSQL: one connection, each call one transaction, fenced by the lease.

Each writing transaction first holds on to the lease's row of its own epoch. A perpd that was deposed finds
none and writes nothing; one that takes over waits for what was begun before.
"""

from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import structlog

from service.errors import LeaseLost, SchemaUnknown
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
from service.store import rows
from service.store.postgres_link import Connection, Link
from service.store.schema import POSTGRES

log = structlog.get_logger("store.postgres")

Result = TypeVar("Result")

FENCE = "select 1 from lease where name = 'perpd' and epoch = $1 for key share"
PUT_ORDER = """
insert into orders values ($1, $2, $3, $4, $5, $6, $7, $8)
on conflict (client_order_id) do update set
venue_order_id = excluded.venue_order_id, final = excluded.final, payload = excluded.payload,
matched_order_id = excluded.matched_order_id"""
PUT_POSITION = """
insert into positions values ($1, $2, $3, $4, $5)
on conflict (position_id) do update set
traded = excluded.traded, closed_ms = excluded.closed_ms, payload = excluded.payload"""
PUT_SHADOW = """
insert into shadows values ($1, $2, $3)
on conflict (position_id) do update set closed_ms = excluded.closed_ms, payload = excluded.payload"""
PUT_OUTBOX = """
insert into outbox values ($1, $2, $3)
on conflict (name) do update set payload = excluded.payload"""
PUT_HOLDING = """
insert into holdings values ($1, $2, $3)
on conflict (symbol) do update set quantity = excluded.quantity, cost = excluded.cost"""
PUT_COOLDOWN = """
insert into cooldowns values ($1, $2)
on conflict (symbol) do update set until_ms = greatest(cooldowns.until_ms, excluded.until_ms)"""
PUT_MODEL = """
insert into models values ($1, $2, $3, $4)
on conflict (name) do update set
created_ms = excluded.created_ms, role = excluded.role, payload = excluded.payload"""
ADD_TOTAL = """
insert into totals values ($1, $2)
on conflict (name) do update set amount = totals.amount + excluded.amount"""
ENDED = """
select position_id from positions p
where closed_ms between 1 and $1 and (not traded or closed_ms < coalesce(
    (select closed_ms from positions where closed_ms > 0 and traded
     order by closed_ms desc limit 1 offset $2), 0))
  and not exists (select 1 from orders o where o.position_id = p.position_id and not o.final)
limit $3"""


async def migrate(link: Link, migrations: Sequence[Sequence[str]] = POSTGRES) -> int:
    """Bring the schema up to date, each step a transaction; returns the version. Needs the lease.

    Raises: SchemaUnknown: it was written by a newer perpd.
    """

    async def step(db: Connection) -> int:
        async with db.transaction():
            version = int(await db.fetchval("select version from schema_version for update"))
            check_version(version, len(migrations), link.where)
            if version == len(migrations):
                return version
            for statement in migrations[version]:
                await db.execute(statement)
            await db.execute("update schema_version set version = $1", version + 1)
        log.info("state schema migrated", database=link.where, schema=version + 1)
        return version + 1

    while (version := await link.alone(step)) < len(migrations):  # however long it takes
        pass
    return version


async def kept_version(db: Connection, schema: str) -> int:
    """The version of what a schema of ours holds; 0 where there is nothing."""
    if await db.fetchval("select to_regclass($1)", f'"{schema}".schema_version') is None:
        return 0
    return int(await db.fetchval(f'select version from "{schema}".schema_version'))


async def fenced(db: Connection, epoch: int, where: str) -> None:
    """Hold on to the lease of this epoch until the transaction ends. Raises LeaseLost: another has it."""
    if await db.fetchval(FENCE, epoch) is None:
        raise LeaseLost(f"{where}: another perpd took the lease over; nothing was written")


def check_version(version: int, known: int, where: str) -> None:
    """Raises SchemaUnknown."""
    if version > known:
        raise SchemaUnknown(
            f"{where}: schema {version} was written by a newer perpd; this one knows up to {known}"
        )


class PostgresStore:
    """StateStore on PostgreSQL. Args: epoch: the fencing token of the lease under which it writes."""

    def __init__(self, link: Link, epoch: int) -> None:
        self._link = link
        self._epoch = epoch
        # Booked in a transaction whose end was not heard of: found booked later, it was by us.
        self._in_doubt: set[tuple[str, ...]] = set()

    async def save_order(self, order: Order) -> None:
        await self._write(lambda db: _put_order(db, order))

    async def open_orders(self) -> list[Order]:
        found = await self._read("select payload from orders where not final")
        return [rows.to_order(row[0]) for row in found]

    async def order(self, client_order_id: str) -> Order | None:
        found = await self._read("select payload from orders where client_order_id = $1", client_order_id)
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
        async def write(db: Connection) -> None:
            await _put_outbox(db, fill)
            await db.execute(ADD_TOTAL, "realised_pnl", realised_pnl)
            await db.execute(ADD_TOTAL, "fees", fee)
            await _put_holding(db, fill.symbol, quantity, cost)
            if position is not None:
                await _put_position(db, position, cooldown_until_ms)

        *columns, payload = rows.fill_row(fill)
        sql = "insert into fills values ($1, $2, $3, $4, $5) on conflict do nothing returning 1"
        return await self._book_once(("fill", fill.symbol, fill.trade_id), sql, columns, payload, write)

    async def fills(self, client_order_id: str) -> list[Fill]:
        found = await self._read(
            "select payload from fills where client_order_id = $1 order by filled_ms, trade_id",
            client_order_id,
        )
        return [rows.to_fill(row[0]) for row in found]

    async def save_position(self, position: Position, *, cooldown_until_ms: int = 0) -> None:
        await self._write(lambda db: _put_position(db, position, cooldown_until_ms))

    async def save_intent(self, position: Position, order: Order) -> None:
        async def write(db: Connection) -> None:
            await _put_position(db, position)
            await _put_order(db, order)

        await self._write(write)

    async def position(self, position_id: str) -> Position | None:
        found = await self._read("select payload from positions where position_id = $1", position_id)
        return rows.to_position(found[0][0]) if found else None

    async def open_positions(self) -> list[Position]:
        found = await self._read("select payload from positions where closed_ms = 0 order by position_id")
        return [rows.to_position(row[0]) for row in found]

    async def closed_positions(self, limit: int) -> list[Position]:
        found = await self._read(
            """select payload from positions where closed_ms > 0 and traded
               order by closed_ms desc, position_id collate "C" desc limit $1""",
            limit,
        )
        return [rows.to_position(row[0]) for row in found]

    async def save_shadows(self, shadows: Sequence[ShadowPosition]) -> None:
        kept = [(name, closed_ms, payload.decode()) for name, closed_ms, payload in rows.shadow_rows(shadows)]
        newest_ms = max((s.closed_ms for s in shadows), default=0)

        async def write(db: Connection) -> None:
            await db.executemany(PUT_SHADOW, kept)
            await _put_outbox(db, *shadows)
            oldest_ms = newest_ms - rows.SHADOWS_KEPT_MS
            await db.execute("delete from shadows where closed_ms between 1 and $1", oldest_ms)

        await self._write(write)

    async def open_shadows(self) -> list[ShadowPosition]:
        found = await self._read("select payload from shadows where closed_ms = 0 order by position_id")
        return [rows.to_shadow(row[0]) for row in found]

    async def save_signal_decided(
        self, signals: Sequence[tuple[Signal, Decision]], shadows: Sequence[ShadowPosition] = ()
    ) -> None:
        decided = rows.decided_rows(signals)
        kept = [(name, closed_ms, payload.decode()) for name, closed_ms, payload in rows.shadow_rows(shadows)]
        newest_ms = max((closed_ms for _, closed_ms in decided), default=0)

        async def write(db: Connection) -> None:
            await db.executemany("insert into decided values ($1, $2) on conflict do nothing", decided)
            await db.executemany("insert into shadows values ($1, $2, $3) on conflict do nothing", kept)
            oldest_ms = newest_ms - rows.DECIDED_KEPT_MS
            await db.execute("delete from decided where candle_close_ms < $1", oldest_ms)

        await self._write(write)

    async def decided_since(self, candle_close_ms: int) -> set[str]:
        found = await self._read("select signal_id from decided where candle_close_ms >= $1", candle_close_ms)
        return {row[0] for row in found}

    async def save_adjustment(
        self, adjustment: Adjustment, *, holding: tuple[str, Decimal, Decimal] | None = None
    ) -> bool:
        async def write(db: Connection) -> None:
            await _put_outbox(db, adjustment)
            await db.execute(ADD_TOTAL, adjustment.total, adjustment.amount)
            if holding is not None:
                await _put_holding(db, *holding)

        *columns, payload = rows.adjustment_row(adjustment)
        sql = "insert into adjustments values ($1, $2, $3) on conflict do nothing returning 1"
        return await self._book_once(("adjustment", adjustment.adjustment_id), sql, columns, payload, write)

    async def unarchived(self, stream: str) -> list[Record]:
        found = await self._read("select payload from outbox where stream = $1 order by name", stream)
        return [rows.from_outbox(stream, row[0]) for row in found]

    async def archived(self, records: Sequence[tuple[str, Record]]) -> None:
        sql = "delete from outbox where name = $1 and payload = $2"
        if gone := rows.outbox_marks(records):
            await self._write(lambda db: db.executemany(sql, gone))

    async def get_value(self, key: str) -> str | None:
        found = await self._read("select value from settings where name = $1", key)
        return str(found[0][0]) if found else None

    async def set_value(self, key: str, value: str) -> None:
        await self._execute(
            "insert into settings values ($1, $2) on conflict (name) do update set value = excluded.value",
            key,
            value,
        )

    async def ledger_totals(self) -> dict[str, Decimal]:
        return rows.ledger_totals(await self._read("select name, amount from totals"))

    async def holdings(self) -> dict[str, tuple[Decimal, Decimal]]:
        found = await self._read("select symbol, quantity, cost from holdings")
        return {symbol: (quantity, cost) for symbol, quantity, cost in found}

    async def bans(self) -> dict[str, int]:
        return dict(await self._read("select host, until_ms from bans"))

    async def save_ban(self, host: str, until_ms: int) -> None:
        await self._execute(
            "insert into bans values ($1, $2) on conflict (host) do update set until_ms = excluded.until_ms",
            host,
            until_ms,
        )

    async def cooldowns(self) -> dict[str, int]:
        return dict(await self._read("select symbol, until_ms from cooldowns"))

    async def models(self) -> list[ModelEntry]:
        found = await self._read('select payload from models order by created_ms desc, name collate "C"')
        return [rows.to_model(row[0]) for row in found]

    async def save_model(self, entry: ModelEntry) -> None:
        async def write(db: Connection) -> None:
            if entry.role is ModelRole.CHAMPION:
                sql = "select payload from models where role = 'champion' and name <> $1"
                for (payload,) in await db.fetch(sql, entry.name):
                    await _put_model(db, rows.retired(rows.to_model(payload)))
            await _put_model(db, entry)

        await self._write(write)

    async def prune(self, now_ms: int) -> int:
        ended_ms = now_ms - rows.ENDED_KEPT_MS
        deleted = await self._write(lambda db: _prune_passed(db, now_ms, ended_ms))
        while some := await self._write(lambda db: _prune_ended(db, ended_ms)):
            deleted += some
        return deleted

    async def _read(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        async def fetch(db: Connection) -> list[tuple[Any, ...]]:
            return [tuple(record) for record in await db.fetch(sql, *arguments)]

        return await self._link.run(fetch)

    async def _execute(self, sql: str, *arguments: object) -> None:
        await self._write(lambda db: db.execute(sql, *arguments))

    async def _write(self, change: Callable[[Connection], Awaitable[Result]]) -> Result:
        async def transaction(db: Connection) -> Result:
            async with db.transaction():
                await fenced(db, self._epoch, self._link.where)
                return await change(db)

        return await self._link.run(transaction)

    async def _book_once(
        self,
        key: tuple[str, ...],
        sql: str,
        columns: Sequence[object],
        payload: bytes,
        write: Callable[[Connection], Awaitable[None]],
    ) -> bool:
        """Insert the row and do what belongs to it. True when it is new, or ours whose answer was lost."""

        async def change(db: Connection) -> bool:
            if await db.fetchval(sql, *columns, payload.decode()) is None:
                return key in self._in_doubt
            self._in_doubt.add(key)
            await write(db)
            return True

        booked = await self._write(change)
        self._in_doubt.discard(key)
        return booked


async def _put_outbox(db: Connection, *records: Record) -> None:
    for row in rows.outbox_rows(records):
        await db.execute(PUT_OUTBOX, *row)


async def _put_order(db: Connection, order: Order) -> None:
    *columns, payload, matched = rows.order_row(order)
    await db.execute(PUT_ORDER, *columns, payload.decode(), matched)
    await _put_outbox(db, order)


async def _put_position(db: Connection, position: Position, cooldown_until_ms: int = 0) -> None:
    *columns, payload = rows.position_row(position)
    await db.execute(PUT_POSITION, *columns, payload.decode())
    await _put_outbox(db, position)
    if cooldown_until_ms:
        await db.execute(PUT_COOLDOWN, position.symbol, cooldown_until_ms)


async def _put_model(db: Connection, entry: ModelEntry) -> None:
    await db.execute(PUT_MODEL, entry.name, entry.created_ms, entry.role.value, rows.encode(entry).decode())


async def _put_holding(db: Connection, symbol: str, quantity: Decimal, cost: Decimal) -> None:
    if quantity:
        await db.execute(PUT_HOLDING, symbol, quantity, cost)
    else:
        await db.execute("delete from holdings where symbol = $1", symbol)


async def _prune_passed(db: Connection, now_ms: int, ended_ms: int) -> int:
    """What is over by its own time, and executions that belong to no order of ours."""
    statements = (
        ("delete from bans where until_ms < $1", now_ms),
        ("delete from cooldowns where until_ms < $1", now_ms),
        ("delete from adjustments where at_ms < $1", ended_ms),
        (
            """delete from fills where filled_ms < $1 and not exists
               (select 1 from orders where orders.client_order_id = fills.client_order_id)""",
            ended_ms,
        ),
    )
    return sum([_count(await db.execute(sql, limit_ms)) for sql, limit_ms in statements])


async def _prune_ended(db: Connection, ended_ms: int) -> int:
    """Some positions that closed before then, with all that belongs to them; 0 when none is left."""
    found = await db.fetch(ENDED, ended_ms, rows.CLOSED_KEPT - 1, rows.PRUNED_AT_ONCE)
    names = [row[0] for row in found]
    statements = (
        """delete from fills where client_order_id in
           (select client_order_id from orders where position_id = any($1))""",
        "delete from orders where position_id = any($1)",
        "delete from positions where position_id = any($1)",
    )
    return sum([_count(await db.execute(sql, names)) for sql in statements])


def _count(status: str) -> int:
    """Rows of a command's status, such as "DELETE 3"."""
    return int(status.rpartition(" ")[2])
