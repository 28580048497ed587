import asyncio
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.errors import DataDirectoryUnusable, StateConflict
from service.records import (
    Adjustment,
    Decision,
    DecisionOutcome,
    Fill,
    Order,
    OrderPurpose,
    OrderStatus,
    OrderType,
    Position,
    PositionSide,
    ShadowPosition,
    Side,
    Signal,
)
from service.store.schema import MIGRATIONS
from service.store.sqlite import DECIDED_KEPT_MS, SHADOWS_KEPT_MS, open_sqlite

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
POSITION = Position(
    position_id="p1",
    signal_id="s1",
    symbol="AUSDT",
    position_side=PositionSide.LONG,
    quantity=Decimal(1),
    entry_price=Decimal(100),
    stop=Decimal(99),
    target=Decimal(102),
    leverage=3,
    margin=Decimal(33),
    opened_ms=5,
)
FILL = Fill(
    trade_id="1",
    client_order_id="pp-1",
    venue_order_id="9",
    symbol="AUSDT",
    side=Side.BUY,
    price=Decimal(100),
    quantity=Decimal(1),
    fee=Decimal("0.05"),
    fee_asset="USDT",
    realised_pnl=Decimal(0),
    maker=False,
    filled_ms=5,
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


async def test_orders_are_open_until_they_are_final_and_survive_a_restart(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await store.save_order(ORDER)
        await store.save_order(changed(ORDER, client_order_id="pp-2", status=OrderStatus.FILLED))
    async with open_sqlite(tmp_path / "s") as store:
        assert await store.open_orders() == [ORDER]
        assert (await store.order("pp-2")).status is OrderStatus.FILLED
        assert await store.order("pp-3") is None
        await store.save_order(changed(ORDER, status=OrderStatus.REJECTED))
        assert await store.open_orders() == []


async def test_a_venue_order_belongs_to_one_trade(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await store.save_order(changed(ORDER, venue_order_id="7"))
        with pytest.raises(StateConflict):
            await store.save_order(changed(ORDER, client_order_id="pp-2", venue_order_id="7"))
        # conditional orders have numbers of their own, and other symbols too
        await store.save_order(
            changed(ORDER, client_order_id="pp-3", venue_order_id="7", type=OrderType.STOP_MARKET)
        )
        await store.save_order(changed(ORDER, client_order_id="pp-4", venue_order_id="7", symbol="B"))


async def test_a_fill_moves_totals_holding_and_position_once(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
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


async def test_a_fill_that_fails_half_way_leaves_nothing(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        bad = changed(POSITION, entry_price="no decimal")
        with pytest.raises(TypeError):
            await book(store, FILL, "1", "1", bad)
        assert await store.fills("pp-1") == []
        assert (await store.ledger_totals())["realised_pnl"] == 0
        assert await book(store, FILL)


async def test_adjustments_are_booked_once_by_kind(tmp_path: Path):
    def adjustment(name: str, kind: str, amount: str) -> Adjustment:
        return Adjustment(
            adjustment_id=name, kind=kind, symbol="", amount=Decimal(amount), reason="", at_ms=1
        )

    async with open_sqlite(tmp_path / "s") as store:
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


async def test_closed_positions_come_newest_first_and_those_never_opened_do_not_count(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        for n in range(1, 5):
            await store.save_position(changed(POSITION, position_id=f"p{n}", closed_ms=n))
        await store.save_position(changed(POSITION, position_id="p9", closed_ms=9, entry_price=Decimal(0)))
        await store.save_position(changed(POSITION, position_id="p0"))
        assert [p.position_id for p in await store.closed_positions(3)] == ["p4", "p3", "p2"]
        assert [p.position_id for p in await store.open_positions()] == ["p0"]
        assert (await store.position("p9")).closed_ms == 9


async def test_an_intention_is_position_and_order_together(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await store.save_intent(POSITION, ORDER)
        assert await store.open_positions() == [POSITION]
        assert await store.open_orders() == [ORDER]


async def test_decided_signals_are_remembered_for_two_days(tmp_path: Path):
    def decided(name: str, close_ms: int) -> tuple[Signal, Decision]:
        signal = Signal(
            signal_id=name,
            strategy="s",
            symbol="A",
            position_side=PositionSide.LONG,
            candle_close_ms=close_ms,
            entry=1.0,
            stop=0.9,
            target=1.2,
            atr=0.1,
            confidence=0.5,
            scores={},
            features={},
        )
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
        return signal, decision

    async with open_sqlite(tmp_path / "s") as store:
        await store.save_signal_decided([decided("a", 1_000), decided("b", 2_000)])
        await store.save_signal_decided([decided("b", 2_000)])
        assert await store.decided_since(1_500) == {"b"}
        await store.save_signal_decided([decided("c", DECIDED_KEPT_MS + 1_500)])
        assert await store.decided_since(0) == {"b", "c"}
        await store.save_signal_decided([])
        assert await store.decided_since(0) == {"b", "c"}


async def test_shadows_are_kept_while_open_and_a_week_after(tmp_path: Path):
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
    async with open_sqlite(tmp_path / "s") as store:
        await store.save_shadows([shadow, changed(shadow, position_id="y", closed_ms=5)])
        assert await store.open_shadows() == [shadow]
        await store.save_shadows([changed(shadow, position_id="z", closed_ms=SHADOWS_KEPT_MS + 6)])
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        rows = db.execute("select position_id from shadows").fetchall()
    assert {row[0] for row in rows} == {"x", "z"}


async def test_values_are_replaced(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        assert await store.get_value("k") is None
        await store.set_value("k", "1")
        await store.set_value("k", "2")
        assert await store.get_value("k") == "2"


async def test_calls_take_effect_in_the_order_made(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await asyncio.gather(*(store.set_value("k", str(n)) for n in range(50)))
        assert await store.get_value("k") == "49"


async def test_a_newer_schema_is_refused(tmp_path: Path):
    async with open_sqlite(tmp_path / "s"):
        pass
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        db.execute(f"pragma user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(DataDirectoryUnusable, match="newer perpd"):
        async with open_sqlite(tmp_path / "s"):
            pass


@pytest.mark.parametrize("content", [b"this is no database" * 500, b"SQLite format 3\x00" + b"\x07" * 9000])
async def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(DataDirectoryUnusable):
        async with open_sqlite(tmp_path / "s"):
            pass


async def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(DataDirectoryUnusable, match="cannot be opened"):
        async with open_sqlite(tmp_path / "missing" / "s"):
            pass


async def test_a_full_disk_is_named_and_the_store_goes_on_once_there_is_room(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await store._run(lambda db: db.execute("pragma max_page_count = 40").fetchall())
        with pytest.raises(DataDirectoryUnusable, match="full"):
            await store.set_value("large", "x" * 1_000_000)
        await store._run(lambda db: db.execute("pragma max_page_count = 10000").fetchall())
        await store.set_value("k", "x" * 1_000)
        assert await store.get_value("k") == "x" * 1_000


async def test_it_is_durable_and_in_write_ahead_mode(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        found = await store._run(
            lambda db: [db.execute(f"pragma {p}").fetchone()[0] for p in ("journal_mode", "synchronous")]
        )
    assert found == ["wal", 2]
