"""What only a database can do to the store: go away, come back, be newer, be full, be someone else's."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from service.check.database import state as state_check
from service.check.result import Verdict
from service.directory import market_name
from service.errors import LeaseHeld, LeaseLost, SchemaUnknown, StoreUnavailable
from service.records import Fill
from service.settings import Loaded, load
from service.store.holding import Holding, own_name
from service.store.opening import open_links, open_state, schema_name
from service.store.postgres import PostgresStore, migrate
from service.store.postgres_lease import PostgresLeaseRow
from service.store.schema import POSTGRES
from tests.market_seeds import MARKET_SEEDS
from tests.samples import FILL


def settings_for(url: str, lease_s: float = 30.0) -> Loaded:
    environment = {
        "DATABASE_URL": url,
        "PERPD_SIM__SEED": str(next(MARKET_SEEDS)),
        "PERPD_RUN__LEASE_S": str(lease_s),
    }
    return load(None, environment)


def place(loaded: Loaded) -> tuple[str, str]:
    return loaded.secrets.database_url, schema_name(market_name(loaded.settings))


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def book(store, fill: Fill = FILL) -> bool:
    return await store.save_fill(
        fill, realised_pnl=Decimal(2), fee=fill.fee, quantity=Decimal(1), cost=Decimal(100)
    )


@asynccontextmanager
async def administrating(loaded: Loaded) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        loaded.secrets.database_url,
        server_settings={"search_path": schema_name(market_name(loaded.settings))},
    )
    try:
        yield connection
    finally:
        await connection.close()


async def test_calls_go_on_over_a_crash_of_the_database_and_nothing_acknowledged_is_lost(
    own_postgres, tmp_path
):
    own_postgres.start()
    loaded = settings_for(own_postgres.url)
    written: list[int] = []
    refused = 0
    stop = asyncio.Event()

    async def load_it(store) -> None:
        nonlocal refused
        for number in itertools.count():
            if stop.is_set():
                return
            try:
                assert await book(store, Fill(**{**as_dict(FILL), "trade_id": str(number)}))
                written.append(number)
            except StoreUnavailable:
                refused += 1
                await asyncio.sleep(0.05)

    async with open_state(loaded, tmp_path) as state:
        working = asyncio.create_task(load_it(state.store))
        for _ in range(4):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
            await asyncio.to_thread(own_postgres.start)
        seen = len(written)
        await until(lambda: len(written) >= seen + 20)
        stop.set()
        await working
        assert len(await state.store.fills("pp-1")) == len(written)
        totals = await state.store.ledger_totals()
        assert totals["realised_pnl"] == 2 * len(written), "each fill moved the total once"
    print(f"{len(written)} fills booked over 4 crashes, {refused} calls refused")


def as_dict(fill: Fill) -> dict:
    return {name: getattr(fill, name) for name in fill.__struct_fields__}


async def test_a_fill_whose_commit_was_not_answered_is_ours_when_it_is_booked_again(postgres, tmp_path):
    loaded = settings_for(postgres.url)
    async with open_state(loaded, tmp_path) as state:
        link = state.store._link
        real = link.run
        lost_answers = 0

        async def answer_lost(work):
            nonlocal lost_answers
            result = await real(work)
            if lost_answers == 0:
                lost_answers += 1
                raise StoreUnavailable("the connection broke after the commit")
            return result

        link.run = answer_lost
        with pytest.raises(StoreUnavailable):
            await book(state.store)
        assert await book(state.store), "it was this daemon's own booking"
        assert not await book(state.store)
        assert (await state.store.ledger_totals())["realised_pnl"] == 2


async def test_a_database_that_is_away_is_refused_within_the_grace_and_then_at_once(own_postgres, tmp_path):
    own_postgres.start()
    async with open_state(settings_for(own_postgres.url), tmp_path) as state:
        await asyncio.to_thread(own_postgres.stop)
        with pytest.raises(StoreUnavailable):
            await state.store.set_value("k", "1")
        refusals = await asyncio.gather(
            *(state.store.set_value("k", str(n)) for n in range(100)), return_exceptions=True
        )
        assert all(isinstance(error, StoreUnavailable) for error in refusals)
        assert "connection" in str(refusals[-1]).lower() or "does not answer" in str(refusals[-1])
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: state.store._link._connection)  # it is tried in the background
        await state.store.set_value("k", "2")
        assert await state.store.get_value("k") == "2"


async def test_a_server_that_hangs_is_given_up_on(own_postgres, tmp_path, monkeypatch):
    monkeypatch.setattr("service.store.postgres_link.WORK_LIMIT_S", 0.2)
    own_postgres.start()
    async with open_state(settings_for(own_postgres.url), tmp_path) as state:
        with pytest.raises(StoreUnavailable):
            await state.store._link.run(lambda db: db.fetchval("select pg_sleep(60)"))
        assert await state.store.get_value("k") is None


async def test_a_newer_schema_is_refused(postgres, tmp_path):
    loaded = settings_for(postgres.url)
    async with open_state(loaded, tmp_path):
        pass
    async with administrating(loaded) as db:
        await db.execute("update schema_version set version = version + 1")
    with pytest.raises(SchemaUnknown, match="newer perpd") as told:
        async with open_state(loaded, tmp_path):
            pass
    assert told.value.exit_code == 73


async def test_a_migration_that_fails_half_way_leaves_the_schema_before_it(postgres):
    loaded = settings_for(postgres.url)
    async with open_links(*place(loaded), 9) as (
        link,
        _,
    ):
        await migrate(link)
        half = (*POSTGRES, ("create table half (n integer)", "create table orders (n integer)"))
        with pytest.raises(StoreUnavailable, match="already exists"):
            await migrate(link, half)
        assert await link.run(lambda db: db.fetchval("select version from schema_version")) == len(POSTGRES)
        assert await link.run(lambda db: db.fetchval("select to_regclass('half')")) is None


async def test_two_that_start_at_once_make_one_schema_and_one_of_them_holds_the_lease(postgres, tmp_path):
    loaded = settings_for(postgres.url)
    holding, release = asyncio.Event(), asyncio.Event()

    async def start() -> str:
        try:
            async with open_state(loaded, tmp_path) as state:
                holding.set()
                await release.wait()
                return f"held {state.lease.epoch}"
        except LeaseHeld as error:
            return str(error).partition(": ")[2].replace(own_name(), "one")

    starts = [asyncio.create_task(start()) for _ in range(2)]
    await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
    await holding.wait()
    release.set()
    assert sorted(await asyncio.gather(*starts)) == ["held 1", "one trades on it"]


async def test_of_many_who_take_the_first_lease_at_once_one_has_it_and_none_fails(postgres):
    where = place(settings_for(postgres.url))
    async with open_links(*where, 9) as (one, two), open_links(*where, 9) as (three, four):
        for _ in range(300):
            await one.run(lambda db: db.execute("delete from lease"))
            holders = [Holding(PostgresLeaseRow(link), 30.0) for link in (one, two, three, four)]
            tries = [holding.attempt(patient=False) for holding in holders]
            leases = [lease for lease, _ in await asyncio.gather(*tries) if lease is not None]
            assert [lease.epoch for lease in leases] == [1]


async def test_one_who_stands_by_takes_over_at_once_when_the_lease_is_given_back(postgres, tmp_path):
    loaded = settings_for(postgres.url, lease_s=600)
    seen: list[str] = []
    standing, taken = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def standing_by(holder: str) -> AsyncIterator[None]:
        seen.append(holder)
        standing.set()
        yield

    async def second() -> int:
        async with open_state(loaded, tmp_path, standing_by) as state:
            taken.set()
            return state.lease.epoch

    async with open_state(loaded, tmp_path):
        waiting = asyncio.create_task(second())
        await standing.wait()
        assert not taken.is_set()
    assert await waiting == 2
    assert "pid" in seen[0]


async def test_one_who_stands_by_waits_for_a_database_that_went_away(own_postgres, tmp_path):
    own_postgres.start()
    loaded = settings_for(own_postgres.url)
    standing = asyncio.Event()

    @asynccontextmanager
    async def standing_by(holder: str) -> AsyncIterator[None]:
        standing.set()
        yield

    async def second() -> int:
        async with open_state(loaded, tmp_path, standing_by) as state:
            return state.lease.epoch

    async with open_state(loaded, tmp_path):
        pass
    async with administrating(loaded) as db:
        await db.execute("update lease set holder = 'gone', expires = now() + interval '1 hour'")
    waiting = asyncio.create_task(second())
    await standing.wait()
    await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
    await asyncio.sleep(2.5)  # longer than the grace of a call
    await asyncio.to_thread(own_postgres.start)
    assert not waiting.done()
    async with administrating(loaded) as db:
        await db.execute("update lease set expires = now()")
    assert await waiting == 2


async def test_a_server_that_is_frozen_costs_one_call_its_limit_and_the_next_nothing(
    own_postgres, tmp_path, monkeypatch
):
    monkeypatch.setattr("service.store.postgres_link.WORK_LIMIT_S", 0.3)
    own_postgres.start()
    async with open_state(settings_for(own_postgres.url), tmp_path) as state:
        link = state.store._link
        link._grace_s = 0.2
        await state.store.set_value("k", "1")
        frozen = own_postgres.freeze()
        try:
            with pytest.raises(StoreUnavailable):
                await state.store.set_value("k", "2")
            attempt = link._connecting
            for _ in range(100):
                with pytest.raises(StoreUnavailable):
                    await state.store.set_value("k", "3")
            assert link._connecting is attempt, "one attempt to connect is under way, and nobody waits for it"
        finally:
            frozen()
        await until(lambda: link._connection)
        await state.store.set_value("k", "4")
        assert await state.store.get_value("k") == "4"


async def test_one_who_was_deposed_can_write_nothing(postgres, tmp_path):
    loaded = settings_for(postgres.url, lease_s=3)
    leases = []

    async def be_deposed() -> None:
        async with open_state(loaded, tmp_path) as state:
            leases.append(state.lease)
            await state.store.set_value("k", "mine")
            async with administrating(loaded) as db:
                await db.execute("update lease set epoch = epoch + 1, holder = 'b'")
            with pytest.raises(LeaseLost):
                await state.store.set_value("k", "too late")
            assert await state.store.get_value("k") == "mine"
            await asyncio.Event().wait()  # the keeper finds out and ends the block

    with pytest.raises(LeaseLost, match="b took the lease over"):
        await be_deposed()
    assert "took the lease over" in leases[0].may_send()


async def test_who_takes_over_waits_for_a_write_that_was_begun_before(postgres, tmp_path):
    """Otherwise the old holder's last write would land after the new one read the books."""
    loaded = settings_for(postgres.url)
    begun, finish = asyncio.Event(), asyncio.Event()

    async def slow(db) -> None:
        begun.set()
        await finish.wait()
        await db.execute("insert into settings values ('k', 'begun before')")

    async with open_links(*place(loaded), 9) as (
        link,
        other,
    ):
        await migrate(link)
        await link.run(lambda db: db.execute("insert into lease values ('perpd', 1, 'a', now())"))
        writing = asyncio.create_task(PostgresStore(link, 1)._write(slow))
        await begun.wait()
        taking = asyncio.create_task(
            other.run(lambda db: db.execute("update lease set epoch = 2 where expires <= clock_timestamp()"))
        )
        async with administrating(loaded) as db:
            while not await db.fetchval("select count(*) from pg_locks where not granted"):
                await db.execute("select pg_sleep(0.01)")
        assert not taking.done()
        finish.set()
        await asyncio.gather(writing, taking)
        assert await PostgresStore(link, 2).get_value("k") == "begun before"
        with pytest.raises(LeaseLost):
            await PostgresStore(link, 1).set_value("k", "too late")


async def test_a_holder_whose_database_is_away_stops_sending_and_goes_on_when_it_is_back(
    own_postgres, tmp_path: Path
):
    own_postgres.start()
    async with open_state(settings_for(own_postgres.url, lease_s=1.5), tmp_path) as state:
        assert state.lease.may_send() == ""
        await asyncio.to_thread(own_postgres.stop)
        await until(state.lease.may_send)
        assert "could not be renewed" in state.lease.may_send()
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: not state.lease.may_send())
        assert state.lease.epoch == 1


async def test_perpd_check_looks_at_the_database_and_makes_nothing_there(own_postgres, tmp_path):
    loaded = settings_for(own_postgres.url)
    away = await state_check(loaded)
    assert (away.verdict, own_postgres.password in away.found) == (Verdict.FAIL, False)
    own_postgres.start()
    none = await state_check(loaded)
    assert (none.verdict, "none yet" in none.found) == (Verdict.PASS, True)
    connection = await asyncpg.connect(own_postgres.url)
    assert not await connection.fetchval("select count(*) from pg_namespace where nspname like 'perpd%'")
    await connection.close()
    async with open_state(loaded, tmp_path):
        beside = await state_check(loaded)
        assert (beside.verdict, f"schema {len(POSTGRES)} of" in beside.found) == (Verdict.PASS, True)
    async with administrating(loaded) as db:
        await db.execute("update schema_version set version = version + 1")
    assert (await state_check(loaded)).verdict is Verdict.FAIL
