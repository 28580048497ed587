"""What survives a simulated crash on its host: state, archive and candles.

State is the daemon's own SQLite store on a database in memory that outlives the process. The archive holds
what `put` returned for, and may hold what it was about to return for. Where two hosts share a database
(`database.py`), a disk holds the archive and candles of one of them.
"""

import asyncio
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from service.records import Order, Record
from service.store import sqlite
from service.store.rows import to_order
from service.store.turns import Turns

NO_THREADS = ThreadPoolExecutor(max_workers=1)  # never used: a virtual loop runs calls itself


class MemoryArchive:
    """The Archive port in memory; each put is durable on return."""

    def __init__(self, identity: str, records: dict[str, list[Record]]) -> None:
        self.identity = identity
        self._records = records
        self._put = 0

    async def put(self, stream: str, record: Record) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._records.setdefault(stream, []).append, record)
        self._put += 1

    def sequence(self, stream: str) -> int:
        return len(self._records.get(stream, ()))

    @property
    def writable(self) -> bool:
        return True

    @property
    def archived(self) -> Mapping[str, int]:
        return {stream: len(records) for stream, records in self._records.items()}

    def flush_early(self, early: bool) -> None:
        """Everything is."""


class Disk:
    """One data directory. Args: database: that of all hosts, where they share one."""

    def __init__(self, directory: Path, database: sqlite3.Connection | None = None) -> None:
        self.directory = directory
        self.database = sqlite.connect(Path(":memory:")) if database is None else database
        self.records: dict[str, list[Record]] = {}
        self.database.execute("create temp table if not exists order_states (payload blob)")
        for change in ("insert", "update"):
            self.database.execute(
                f"""create temp trigger if not exists after_{change} after {change} on orders
                    begin insert into order_states values (new.payload); end"""
            )

    def order_states(self) -> list[Order]:
        """Every state of every order that was ever durable."""
        return [to_order(raw) for (raw,) in self.database.execute("select payload from order_states")]

    def store(self) -> sqlite.SqliteStore:
        return sqlite.SqliteStore(Turns(self.database, NO_THREADS), Path("state"))

    def archive(self) -> MemoryArchive:
        return MemoryArchive(self.directory.name, self.records)

    def knows_order(self, client_order_id: str) -> bool:
        """Whether an order of that id is durable."""
        sql = "select 1 from orders where client_order_id = ?"
        return self.database.execute(sql, (client_order_id,)).fetchone() is not None

    def order_status(self, client_order_id: str) -> str:
        """What the store says of an order, "" when it does not know it."""
        sql = "select payload from orders where client_order_id = ?"
        row = self.database.execute(sql, (client_order_id,)).fetchone()
        return str(msgspec.json.decode(row[0])["status"]) if row else ""

    def close(self) -> None:
        self.database.close()
