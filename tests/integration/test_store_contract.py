"""What the store promises, on SQLite and on a real PostgreSQL alike."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from service.directory import market_name
from service.errors import StateConflict
from service.ports import StateStore
from service.records import (
    Adjustment,
    Decision,
    DecisionOutcome,
    Fill,
    ModelEntry,
    ModelRole,
    Order,
    OrderPurpose,
    OrderStatus,
    OrderType,
    PositionSide,
    ShadowPosition,
    Side,
    Signal,
)
from service.settings import Loaded, load
from service.store.opening import STATE_FILE, open_state, schema_name
from service.store.postgres import migrate
from service.store.rows import DAY_MS, DECIDED_KEPT_MS, ENDED_KEPT_MS, SHADOWS_KEPT_MS, order_row
from service.store.schema import POSTGRES, SQLITE
from tests.market_seeds import MARKET_SEEDS
from tests.samples import FILL, POSITION, signal


class Books:
    """One store that can be opened again and again, and looked into."""

    def __init__(self, loaded: Loaded, directory: Path) -> None:
        self.loaded = loaded
        self.directory = directory

    @asynccontextmanager
    async def open(self) -> AsyncIterator[StateStore]:
        async with open_state(self.loaded, self.directory) as state:
            yield state.store

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        if not self.loaded.secrets.database_url:
            with closing(sqlite3.connect(self.directory / STATE_FILE)) as db:
                return db.execute(sql).fetchall()
        async with self.administrating() as connection:
            return [tuple(row) for row in await connection.fetch(sql)]

    @asynccontextmanager
    async def administrating(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(
            self.loaded.secrets.database_url,
            server_settings={"search_path": schema_name(market_name(self.loaded.settings))},
        )
        try:
            yield connection
        finally:
            await connection.close()

    async def put_orders_of_schema_3(self, orders: Sequence[Order]) -> None:
        """As the perpd before wrote them."""
        kept = [order_row(order)[:7] for order in orders]
        if not self.loaded.secrets.database_url:
            with closing(sqlite3.connect(self.directory / STATE_FILE)) as db:
                db.executemany("insert into orders values (?, ?, ?, ?, ?, ?, ?)", kept)
                db.commit()
            return
        async with self.administrating() as connection:
            for *columns, payload in kept:
                await connection.execute(
                    "insert into orders values ($1, $2, $3, $4, $5, $6, $7)", *columns, payload.decode()
                )


@pytest.fixture(params=["sqlite", "postgres"])
def books(request, tmp_path) -> Books:
    environment = {"PERPD_SIM__SEED": str(next(MARKET_SEEDS))}  # a market, and so a schema, of its own
    if request.param == "postgres":
        environment["DATABASE_URL"] = request.getfixturevalue("postgres").url
    return Books(load(None, environment), tmp_path)


ORDER = Order(
    client_order_id="pp-1",
    venue_order_id="",
    position_id="p1",
    symbol="币安人生USDT",
    side=Side.BUY,
    type=OrderType.MARKET,
    purpose=OrderPurpose.ENTRY,
    status=OrderStatus.INTENDED,
    quantity=Decimal("2.50"),
    filled_quantity=Decimal(0),
    average_price=Decimal(0),
    trigger_price=Decimal(0),
    reason="",
    created_ms=1,
    updated_ms=1,
)


def changed(record, **changes):
    return msgspec.structs.replace(record, **changes)


async def book(store, fill: Fill, realised: str = "0", quantity: str = "1", position=None) -> bool:
    return await store.save_fill(
        fill,
        realised_pnl=Decimal(realised),
        fee=fill.fee,
        quantity=Decimal(quantity),
        cost=Decimal(quantity) * 100,
        position=position,
    )


async def test_orders_are_open_until_they_are_final_and_survive_a_restart(books):
    async with books.open() as store:
        await store.save_order(ORDER)
        await store.save_order(changed(ORDER, client_order_id="pp-2", status=OrderStatus.FILLED))
    async with books.open() as store:
        assert await store.open_orders() == [ORDER]
        assert (await store.order("pp-2")).status is OrderStatus.FILLED
        assert await store.order("pp-3") is None
        await store.save_order(changed(ORDER, status=OrderStatus.REJECTED))
        assert await store.open_orders() == []


async def test_a_venue_order_belongs_to_one_trade(books):
    async with books.open() as store:
        await store.save_order(changed(ORDER, venue_order_id="7"))
        with pytest.raises(StateConflict):
            await store.save_order(changed(ORDER, client_order_id="pp-2", venue_order_id="7"))
        # conditional orders have numbers of their own, and other symbols too
        await store.save_order(
            changed(ORDER, client_order_id="pp-3", venue_order_id="7", type=OrderType.STOP_MARKET)
        )
        await store.save_order(changed(ORDER, client_order_id="pp-4", venue_order_id="7", symbol="B"))


STOP = changed(ORDER, client_order_id="pp-s1", venue_order_id="70", type=OrderType.STOP_MARKET)


async def test_the_order_that_a_trigger_made_belongs_to_one_trade(books):
    async with books.open() as store:
        await store.save_order(changed(STOP, became_order_id="7"))
        await store.save_order(changed(STOP, became_order_id="7", status=OrderStatus.FILLED))
        other = changed(STOP, client_order_id="pp-s2", venue_order_id="71")
        await store.save_order(other)
        await store.save_order(changed(other, client_order_id="pp-s3", venue_order_id="72"))
        with pytest.raises(StateConflict):
            await store.save_order(changed(other, became_order_id="7"))
        assert await store.order("pp-s2") == other, "what contradicts the books changes nothing"
        await store.save_order(changed(other, became_order_id="7", symbol="B", client_order_id="pp-s4"))


@pytest.mark.parametrize("first", ["plain", "triggered"])
async def test_a_plain_order_is_not_the_one_that_a_trigger_made(books, first):
    plain = changed(ORDER, venue_order_id="7")
    triggered = changed(STOP, became_order_id="7")
    async with books.open() as store:
        pair = [plain, triggered] if first == "plain" else [triggered, plain]
        await store.save_order(pair[0])
        with pytest.raises(StateConflict):
            await store.save_order(pair[1])
        # a conditional order's own number is no number of the matching engine
        await store.save_order(changed(triggered, became_order_id="70", venue_order_id="7"))


async def test_orders_of_the_schema_before_get_the_id_they_were_matched_under(books, monkeypatch):
    """One that contradicts another keeps none: the migration goes through all the same."""
    kept = [
        changed(ORDER, client_order_id="pp-a", venue_order_id="1"),
        changed(ORDER, client_order_id="pp-b"),
        changed(STOP, client_order_id="pp-c", venue_order_id="2", became_order_id="3"),
        changed(STOP, client_order_id="pp-d", venue_order_id="4", became_order_id="3"),
        changed(STOP, client_order_id="pp-e", venue_order_id="5", became_order_id="1"),
        changed(STOP, client_order_id="pp-f", venue_order_id="6"),
    ]
    with monkeypatch.context() as older:
        older.setattr("service.store.sqlite.SQLITE", SQLITE[:3])
        older.setattr(migrate, "__defaults__", (POSTGRES[:2],))
        async with books.open():
            pass
    await books.put_orders_of_schema_3(kept)
    async with books.open() as store:
        assert {order.client_order_id for order in await store.open_orders()} == {
            order.client_order_id for order in kept
        }
        with pytest.raises(StateConflict):
            await store.save_order(changed(STOP, client_order_id="pp-g", became_order_id="3"))
    found = dict(await books.rows("select client_order_id, matched_order_id from orders"))
    assert found == {"pp-a": "1", "pp-b": None, "pp-c": "3", "pp-d": None, "pp-e": None, "pp-f": None}


async def test_a_fill_moves_totals_holding_and_position_once(books):
    async with books.open() as store:
        assert await book(store, FILL, "1.25", "1", POSITION)
        assert not await book(store, FILL, "1.25", "99", changed(POSITION, quantity=Decimal(9)))
        assert await book(store, changed(FILL, symbol="BUSDT"), "-0.00000001", "0")
        totals = await store.ledger_totals()
        assert totals == {
            "realised_pnl": Decimal("1.24999999"),
            "fees": Decimal("0.10"),
            "funding": Decimal(0),
            "deposits": Decimal(0),
            "corrections": Decimal(0),
        }
        assert await store.holdings() == {"AUSDT": (Decimal(1), Decimal(100))}
        assert await store.open_positions() == [POSITION]
        assert len(await store.fills("pp-1")) == 2


async def test_a_fill_that_fails_half_way_leaves_nothing(books):
    async with books.open() as store:
        bad = changed(POSITION, entry_price="no decimal")
        with pytest.raises(TypeError):
            await book(store, FILL, "1", "1", bad)
        assert await store.fills("pp-1") == []
        assert (await store.ledger_totals())["realised_pnl"] == 0
        assert await book(store, FILL)


async def test_adjustments_are_booked_once_by_kind(books):
    def adjustment(name: str, kind: str, amount: str) -> Adjustment:
        return Adjustment(
            adjustment_id=name, kind=kind, symbol="", amount=Decimal(amount), reason="", at_ms=1
        )

    async with books.open() as store:
        assert await store.save_adjustment(adjustment("1", "funding", "-0.5"))
        assert not await store.save_adjustment(adjustment("1", "funding", "-0.5"))
        assert await store.save_adjustment(adjustment("2", "deposit", "100"))
        assert await store.save_adjustment(
            adjustment("3", "correction", "-1"), holding=("A", Decimal(2), Decimal(3))
        )
        totals = await store.ledger_totals()
        assert (totals["funding"], totals["deposits"]) == (Decimal("-0.5"), Decimal(100))
        assert totals["corrections"] == -1
        assert await store.holdings() == {"A": (2, 3)}


async def test_closed_positions_come_newest_first_and_those_never_opened_do_not_count(books):
    async with books.open() as store:
        for n in range(1, 5):
            await store.save_position(changed(POSITION, position_id=f"p{n}", closed_ms=n))
        await store.save_position(changed(POSITION, position_id="p9", closed_ms=9, entry_price=Decimal(0)))
        await store.save_position(changed(POSITION, position_id="p0"))
        assert [p.position_id for p in await store.closed_positions(3)] == ["p4", "p3", "p2"]
        assert [p.position_id for p in await store.open_positions()] == ["p0"]
        assert (await store.position("p9")).closed_ms == 9


async def test_an_intention_is_position_and_order_together(books):
    async with books.open() as store:
        await store.save_intent(POSITION, ORDER)
        assert await store.open_positions() == [POSITION]
        assert await store.open_orders() == [ORDER]


async def test_decided_signals_are_remembered_for_two_days(books):
    def decided(name: str, close_ms: int) -> tuple[Signal, Decision]:
        decision = Decision(
            signal_id=name,
            symbol="A",
            position_side=PositionSide.LONG,
            outcome=DecisionOutcome.REFUSED,
            reason="low_confidence",
            detail="",
            rank=1,
            cycle=1,
            decided_ms=close_ms,
        )
        return signal(name, "A", close_ms=close_ms), decision

    async with books.open() as store:
        await store.save_signal_decided([decided("a", 1_000), decided("b", 2_000)])
        await store.save_signal_decided([decided("b", 2_000)])
        assert await store.decided_since(1_500) == {"b"}
        await store.save_signal_decided([decided("c", DECIDED_KEPT_MS + 1_500)])
        assert await store.decided_since(0) == {"b", "c"}
        await store.save_signal_decided([])
        assert await store.decided_since(0) == {"b", "c"}


async def test_shadows_are_kept_while_open_and_a_week_after(books):
    shadow = ShadowPosition(
        position_id="x",
        signal_id="s",
        symbol="A",
        position_side=PositionSide.LONG,
        entry=1.0,
        stop=0.9,
        target=1.2,
        opened_ms=1,
        checked_ms=1,
    )
    async with books.open() as store:
        await store.save_shadows([shadow, changed(shadow, position_id="y", closed_ms=5)])
        assert await store.open_shadows() == [shadow]
        await store.save_shadows([changed(shadow, position_id="z", closed_ms=SHADOWS_KEPT_MS + 6)])
        moved = changed(shadow, checked_ms=9)
        await store.save_shadows([moved])
        await store.save_signal_decided([], [shadow, changed(shadow, position_id="new")])
        assert await store.open_shadows() == [changed(shadow, position_id="new"), moved]
    assert {row[0] for row in await books.rows("select position_id from shadows")} == {"x", "z", "new"}


async def test_values_are_replaced(books):
    async with books.open() as store:
        assert await store.get_value("k") is None
        await store.set_value("k", "1")
        await store.set_value("k", "2")
        assert await store.get_value("k") == "2"


async def test_calls_take_effect_in_the_order_made(books):
    async with books.open() as store:
        await asyncio.gather(*(store.set_value("k", str(n)) for n in range(50)))
        assert await store.get_value("k") == "49"


async def test_an_unfinished_call_that_is_cancelled_takes_effect_whole(books):
    async with books.open() as store:
        saving = asyncio.create_task(store.save_intent(POSITION, ORDER))
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.wait({saving})
    async with books.open() as store:
        found = (await store.open_positions(), await store.open_orders())
    assert found in (([POSITION], [ORDER]), ([], []))


async def test_a_store_opened_twice_in_a_row_migrates_once(books):
    for _ in range(2):
        async with books.open() as store:
            await store.set_value("k", "1")


async def test_what_is_booked_or_ended_is_kept_for_the_archive_until_it_has_it(books):
    closed = changed(POSITION, closed_ms=7)
    ended = changed(ORDER, status=OrderStatus.FILLED)
    funding = Adjustment(adjustment_id="f", kind="funding", symbol="A", amount=Decimal(1), reason="", at_ms=1)
    amounts = {name: Decimal(0) for name in ("realised_pnl", "fee", "quantity", "cost")}
    kept = {"fills": FILL, "positions": closed, "orders": ended, "adjustments": funding}
    async with books.open() as store:
        await store.save_intent(POSITION, ORDER)
        assert {stream: await store.unarchived(stream) for stream in kept} == {
            **{stream: [] for stream in kept},
            "orders": [ORDER],
        }
        await store.archived([("orders", ORDER)])
        await store.save_order(ended)
        await store.save_fill(FILL, **amounts, position=closed)
        await store.save_adjustment(funding)
    async with books.open() as store:
        assert {stream: await store.unarchived(stream) for stream in kept} == {
            stream: [record] for stream, record in kept.items()
        }
        await store.archived(list(kept.items()))
        assert not await store.save_fill(FILL, **amounts)
        assert [await store.unarchived(stream) for stream in kept] == [[]] * 4


async def test_each_state_of_an_order_is_kept_for_the_archive_until_it_has_that_one(books):
    opened = changed(ORDER, status=OrderStatus.OPEN, venue_order_id="7", updated_ms=2)
    partly = changed(opened, status=OrderStatus.PARTLY_FILLED, filled_quantity=Decimal(1))
    more = changed(partly, filled_quantity=Decimal(2))
    became = changed(more, became_order_id="8")  # told apart though all else is equal
    ended = changed(became, status=OrderStatus.FILLED, filled_quantity=Decimal("2.50"))
    priced = changed(ended, average_price=Decimal(99))  # concluded, then heard of
    told = [ORDER, opened, partly, more, became, ended, priced]
    async with books.open() as store:
        for state in told:
            await store.save_order(state)
            await store.save_order(state)
    async with books.open() as store:
        left = await store.unarchived("orders")
        assert sorted(map(str, left)) == sorted(map(str, told))
        await store.archived([("orders", opened), ("orders", ended)])
        left = await store.unarchived("orders")
        assert sorted(map(str, left)) == sorted(map(str, [ORDER, partly, more, became, priced]))


async def test_bans_survive_a_restart_and_are_forgotten_once_over(books):
    async with books.open() as store:
        await store.save_ban("fapi.example.org", 1_000)
        await store.save_ban("fapi.example.org", 3_000)
    async with books.open() as store:
        assert await store.bans() == {"fapi.example.org": 3_000}
        assert await store.prune(2_500) == 0
        assert await store.bans() == {"fapi.example.org": 3_000}
        assert await store.prune(3_500) == 1
        assert await store.bans() == {}


async def test_a_cooldown_is_kept_with_the_end_that_began_it_or_not_at_all(books):
    closed = changed(POSITION, closed_ms=7, close_reason="stop")
    amounts = {name: Decimal(0) for name in ("realised_pnl", "fee", "quantity", "cost")}
    async with books.open() as store:
        bad = changed(closed, entry_price="no decimal")
        with pytest.raises(TypeError):
            await store.save_fill(FILL, **amounts, position=bad, cooldown_until_ms=3_000)
        assert await store.cooldowns() == {}
        assert await store.save_fill(FILL, **amounts, position=closed, cooldown_until_ms=3_000)
        assert not await store.save_fill(FILL, **amounts, position=closed, cooldown_until_ms=9_000)
        assert await store.cooldowns() == {"AUSDT": 3_000}


async def test_cooldowns_survive_a_restart_never_get_shorter_and_are_forgotten_once_over(books):
    async with books.open() as store:
        await store.save_position(POSITION, cooldown_until_ms=3_000)
        await store.save_position(POSITION, cooldown_until_ms=2_000)
        await store.save_position(POSITION)
    async with books.open() as store:
        assert await store.cooldowns() == {"AUSDT": 3_000}
        assert await store.prune(2_500) == 0
        assert await store.prune(3_500) == 1
        assert await store.cooldowns() == {}


async def test_a_new_champion_retires_the_one_before(books):
    def model(name: str, created_ms: int, role: ModelRole) -> ModelEntry:
        return ModelEntry(
            name=name, created_ms=created_ms, path=f"{name}.bin", metrics={"auc": 0.6}, role=role
        )

    async with books.open() as store:
        await store.save_model(model("a", 1, ModelRole.CHAMPION))
        await store.save_model(model("b", 2, ModelRole.CHALLENGER))
        await store.save_model(model("b", 2, ModelRole.CHAMPION))
        await store.save_model(model("b", 2, ModelRole.CHAMPION))
        assert await store.models() == [model("b", 2, ModelRole.CHAMPION), model("a", 1, ModelRole.RETIRED)]


async def test_a_shadow_that_is_no_number_is_left_out_and_the_others_are_kept(books):
    shadow = ShadowPosition(
        position_id="x",
        signal_id="s",
        symbol="A" * 100_000,
        position_side=PositionSide.SHORT,
        entry=1.0,
        stop=1.1,
        target=0.9,
        opened_ms=1,
        checked_ms=1,
    )
    async with books.open() as store:
        await store.save_shadows([changed(shadow, position_id="y", outcome_r=float("nan")), shadow])
        assert await store.open_shadows() == [shadow]


async def test_amounts_keep_every_digit_and_add_up_exactly(books):
    async with books.open() as store:
        for n in range(30):
            fill = changed(FILL, trade_id=str(n), fee=Decimal("0.00000001"))
            assert await book(store, fill, "0.1", "0.000000000000000001")
    async with books.open() as store:
        totals = await store.ledger_totals()
        assert (totals["realised_pnl"], totals["fees"]) == (Decimal("3.0"), Decimal("3E-7"))
        quantity, cost = (await store.holdings())["AUSDT"]
        assert (quantity, cost) == (Decimal("1E-18"), Decimal("1E-16"))


async def save_trade(store: StateStore, number: int, closed_ms: int, *, order_final: bool = True) -> None:
    name = f"t{number:04}"
    status = OrderStatus.FILLED if order_final else OrderStatus.OPEN
    order = changed(ORDER, client_order_id=name, position_id=name, symbol="AUSDT", status=status)
    await store.save_intent(changed(POSITION, position_id=name, closed_ms=closed_ms), order)
    await book(store, changed(FILL, trade_id=name, client_order_id=name, filled_ms=closed_ms))


async def test_what_ended_long_ago_is_pruned_with_all_that_belongs_to_it(books):
    now_ms = ENDED_KEPT_MS + 10 * DAY_MS
    async with books.open() as store:
        await save_trade(store, 1, DAY_MS, order_final=False)
        await save_trade(store, 2, DAY_MS + 1)
        given_up = changed(POSITION, position_id="never", entry_price=Decimal(0), closed_ms=DAY_MS)
        await store.save_position(given_up)
        await book(store, changed(FILL, trade_id="foreign", client_order_id="web_1", filled_ms=DAY_MS))
        await store.save_adjustment(
            Adjustment(adjustment_id="1", kind="funding", symbol="", amount=Decimal(2), reason="", at_ms=5)
        )
        assert await store.prune(now_ms) == 3  # the funding, the foreign fill and what was never opened
        assert await store.position("never") is None
        totals = await store.ledger_totals()
        assert totals["funding"] == 2, "totals are kept for ever"
        assert len(await store.closed_positions(9)) == 2, "the newest trades stay, whatever their age"


async def test_old_trades_beyond_the_newest_are_pruned_with_orders_and_fills(books, monkeypatch):
    monkeypatch.setattr("service.store.rows.CLOSED_KEPT", 3)
    monkeypatch.setattr("service.store.rows.PRUNED_AT_ONCE", 2)
    async with books.open() as store:
        for n in range(1, 9):
            await save_trade(store, n, n * DAY_MS, order_final=n != 1)
        assert await store.prune(ENDED_KEPT_MS + 30 * DAY_MS) == 4 * 3
        assert [p.position_id for p in await store.closed_positions(9)] == [
            "t0008",
            "t0007",
            "t0006",
            "t0001",
        ]
        assert await store.fills("t0002") == []
        assert await store.order("t0002") is None
        assert len(await store.fills("t0001")) == 1, "a trade with an open order stays whole"
        assert await store.prune(ENDED_KEPT_MS + 30 * DAY_MS) == 0
