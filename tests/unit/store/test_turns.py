import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from service.store import turns
from service.store.turns import Turns


class Table:
    """One table in memory behind Turns, and what was said to SQLite."""

    def __init__(self, made: Turns, said: list[str], busy: threading.Event) -> None:
        self.turns = made
        self.said = said
        self._busy = busy

    async def add(self, number: int, *, put_off: bool = False) -> int:
        def work(db: sqlite3.Connection) -> int:
            db.execute("insert into numbers values (?)", (number,))
            return number

        return await self.turns.make(work, writes=True, put_off=put_off)

    async def read(self, *, put_off: bool = False) -> list[int]:
        sql = "select number from numbers order by rowid"
        return await self.turns.make(
            lambda db: [row[0] for row in db.execute(sql)], writes=False, put_off=put_off
        )

    def occupy(self) -> "asyncio.Task[None]":
        """Keep the thread until `let_go`."""

        async def wait() -> None:
            await self.turns.make(lambda db: self._busy.wait(5), writes=False)

        return asyncio.create_task(wait())

    def let_go(self) -> None:
        self._busy.set()

    def commits(self) -> int:
        return self.said.count("commit")


@asynccontextmanager
async def opened(**words) -> AsyncIterator[Table]:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.execute("create table numbers (number integer unique)")
    said: list[str] = []
    db.set_trace_callback(said.append)
    with ThreadPoolExecutor(1) as thread:
        made = Turns(db, thread, **words)
        yield Table(made, said, threading.Event())
        made.finish()
    db.close()


async def begun(*calls) -> list["asyncio.Task"]:
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


async def test_writes_that_wait_for_the_thread_share_one_transaction():
    async with opened() as table:
        table.occupy()
        tasks = await begun(*(table.add(n) for n in range(5)))
        table.let_go()
        assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
        assert await table.read() == [0, 1, 2, 3, 4]
        assert table.commits() == 1


async def test_a_write_that_fails_leaves_those_that_share_its_turn_unharmed():
    async with opened() as table:
        table.occupy()
        tasks = await begun(table.add(1), table.add(2), table.add(1), table.add(3))
        table.let_go()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[:2] == [1, 2]
        assert isinstance(outcomes[2], sqlite3.IntegrityError)
        assert outcomes[3] == 3
        assert await table.read() == [1, 2, 3]


async def test_a_turn_whose_commit_fails_is_made_again_call_by_call():
    async with opened() as table:
        kin = "create table kin (n references numbers (number) deferrable initially deferred)"
        await table.turns.make(lambda db: db.execute(kin), writes=True)
        await table.turns.make(lambda db: db.execute("pragma foreign_keys = on"), writes=False)
        table.occupy()
        orphan = table.turns.make(lambda db: db.execute("insert into kin select 7"), writes=True)
        tasks = await begun(table.add(1), orphan, table.add(2))
        table.let_go()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert (outcomes[0], outcomes[2]) == (1, 2)
        assert isinstance(outcomes[1], sqlite3.Error)
        assert await table.read() == [1, 2]


async def test_a_read_sees_the_writes_made_before_it_and_only_those():
    async with opened() as table:
        table.occupy()
        tasks = await begun(table.read(), table.add(1), table.read(), table.add(2))
        table.let_go()
        first, _, second, _ = await asyncio.gather(*tasks)
        assert (first, second) == ([], [1])


async def test_no_call_is_answered_before_its_transaction_is_committed():
    async with opened() as table:
        at_answer: list[int] = []

        async def add(number: int) -> None:
            await table.add(number)
            at_answer.append(table.commits())

        table.occupy()
        tasks = await begun(add(1), add(2))
        table.let_go()
        await asyncio.gather(*tasks)
        assert at_answer == [1, 1]


async def test_a_call_that_is_cancelled_while_it_waits_is_not_made():
    async with opened() as table:
        table.occupy()
        gone, kept = await begun(table.add(1), table.add(2))
        gone.cancel()
        await asyncio.sleep(0)
        table.let_go()
        await kept
        assert await table.read() == [2]


async def test_what_can_wait_comes_after_calls_made_later_and_keeps_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(turns, "QUIET_S", 0.2)
    monkeypatch.setattr(turns, "LATEST_S", 60.0)
    async with opened() as table:
        await table.add(1)
        off = await begun(table.add(2, put_off=True), table.read(put_off=True), table.add(3, put_off=True))
        await table.add(4)
        assert await table.read() == [1, 4]
        _, seen, _ = await asyncio.gather(*off)
        assert seen == [1, 4, 2]
        assert await table.read() == [1, 4, 2, 3]


async def test_what_can_wait_does_not_wait_when_all_is_quiet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "QUIET_S", 0.0)
    monkeypatch.setattr(turns, "LATEST_S", 60.0)
    async with opened() as table:
        assert await table.add(1, put_off=True) == 1


async def test_what_can_wait_is_made_in_time_however_busy_the_store_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "QUIET_S", 0.001)
    monkeypatch.setattr(turns, "LATEST_S", 0.02)
    async with opened() as table:
        await table.add(0)
        (off,) = await begun(table.add(-1, put_off=True))
        count = 0
        async with asyncio.timeout(5):
            while not off.done():  # never a millisecond without a call
                count += 1
                await table.add(count)
        assert await off == -1


async def test_nothing_is_put_off_beyond_the_end():
    async with opened() as table:
        await table.add(1)
        (off,) = await begun(table.add(2, put_off=True))
        table.turns.finish()
        assert await off == 2


async def test_upkeep_is_done_in_an_idle_moment_after_enough_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "IDLE_S", 0.01)
    kept_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    at: list[int] = []

    def upkeep(db: sqlite3.Connection) -> None:
        at.append(db.execute("select count(*) from numbers").fetchone()[0])
        loop.call_soon_threadsafe(kept_up.set)

    async with opened(upkeep=upkeep, upkeep_after=3) as table:
        for number in range(3):
            await table.add(number)
            assert not at, "not while calls come, nor before enough of them wrote"
        async with asyncio.timeout(5):
            await kept_up.wait()
        assert at == [3]


async def test_what_cannot_begin_is_told_to_all_that_wait_at_once():
    async with opened() as table:
        holding = table.occupy()
        await asyncio.sleep(0)
        adding = [asyncio.create_task(table.add(number)) for number in range(5)]
        reading = asyncio.create_task(table.read())
        await asyncio.sleep(0)
        original, table.turns._connection = table.turns._connection, Locked(table.turns._connection)
        locked = table.turns._connection
        table.let_go()
        answers = await asyncio.gather(*adding, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["database is locked"] * 5
        assert locked.tried == 1
        assert await reading == []
        table.turns._connection = original
        await table.add(9)
        await holding


class Locked:
    """A connection whose transactions cannot begin."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.tried = 0

    def execute(self, sql: str, *arguments):
        if sql == "begin immediate":
            self.tried += 1
            raise sqlite3.OperationalError("database is locked")
        return self._db.execute(sql, *arguments)

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction


async def test_whatever_ends_a_call_the_others_of_its_turn_and_later_ones_go_on():
    def leave(db: sqlite3.Connection) -> None:
        raise SystemExit("left")

    async with opened() as table:
        holding = table.occupy()
        await asyncio.sleep(0)
        first = asyncio.create_task(table.add(1))
        leaving = asyncio.create_task(collected(table.turns.make(leave, writes=True)))
        last = asyncio.create_task(table.add(2))
        await asyncio.sleep(0)
        table.let_go()
        assert (await first, await last) == (1, 2)
        assert isinstance(await leaving, SystemExit)
        assert await table.add(3) == 3
        await holding


async def collected(awaitable) -> BaseException | None:
    try:
        await awaitable
    except BaseException as error:  # noqa: BLE001
        return error
    return None


async def test_nothing_is_put_off_after_the_end_either():
    async with opened() as table:
        table.turns.finish()
        table.turns._asked_s = asyncio.get_running_loop().time()
        async with asyncio.timeout(5):
            assert await table.add(1, put_off=True) == 1
