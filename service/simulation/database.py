"""The database that two simulated daemons share, as PostgreSQL keeps it: the lease's row and fenced writes.

Between a daemon and it lies a network that fails for one or for both. What was sent is executed whether its
sender still lives or not, and an answer may be lost after its effect. Connections, their order of work and
their patience are the daemon's own `Link`.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from service.errors import LeaseLost, StateConflict
from service.records import Adjustment, Fill
from service.simulation.disk import NO_THREADS
from service.simulation.process import Gone, Process
from service.simulation.world import World
from service.store import sqlite
from service.store.postgres_link import CONNECT_LIMIT_S, Link
from service.store.turns import Turns, Work

Result = TypeVar("Result")

FASTEST_S, SLOWEST_S = 0.000_2, 0.004
"""One way."""
URL = "postgresql://database/perpd"


class Cut(msgspec.Struct, frozen=True):
    """A network that fails. `silent`: what is sent vanishes; otherwise connections break at once."""

    silent: bool


class SharedDatabase:
    """The database itself. `on_write(epoch)` is told of each transaction that wrote."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connection = sqlite.connect(Path(":memory:"))
        self.epoch = 0
        self.holder = ""
        self.expires_s = float("-inf")
        self.taken_s = float("-inf")
        self.fenced = 0  # writes that were refused
        self.on_write: Callable[[int], None] = lambda epoch: None
        self._cuts: dict[str, Cut] = {}
        self._mended_s: dict[str, float] = {}
        self._open: set[Connection] = set()

    # The row

    def take(self, holder: str, lease_s: float) -> tuple[int | None, str]:
        now_s = self.world.now_s
        if self.expires_s > now_s:
            return None, self.holder
        self.epoch += 1
        self.holder, self.taken_s, self.expires_s = holder, now_s, now_s + lease_s
        self.world.note("lease", f"{holder} {self.epoch}")
        return self.epoch, ""

    def renew(self, epoch: int, lease_s: float) -> bool:
        if epoch == self.epoch:
            self.expires_s = self.world.now_s + lease_s
        return epoch == self.epoch

    def release(self, epoch: int) -> None:
        if epoch == self.epoch:
            self.expires_s = self.world.now_s

    def holds(self, epoch: int) -> bool:
        """Whether the lease of this epoch is valid now."""
        return epoch == self.epoch and self.world.now_s < self.expires_s

    def write(self, epoch: int, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """One transaction, fenced. Raises LeaseLost: the epoch is no longer the row's."""
        db = self.connection
        db.execute("begin immediate")
        try:
            self.fence(epoch)
            result = change(db)
            db.execute("commit")
        except BaseException:
            db.execute("rollback")
            raise
        self.on_write(epoch)
        return result

    def fence(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.fenced += 1
            raise LeaseLost("database: another perpd took the lease over; nothing was written")

    # The network

    def cut(self, host: str, cut: Cut) -> None:
        self._cuts[host] = cut
        if not cut.silent:
            for connection in [one for one in self._open if one.host == host]:
                connection.terminate()

    def mend(self, *hosts: str) -> None:
        """For these hosts, or for all."""
        for host in hosts or tuple(self._cuts):
            if self._cuts.pop(host, None) is not None:
                self._mended_s[host] = self.world.now_s

    def cut_from(self, host: str) -> Cut | None:
        return self._cuts.get(host)

    def was_away(self, host: str, within_s: float) -> bool:
        """Whether a host cannot reach it, or could not a moment ago."""
        mended_s = self._mended_s.get(host, float("-inf"))
        return host in self._cuts or self.world.now_s - mended_s < within_s

    async def connect(self, process: Process, host: str) -> "Connection":
        connection = Connection(self, process, host)
        await connection.call(lambda: None, effect=False)
        self._open.add(connection)
        return connection

    def forget(self, connection: "Connection") -> None:
        self._open.discard(connection)

    def close(self) -> None:
        self.connection.close()


class Connection:
    """One connection of one process; what `Link` sees of asyncpg's."""

    def __init__(self, database: SharedDatabase, process: Process, host: str) -> None:
        self.host = host
        self._database = database
        self._world = database.world
        self._process = process
        self._closed = False

    def is_closed(self) -> bool:
        return self._closed

    def terminate(self) -> None:
        self._closed = True
        self._database.forget(self)

    async def close(self, timeout: float) -> None:
        self.terminate()

    async def call(self, work: Callable[[], Result], *, effect: bool = True) -> Result:
        """Have work done at the database. Raises what it raises; OSError: the connection broke.

        Args: effect: it may change something, so death and loss may come between the effect and the answer.
        """
        future: asyncio.Future[Result] = self._process.loop.create_future()
        self._world.later(self._delay_s(), lambda: self._arrive(future, work, effect=effect))
        return await future

    def _delay_s(self) -> float:
        return self._world.random.uniform(FASTEST_S, SLOWEST_S)

    def _arrive(self, future: asyncio.Future[Result], work: Callable[[], Result], *, effect: bool) -> None:
        process = self._process
        if self._lost(future):
            return
        if effect and process.alive:
            process.writes += 1
            if process.writes == process.die_before_write:
                process.doomed = "before a write"
                process.die(process.doomed)
                return
        result: Any = None
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  a database hands every error to its caller
            failed = error
        if effect and process.alive and process.writes == process.die_after_write:
            process.doomed = "after a write"
            process.die(process.doomed)
            return
        if effect:
            self._world.later(self._delay_s(), lambda: self._answer(future, result, failed))
        else:
            self._answer(future, result, failed)

    def _answer(self, future: asyncio.Future[Result], result: Result, failed: Exception | None) -> None:
        if not self._process.alive or self._lost(future) or future.done():
            return
        if failed is not None:
            future.set_exception(failed)
        else:
            future.set_result(result)

    def _lost(self, future: asyncio.Future[Result]) -> bool:
        cut = self._database.cut_from(self.host)
        if cut is None and not self._closed:
            return False
        if (cut is None or not cut.silent) and self._process.alive and not future.done():
            future.set_exception(ConnectionResetError("the database is gone"))
        return True


class SimulatedLink(Link):
    """The daemon's own connection that comes back by itself, to the simulated database."""

    def __init__(self, database: SharedDatabase, process: Process, host: str) -> None:
        super().__init__(URL, "perpd")
        self._database = database
        self._process = process
        self._host = host

    async def run(self, work: Callable[[Any], Awaitable[Result]]) -> Result:
        if not self._process.alive:
            raise Gone
        return await super().run(work)

    async def close(self) -> None:
        if not self._process.alive:
            raise Gone
        await super().close()

    async def _connect(self) -> Connection:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            return await self._database.connect(self._process, self._host)


class SharedLeaseRow:
    """A `LeaseRow` of the shared database."""

    def __init__(self, database: SharedDatabase, link: Link) -> None:
        self._database = database
        self._link = link
        self.where = link.where

    async def take(self, holder: str, lease_s: float) -> tuple[int | None, str]:
        found = await self._link.run(lambda db: db.call(lambda: self._database.take(holder, lease_s)))
        return cast(tuple[int | None, str], found)

    async def renew(self, epoch: int, lease_s: float) -> bool:
        return bool(await self._link.run(lambda db: db.call(lambda: self._database.renew(epoch, lease_s))))

    async def release(self, epoch: int) -> None:
        await self._link.run(lambda db: db.call(lambda: self._database.release(epoch)))

    async def holder(self) -> str:
        return str(await self._link.run(lambda db: db.call(lambda: self._database.holder, effect=False)))


class FencedStore(sqlite.SqliteStore):
    """The daemon's SQLite store, whose calls go over a link and whose writes are bound to an epoch."""

    def __init__(self, database: SharedDatabase, link: Link, epoch: int) -> None:
        super().__init__(Turns(database.connection, NO_THREADS), Path("database"))
        self._database = database
        self._link = link
        self._epoch = epoch
        # As in PostgreSQL's store: booked in a transaction whose end was not heard of, it was by us.
        self._in_doubt: set[tuple[str, ...]] = set()
        self._key: tuple[str, ...] = ()  # of what the write that begins next books

    async def save_fill(self, fill: Fill, **booking: Any) -> bool:
        self._key = ("fill", fill.symbol, fill.trade_id)
        return await super().save_fill(fill, **booking)

    async def save_adjustment(
        self, adjustment: Adjustment, *, holding: tuple[str, Decimal, Decimal] | None = None
    ) -> bool:
        self._key = ("adjustment", adjustment.adjustment_id)
        return await super().save_adjustment(adjustment, holding=holding)

    async def _read(self, sql: str, *arguments: object, put_off: bool = False) -> list[tuple[Any, ...]]:
        def fetch() -> list[tuple[Any, ...]]:
            return self._database.connection.execute(sql, arguments).fetchall()

        return cast(list[tuple[Any, ...]], await self._link.run(lambda db: db.call(fetch, effect=False)))

    async def _write(self, change: Work[Result], *, put_off: bool = False) -> Result:
        key, self._key = self._key, ()

        def transaction() -> Result:
            result = self._database.write(self._epoch, change)
            if key and result:
                self._in_doubt.add(key)
            return result

        try:
            result = cast(Result, await self._link.run(lambda db: db.call(transaction)))
        except sqlite3.IntegrityError as error:
            raise StateConflict(f"database: {error}") from error
        if key in self._in_doubt:
            self._in_doubt.discard(key)
            return cast(Result, True)
        return result
