"""The executor and reconciliation against an in-memory venue: see `trading_desk`."""

import asyncio
import itertools
import threading
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.clock import WallClock
from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    OrderRejected,
    RequestRejected,
    StateConflict,
    VenueUnavailable,
)
from service.records import (
    Adjustment,
    CloseReason,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
    Position,
    PositionSide,
    RefusalReason,
    Side,
)
from service.settings import TradingSettings
from service.trading.executor import Executor
from service.trading.ledger import Holding
from service.trading.ranking import Refused
from tests.integration.trading_desk import (
    FEE,
    ZERO,
    Desk,
    Venue,
    approved,
    desk_at,
    full_disk,
    opened,
    quiet,
    refusal,
    signal,
    until,
)


async def test_an_entry_gets_its_stop_and_target_on_the_venue(desk: Desk):
    position = await opened(desk)
    assert (position.quantity, position.entry_price, position.margin) == (2, 100, 50)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    [target] = desk.venue.resting(OrderPurpose.TARGET)
    assert (stop.trigger_price, target.trigger_price) == (99, 102)
    assert (stop.side, stop.type) == (Side.SELL, OrderType.STOP_MARKET)
    assert (position.stop_order_id, position.target_order_id) == (
        stop.client_order_id,
        target.client_order_id,
    )
    assert position.protected_ms > 0
    assert desk.executor.unprotected() == []
    assert all(r.close_position for r in desk.venue.sent if r.type.conditional)
    assert await desk.equal()


async def test_an_entry_is_written_down_before_it_is_sent(tmp_path: Path):
    venue = Venue()
    written: list[int] = []

    def look(request: OrderRequest) -> None:
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(tmp_path / "state")) as db:
            sql = "select count(*) from orders where client_order_id = ?"
            written.append(db.execute(sql, (request.client_order_id,)).fetchone()[0])

    venue.known = look
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
    assert written == [1, 1, 1]


async def test_a_stop_is_written_down_while_what_became_of_its_entry_still_is(desk: Desk, monkeypatch):
    save_fill, save_order = desk.store.save_fill, desk.store.save_order
    filled, asked, go_on = asyncio.Event(), [], asyncio.Event()

    async def save_fill_and_tell(*args, **words):
        filled.set()
        return await save_fill(*args, **words)

    async def save_order_slowly(order: Order) -> None:
        asked.append(order.purpose)
        if filled.is_set() and order.purpose is OrderPurpose.ENTRY:
            await go_on.wait()
        await save_order(order)

    monkeypatch.setattr(desk.store, "save_fill", save_fill_and_tell)
    monkeypatch.setattr(desk.store, "save_order", save_order_slowly)
    opening = asyncio.create_task(opened(desk))
    await until(lambda: OrderPurpose.STOP in asked)
    assert desk.venue.resting(OrderPurpose.STOP) == []
    go_on.set()
    assert (await opening).protected_ms > 0
    assert await desk.equal()


async def test_the_ids_of_a_position_begun_in_this_run_are_told_without_the_store(desk: Desk, monkeypatch):
    asked: list[str] = []
    order = desk.store.order

    async def noted(name: str) -> Order | None:
        asked.append(name)
        return await order(name)

    monkeypatch.setattr(desk.store, "order", noted)
    position = await opened(desk)
    legs = (position.stop_order_id, position.target_order_id)
    assert not {*legs} & {*asked}
    desk.executor._books.begun.clear()  # as after a restart
    assert await desk.executor._books.next_id(position.position_id, "exit") in asked
    desk.venue.trigger(OrderPurpose.STOP, "99")
    await desk.closed()
    asked.clear()
    assert await desk.executor._books.next_id(position.position_id, "stop") not in legs
    assert legs[0] in asked, "a position that comes back is looked up"


@pytest.mark.parametrize(
    ("purpose", "mark", "reason", "pnl"),
    [(OrderPurpose.STOP, "99", "stop", -2), (OrderPurpose.TARGET, "102", "target", 4)],
)
async def test_a_close_by_one_leg_cancels_the_other(desk: Desk, purpose, mark, reason, pnl):
    await opened(desk)
    desk.venue.trigger(purpose, mark)
    position = await desk.closed()
    assert (position.close_reason, position.realised_pnl, position.exit_price) == (reason, pnl, Decimal(mark))
    assert position.fees == (100 + Decimal(mark)) * 2 * FEE
    assert position.quantity == 0
    assert await desk.venue.open_orders() == []
    assert desk.executor.held_symbols() == frozenset()
    assert await desk.equal()
    assert desk.archive.of("positions")[-1] == position


async def test_duplicated_events_are_booked_once(desk: Desk):
    desk.venue.repeats = 3
    await opened(desk)
    desk.venue.trigger(OrderPurpose.STOP, "99")
    position = await desk.closed()
    assert position.realised_pnl == -2
    assert len(desk.archive.of("fills")) == 2
    assert await desk.equal()


async def test_a_lost_answer_is_asked_for_and_never_sent_again(desk: Desk):
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1, OrderPurpose.STOP: 1, OrderPurpose.TARGET: 1}
    position = await opened(desk)
    assert position.protected_ms > 0
    purposes = sorted(request.purpose for request in desk.venue.sent)
    assert purposes == ["entry", "stop", "target"]
    assert desk.counts.counts["trading.orders_unknown"] == 3
    assert await desk.equal()


async def test_an_entry_whose_request_was_lost_ends_as_rejected(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderOutcomeUnknown("time-out")]}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert desk.executor.held_symbols() == frozenset()
    assert await desk.store.closed_positions(10) == []
    assert await desk.store.open_positions() == []


async def test_an_entry_of_unknown_fate_keeps_its_symbol_busy_and_is_protected_once_found(desk: Desk):
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1}

    def cut(request: OrderRequest) -> None:
        desk.venue.known = lambda request: None
        desk.venue.reachable = False

    desk.venue.known = cut
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert refusal(await desk.executor.open(signal("s2"), approved())) is RefusalReason.SYMBOL_HELD
    assert len(desk.venue.sent) == 1
    desk.venue.reachable = True
    await desk.reconciler.reconcile()
    await quiet(desk)
    [position] = desk.executor.positions()
    assert position.protected_ms > 0
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    assert await desk.equal()


async def test_a_denied_order_is_not_given_up_while_something_is_held(desk: Desk):
    desk.venue.silent = True
    desk.venue.forgetful = True
    desk.venue.amnesia = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert "AUSDT" in desk.executor.held_symbols()


async def test_a_rejected_entry_is_refused_with_the_venues_words(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("Margin is insufficient.", code=-2019)]}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert isinstance(answer, Refused)
    assert "-2019" in answer.detail
    assert desk.executor.held_symbols() == frozenset()


async def test_one_signal_is_entered_once(desk: Desk):
    await opened(desk)
    desk.venue.trigger(OrderPurpose.STOP, "99")
    await desk.closed()
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.SYMBOL_HELD
    assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)


async def test_a_stop_that_is_already_breached_closes_at_market(desk: Desk):
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("would trigger", code=-2021)]}
    await desk.executor.open(signal(), approved())
    position = await desk.closed()
    assert position.close_reason == "stop"
    assert desk.venue.held == {}
    [exit_] = [request for request in desk.venue.sent if request.purpose is OrderPurpose.EXIT]
    assert exit_.reduce_only
    assert await desk.venue.open_orders() == []


async def test_a_rejected_stop_is_tried_again_then_with_the_other_working_type(desk: Desk):
    refused = OrderRejected("no", code=-4131)
    desk.venue.before = {OrderPurpose.STOP: [refused, refused]}
    position = await opened(desk)
    stops = [request for request in desk.venue.sent if request.purpose is OrderPurpose.STOP]
    assert [request.working_type for request in stops] == ["MARK_PRICE", "MARK_PRICE", "CONTRACT_PRICE"]
    assert len({request.client_order_id for request in stops}) == 3
    assert position.stop_order_id == stops[-1].client_order_id


async def test_a_stop_that_cannot_be_placed_closes_the_position_when_time_is_up(tmp_path: Path):
    async with desk_at(tmp_path, Venue(), unprotected_limit_s=0.05) as desk:
        desk.venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=-4131) for _ in range(1000)]}
        await desk.executor.open(signal(), approved())
        position = await desk.closed()
        assert position.close_reason == "exit"
        assert desk.venue.held == {}


async def test_an_outage_after_the_entry_ends_in_a_stop_or_a_close(desk: Desk):
    down = [VenueUnavailable("down") for _ in range(9)]
    desk.venue.before = {OrderPurpose.STOP: down, OrderPurpose.EXIT: [VenueUnavailable("down")] * 2}
    await desk.executor.open(signal(), approved())
    await quiet(desk)
    assert desk.executor.unprotected() == []
    held = desk.venue.held.get("AUSDT", (ZERO,))[0]
    assert (held == 0) or desk.venue.resting(OrderPurpose.STOP)


async def test_a_target_that_is_reached_already_is_taken(desk: Desk):
    desk.venue.before = {OrderPurpose.TARGET: [OrderRejected("would trigger", code=-2021)]}
    await desk.executor.open(signal(), approved())
    assert (await desk.closed()).close_reason == "target"


async def test_a_target_that_is_refused_leaves_the_stop(desk: Desk):
    desk.venue.before = {OrderPurpose.TARGET: [OrderRejected("no", code=-1)] * 2}
    position = await opened(desk)
    assert position.protected_ms > 0
    assert position.target_order_id == ""
    await desk.reconciler.reconcile()
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.TARGET)) == 1


async def test_a_stop_that_the_venue_cancels_is_placed_again(desk: Desk):
    position = await opened(desk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    [again] = desk.executor.positions()
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert again.stop_order_id == stop.client_order_id != position.stop_order_id


async def test_a_stop_lost_without_an_event_is_placed_again_by_reconciliation(desk: Desk):
    position = await opened(desk)
    del desk.venue.orders[position.stop_order_id]
    await desk.reconciler.reconcile()
    await quiet(desk)
    [again] = desk.executor.positions()
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert again.stop_order_id == stop.client_order_id != position.stop_order_id


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("autoclose-1", "liquidation"),
        ("adl_autoclose", "adl"),
        ("settlement_autoclose-1", "settlement"),
        ("web_1", "manual"),
    ],
)
async def test_closes_by_others_are_recognised(desk: Desk, prefix, reason):
    await opened(desk)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), prefix)
    assert (await desk.closed()).close_reason == reason
    assert await desk.venue.open_orders() == []
    assert await desk.equal()


async def test_a_stop_that_fills_under_an_unknown_name_is_still_a_stop(desk: Desk):
    position = await opened(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    desk.venue.emit(msgspec.structs.replace(stop, status=OrderStatus.TRIGGERED))
    desk.venue.mark = Decimal(99)
    desk.venue.execute(position.stop_order_id, Decimal(2), "x-1")
    assert (await desk.closed()).close_reason == "stop"


async def test_a_fill_that_is_named_later_names_the_reason(desk: Desk):
    position = await opened(desk)
    desk.venue.mark = Decimal(99)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "x-1")
    assert (await desk.closed()).close_reason == "manual"
    desk.venue.emit(msgspec.structs.replace(desk.venue.fills[-1], client_order_id=position.stop_order_id))
    assert (await desk.closed()).close_reason == "stop"
    assert await desk.equal()


async def test_a_partial_close_leaves_the_rest_open_and_protected(desk: Desk):
    await opened(desk)
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal("0.5"), "web_1")
    await quiet(desk)
    [position] = desk.executor.positions()
    assert (position.quantity, position.realised_pnl) == (Decimal("1.5"), Decimal("0.5"))
    desk.venue.trigger(OrderPurpose.TARGET, "102")
    closed = await desk.closed()
    assert (closed.realised_pnl, closed.exit_price) == (Decimal("3.5"), Decimal("101.75"))


async def test_perpd_closes_a_position_when_asked(desk: Desk):
    position = await opened(desk)
    assert await desk.executor.close(position, CloseReason.EXPIRED)
    assert (await desk.closed()).close_reason == "expired"
    assert await desk.executor.close(position, CloseReason.EXIT)
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]) == 1


async def test_an_exit_of_unknown_fate_is_not_followed_by_a_second_one(desk: Desk):
    position = await opened(desk)
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.EXIT: 1}
    assert await desk.executor.close(position, CloseReason.EXIT)
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]) == 1
    assert desk.venue.held == {}


async def test_a_restart_goes_on_with_the_same_position(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        position = await opened(before)
        wallet = before.ledger.wallet
    async with desk_at(tmp_path, venue) as after:
        assert after.executor.positions() == (position,)
        assert after.ledger.wallet == wallet
        async with after.reconciler.running():
            assert after.executor.unprotected() == []
            assert len(venue.sent) == 3
            venue.trigger(OrderPurpose.STOP, "99")
            closed = await after.closed()
    assert (closed.close_reason, closed.realised_pnl) == ("stop", -2)


async def test_what_happened_while_it_was_down_is_booked_at_the_start(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        await opened(before)
    venue.trigger(OrderPurpose.STOP, "98.5")
    venue.wallet -= 1
    venue.income.append(
        Adjustment(
            adjustment_id="7",
            kind="funding",
            symbol="AUSDT",
            amount=Decimal(-1),
            reason="",
            at_ms=venue.time_ms,
        )
    )
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            closed = await after.closed()
            assert await after.equal()
    assert (closed.close_reason, closed.funding) == ("stop", -1)
    assert closed.exit_price == Decimal("98.5")
    assert await venue.open_orders() == []


async def test_a_crash_between_writing_and_sending_leaves_nothing_behind(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:

        def die(request: OrderRequest) -> None:
            raise asyncio.CancelledError

        venue.known = die
        with pytest.raises(asyncio.CancelledError):
            await before.executor.open(signal(), approved())
    venue.known = lambda request: None
    async with desk_at(tmp_path, venue) as after:
        assert after.executor.held_symbols() == {"AUSDT"}
        async with after.reconciler.running():
            await quiet(after)
            await after.reconciler.reconcile()
            assert after.executor.held_symbols() == frozenset()
    assert venue.sent == []


async def test_a_crash_after_sending_ends_in_a_protected_position(tmp_path: Path):
    venue = Venue()
    venue.silent = True
    async with desk_at(tmp_path, venue, answer_limit_s=60.0) as before:
        task = asyncio.create_task(before.executor.open(signal(), approved()))
        await venue.traded.wait()
        task.cancel()
        await asyncio.wait({task})
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            await quiet(after)
            [position] = after.executor.positions()
            assert position.protected_ms > 0
            assert await after.equal()
    assert len([r for r in venue.sent if r.purpose is OrderPurpose.ENTRY]) == 1


async def test_a_foreign_position_blocks_its_symbol_and_is_left_alone(tmp_path: Path):
    venue = Venue()
    venue.trade("FUSDT", Side.SELL, Decimal(3), "web_1")
    async with desk_at(tmp_path, venue) as desk:
        async with desk.reconciler.running():
            answer = await desk.executor.open(signal(symbol="FUSDT"), approved())
            assert isinstance(answer, Refused)
            assert "foreign" in answer.detail
            assert await desk.equal()
            venue.trade("FUSDT", Side.BUY, Decimal(3), "web_2")
            await desk.reconciler.reconcile()
            assert desk.executor.blocked_symbols() == {}
            assert await desk.equal()
    assert venue.sent == []


async def test_a_position_that_vanished_without_a_trace_is_closed_after_a_second_look(desk: Desk):
    await opened(desk)
    desk.venue.silent = desk.venue.amnesia = True
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "web_1")
    await desk.reconciler.reconcile()
    assert len(desk.executor.positions()) == 1
    await desk.reconciler.reconcile()
    position = await desk.closed()
    assert position.close_reason == "manual"
    assert await desk.equal()
    assert [a.kind for a in desk.archive.of("adjustments")] == ["correction"]


async def test_a_quantity_that_the_venue_changed_is_taken_over(desk: Desk):
    await opened(desk)
    desk.venue.silent = True
    desk.venue.trade("AUSDT", Side.SELL, Decimal("0.5"), "web_1")
    for _ in range(2):
        await desk.reconciler.reconcile()
    [position] = desk.executor.positions()
    assert position.quantity == Decimal("1.5")
    assert await desk.equal()


async def test_an_orphan_stop_of_a_flat_symbol_is_swept(desk: Desk):
    await opened(desk)
    desk.venue.reachable = False
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "autoclose-1")
    await desk.closed()
    assert "AUSDT" in desk.executor.held_symbols()
    desk.venue.reachable = True
    assert len(await desk.venue.open_orders()) == 2
    await desk.reconciler.reconcile()
    await quiet(desk)
    assert await desk.venue.open_orders() == []
    assert desk.executor.held_symbols() == frozenset()


async def test_settling_refuses_entries_and_leaves_stops_on_the_venue(desk: Desk):
    await opened(desk)
    assert await desk.executor.settle(5)
    assert refusal(await desk.executor.open(signal("s2", "BUSDT"), approved())) is RefusalReason.ENTRIES_OFF
    assert len(await desk.venue.open_orders()) == 2


async def test_events_beyond_the_queue_are_counted_and_reconciled(desk: Desk):
    event = Adjustment(
        adjustment_id="x", kind="transfer", symbol="", amount=Decimal(1), reason="", at_ms=10_500
    )
    for _ in range(10_001):
        desk.executor.on_event(event)
    assert desk.counts.counts["trading.events_discarded"] == 1
    assert desk.executor.reconcile_wanted.is_set()


async def test_a_full_disk_stops_entries_and_keeps_protection(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    position = await opened(desk)

    async def full(*_: object) -> None:
        raise DataDirectoryUnusable("full")

    monkeypatch.setattr(desk.store, "save_intent", full)
    monkeypatch.setattr(desk.store, "save_order", full)
    answer = await desk.executor.open(signal("s2", "BUSDT"), approved())
    assert refusal(answer) is RefusalReason.ENTRIES_OFF
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    assert desk.executor.unprotected() == []


async def test_a_venue_order_id_used_twice_quarantines_its_symbol_and_keeps_the_stop(desk: Desk):
    position = await opened(desk)
    desk.venue.numbers = itertools.count(2)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert desk.executor.unprotected() == []
    assert desk.venue.resting(OrderPurpose.STOP)
    assert "AUSDT" in desk.executor.blocked_symbols()
    assert isinstance(await desk.executor.open(signal("s2", "BUSDT"), approved()), Position)


async def test_a_triggered_order_that_is_anothers_already_quarantines_its_symbol_only(desk: Desk):
    position = await opened(desk)
    entry = desk.venue.sent[0].client_order_id
    stop = desk.venue.orders[position.stop_order_id]
    taken = desk.venue.orders[entry].venue_order_id
    desk.venue.emit(
        msgspec.structs.replace(stop, status=OrderStatus.TRIGGERED, became_order_id=taken, updated_ms=99_999)
    )
    await quiet(desk)
    assert list(desk.executor.blocked_symbols()) == ["AUSDT"]
    assert (await desk.store.order(stop.client_order_id)).became_order_id == ""
    answer = await desk.executor.open(signal("s2", "BUSDT"), approved())
    assert isinstance(answer, Position), "the other symbols go on"
    await quiet(desk)
    desk.venue.trigger(OrderPurpose.STOP, "99")
    await quiet(desk)
    assert [p.symbol for p in desk.executor.positions()] == ["BUSDT"], "its stop is booked all the same"
    assert await desk.equal()


async def test_shorts_are_the_mirror_image(desk: Desk):
    short = PositionSide.SHORT
    answer = await desk.executor.open(signal(side=short), approved(short))
    assert isinstance(answer, Position)
    await quiet(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert (stop.side, stop.trigger_price) == (Side.BUY, 101)
    desk.venue.trigger(OrderPurpose.TARGET, "98")
    position = await desk.closed()
    assert (position.realised_pnl, position.exit_price, position.close_reason) == (4, 98, "target")


async def test_a_refused_leverage_sends_no_order(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    async def refuse(*_: object) -> None:
        raise RequestRejected("Leverage 20 is not valid", code=-4028)

    monkeypatch.setattr(desk.venue, "set_leverage", refuse)
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert desk.venue.sent == []


async def test_entries_on_many_symbols_at_once_stay_apart(desk: Desk):
    names = [f"{n}USDT" for n in range(8)]
    answers = await asyncio.gather(*(desk.executor.open(signal(name, name), approved()) for name in names))
    assert all(isinstance(answer, Position) for answer in answers)
    await quiet(desk)
    assert {p.symbol for p in desk.executor.positions()} == set(names)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 8
    assert await desk.equal()


async def test_a_position_flattened_elsewhere_ends_without_a_storm_of_orders(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        await opened(desk)
        venue.silent = True
        venue.trade("AUSDT", Side.SELL, Decimal(2), "by-hand")
        venue.silent = False
        for name, order in list(venue.orders.items()):
            if not order.status.final:
                venue.vanish(name)
        sent = len(venue.sent)
        for _ in range(8):
            await desk.reconciler.reconcile()
            await asyncio.sleep(0.05)
        assert desk.executor.positions() == ()
        assert len(venue.sent) - sent <= 12
        assert not any(order.purpose is OrderPurpose.ENTRY for order in venue.sent[sent:])


async def test_an_entry_whose_fill_cannot_be_written_has_its_stop_all_the_same(tmp_path, monkeypatch):
    async with desk_at(tmp_path, Venue()) as desk:
        written = desk.store.save_fill

        async def full(*_args, **_kwargs):
            raise DataDirectoryUnusable("No space left on device")

        monkeypatch.setattr(desk.store, "save_fill", full)
        await desk.executor.open(signal(), approved())
        async with asyncio.timeout(5):
            while not desk.venue.resting(OrderPurpose.STOP):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert desk.executor.store_failing
        monkeypatch.setattr(desk.store, "save_fill", written)
        async with asyncio.timeout(10):
            while not desk.executor.positions():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert desk.executor.unprotected() == []


async def test_an_archive_that_hangs_holds_up_no_stop(tmp_path, monkeypatch):
    async with desk_at(tmp_path, Venue()) as desk:
        stuck = asyncio.Event()

        async def hang(_stream, _record):
            await stuck.wait()

        monkeypatch.setattr(desk.archive, "put", hang)
        position = await desk.executor.open(signal(), approved())
        assert isinstance(position, Position)
        assert desk.venue.resting(OrderPurpose.STOP)
        assert desk.executor.unprotected() == []
        stuck.set()


async def test_an_entry_whose_fills_come_late_is_neither_given_up_nor_foreign(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        venue.silent = True
        whole = venue.order

        async def without_fills(order):
            found = await whole(order)
            return (found[0], []) if found else None

        venue.order = without_fills
        refused = await desk.executor.open(signal(), approved())
        assert isinstance(refused, Refused)
        assert refused.reason is RefusalReason.ORDER_UNKNOWN
        venue.order, venue.silent = whole, False
        for _ in range(3):
            await desk.reconciler.reconcile()
            await quiet(desk)
        [position] = desk.executor.positions()
        assert position.quantity == venue.held["AUSDT"][0]
        assert venue.resting(OrderPurpose.STOP)
        assert not desk.executor.blocked_symbols()


async def test_a_missed_loss_is_a_loss_and_no_withdrawal(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        deposits = desk.ledger.deposits
        await opened(desk)
        venue.silent = venue.amnesia = True
        venue.mark = Decimal(30)
        venue.trade("AUSDT", Side.SELL, Decimal(2), "autoclose-1")
        venue.silent = False
        for name, order in list(venue.orders.items()):
            if not order.status.final:
                venue.vanish(name)
        for _ in range(4):
            await desk.reconciler.reconcile()
            await asyncio.sleep(0.05)
        assert desk.ledger.deposits == deposits
        assert desk.ledger.totals["corrections"] < 0
        assert desk.ledger.compare(await venue.account()).difference == 0


async def test_refused_exits_leave_nothing_behind_in_memory(tmp_path):
    async with desk_at(tmp_path, Venue(), unprotected_limit_s=0.0001) as desk:
        desk.venue.before = {
            OrderPurpose.STOP: [OrderRejected("breached", code=-2021)] * 40,
            OrderPurpose.EXIT: [VenueUnavailable("away") for _ in range(5)],
        }
        await desk.executor.open(signal(), approved())
        await quiet(desk)
        async with asyncio.timeout(10):
            while desk.executor.positions():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await quiet(desk)
        assert desk.executor._books.orders == {}
        assert desk.executor._books.changed == {}


async def test_a_stop_that_ends_while_the_target_is_being_placed_is_placed_again(desk, monkeypatch):
    venue, place, stuck = desk.venue, desk.venue.place, asyncio.Event()

    async def slow_target(request: OrderRequest) -> Order:
        if request.purpose is OrderPurpose.TARGET:
            await stuck.wait()
        return await place(request)

    monkeypatch.setattr(venue, "place", slow_target)
    entering = asyncio.create_task(desk.executor.open(signal(), approved()))
    await until(lambda: venue.resting(OrderPurpose.STOP) and desk.executor.unprotected() == [])
    [first] = venue.resting(OrderPurpose.STOP)
    venue.vanish(first.client_order_id)
    await until(lambda: venue.resting(OrderPurpose.STOP))
    stuck.set()
    await entering
    await quiet(desk)
    assert desk.executor.unprotected() == []


async def test_an_entry_does_not_wait_for_ever_for_a_stop_that_cannot_be_placed(tmp_path):
    async with desk_at(tmp_path, Venue(), unprotected_limit_s=0.05) as desk:
        away = [VenueUnavailable("away") for _ in range(1000)]
        desk.venue.before = {OrderPurpose.STOP: away, OrderPurpose.EXIT: away}
        async with asyncio.timeout(5):
            position = await desk.executor.open(signal(), approved())
        assert isinstance(position, Position)
        assert [symbol for symbol, _ in desk.executor.unprotected()] == ["AUSDT"]
        desk.venue.before = {}
        await quiet(desk)
        assert desk.executor.unprotected() == []


async def test_a_store_that_cannot_even_be_read_keeps_no_position_from_its_stop(desk, monkeypatch):
    position = await opened(desk)
    monkeypatch.setattr(desk.store, "save_order", full_disk)
    monkeypatch.setattr(desk.store, "order", full_disk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert stop.client_order_id != position.stop_order_id
    assert desk.executor.unprotected() == []


async def test_a_stop_that_was_never_written_is_swept_though_its_end_comes_first(desk, monkeypatch):
    position = await opened(desk)
    monkeypatch.setattr(desk.store, "save_order", full_disk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    cancel = desk.venue.cancel

    async def answered_late(order: Order) -> None:
        await cancel(order)
        await desk.executor.events_applied()

    monkeypatch.setattr(desk.venue, "cancel", answered_late)
    desk.venue.trigger(OrderPurpose.TARGET, "102")
    await quiet(desk)
    assert await desk.venue.open_orders() == []
    assert desk.executor.working_orders() == ()


async def test_a_contradiction_found_by_asking_quarantines_its_symbol_only(desk, monkeypatch):
    async def conflict(*_args: object, **_kwargs: object) -> bool:
        raise StateConflict("booked otherwise")

    written = desk.store.save_fill
    monkeypatch.setattr(desk.store, "save_fill", conflict)
    desk.venue.lose = {OrderPurpose.ENTRY: 1}
    desk.venue.silent = True
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert "AUSDT" in desk.executor.blocked_symbols()
    monkeypatch.setattr(desk.store, "save_fill", written)
    desk.venue.silent = False
    assert isinstance(await desk.executor.open(signal("s2", "BUSDT"), approved()), Position)


async def test_a_late_fill_of_an_entry_given_up_has_its_stop_on_a_full_disk_too(desk, monkeypatch):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=-2019)]}
    await desk.executor.open(signal(), approved())
    [entry] = desk.venue.sent
    written = desk.store.save_fill
    monkeypatch.setattr(desk.store, "save_fill", full_disk)
    desk.venue.trade("AUSDT", Side.BUY, Decimal(2), entry.client_order_id)
    await until(lambda: desk.executor.store_failing)
    assert {symbol for symbol, _ in desk.executor.unprotected()} <= {"AUSDT"}
    await until(lambda: desk.venue.resting(OrderPurpose.STOP))
    monkeypatch.setattr(desk.store, "save_fill", written)
    await until(desk.executor.positions)
    await quiet(desk)
    assert desk.executor.unprotected() == []


async def test_settling_waits_for_the_event_that_waits_for_the_disk(desk, monkeypatch):
    monkeypatch.setattr(desk.store, "save_adjustment", full_disk)
    desk.executor.on_event(
        Adjustment(adjustment_id="x", kind="transfer", symbol="", amount=Decimal(1), reason="", at_ms=99_000)
    )
    await until(lambda: desk.executor.store_failing)
    assert not await desk.executor.settle(0.05)
    monkeypatch.undo()
    assert await desk.executor.settle(5)


async def test_a_stop_known_as_filled_before_a_crash_is_booked_as_a_stop_after_it(tmp_path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        position = await opened(before)
        venue.silent = True
        venue.trigger(OrderPurpose.STOP, "99")
        before.executor.on_event(venue.orders[position.stop_order_id])
        await quiet(before)
    venue.silent = False
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            closed = await after.closed()
            assert await after.equal()
    assert (closed.close_reason, closed.realised_pnl) == ("stop", -2)


async def test_a_start_that_failed_at_the_store_reads_everything_the_next_time(desk, monkeypatch):
    position = await opened(desk)
    executor = Executor(
        desk.venue, desk.store, desk.archive, desk.ledger, WallClock(), TradingSettings(), desk.counts
    )
    monkeypatch.setattr(desk.store, "open_orders", full_disk)
    with pytest.raises(DataDirectoryUnusable):
        await executor.restore()
    monkeypatch.undo()
    await executor.restore()
    assert executor.positions() == (position,)
    assert len(executor.working_orders()) == 2


async def test_a_correction_counts_the_fill_that_is_being_booked(desk, monkeypatch):
    await opened(desk)
    written, booking, go_on = desk.store.save_fill, asyncio.Event(), asyncio.Event()

    async def slow(*args: object, **kwargs: object) -> bool:
        booking.set()
        await go_on.wait()
        return await written(*args, **kwargs)

    monkeypatch.setattr(desk.store, "save_fill", slow)
    desk.venue.mark = Decimal(98)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(1), "by-hand")
    await booking.wait()
    account = await desk.venue.account()
    correcting = asyncio.create_task(
        desk.executor.correct_books(
            "BUSDT", Holding(), account.wallet_balance, "looked at by hand", account.at_ms
        )
    )
    await asyncio.sleep(0)
    go_on.set()
    correction = await correcting
    assert correction is not None
    assert correction.amount == 0
    assert await desk.equal()


async def test_what_the_store_did_not_take_is_written_when_it_is_back(desk, monkeypatch):
    monkeypatch.setattr(desk.store, "save_order", full_disk)
    monkeypatch.setattr(desk.store, "save_position", full_disk)
    position = await opened(desk)
    assert position.stop_order_id
    assert desk.executor.store_failing
    assert await desk.store.order(position.stop_order_id) is None
    with pytest.raises(DataDirectoryUnusable):
        await desk.executor.store_back()
    assert desk.executor.store_failing
    monkeypatch.undo()
    await desk.executor.store_back()
    assert not desk.executor.store_failing
    for name in (position.stop_order_id, position.target_order_id):
        assert (await desk.store.order(name)).status is OrderStatus.OPEN
    assert await desk.store.position(position.position_id) == desk.executor.positions()[0]


async def test_a_stop_leaves_though_the_disk_hangs_and_what_was_not_waited_for_is_booked_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.store.sqlite.WORK_LIMIT_S", 0.1)
    free, thread = threading.Event(), desk.store._turns._thread
    placed = desk.venue.place

    async def place(request: OrderRequest) -> Order:
        if request.purpose is OrderPurpose.ENTRY:
            thread.submit(free.wait, 20)  # from here on nothing becomes durable
        return await placed(request)

    monkeypatch.setattr(desk.venue, "place", place)
    entering = asyncio.create_task(desk.executor.open(signal(), approved()))
    await until(lambda: desk.venue.resting(OrderPurpose.STOP))
    assert desk.executor.store_failing
    free.set()
    await entering
    await quiet(desk)
    await desk.executor.store_back()
    assert not desk.executor.store_failing
    await quiet(desk)
    assert await desk.equal()
    [position] = await desk.store.open_positions()
    assert position.quantity == 2


async def test_an_entry_that_waits_for_the_books_is_not_sent_once_the_switch_has_tripped(desk: Desk):
    books = desk.executor._books
    words: list[str] = []
    desk.executor._sender._halted = lambda: "".join(words)
    async with books.lock:
        entering = asyncio.create_task(desk.executor.open(signal(), approved()))
        await until(lambda: desk.executor.pending_positions())
        for _ in range(50):
            await asyncio.sleep(0.001)
        words.append("stop-entries by hand")
    await entering
    await quiet(desk)
    assert desk.venue.sent == []
