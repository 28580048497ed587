"""Our books and the venue's, compared: what was missed, what is foreign, what cannot be written."""

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from service.clock import WallClock
from service.daemon import tell_positions
from service.errors import DataDirectoryUnusable, OrderRejected, StateConflict
from service.records import (
    Account,
    Adjustment,
    CloseReason,
    Fill,
    Order,
    OrderPurpose,
    OrderStatus,
    Position,
    RefusalReason,
    Side,
)
from service.store.backup import copy_file, put_back
from service.trading import reconcile
from service.trading.orders import client_order_id
from tests.integration.trading_desk import (
    RULES,
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


async def test_after_a_gap_nothing_is_opened_until_a_reconciliation_is_complete(desk: Desk):
    desk.executor.on_gap()
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ENTRIES_OFF
    looked, go_on = asyncio.Event(), asyncio.Event()
    account = desk.venue.account

    async def slow():
        looked.set()
        await go_on.wait()
        return await account()

    desk.venue.account = slow
    passing = asyncio.create_task(desk.reconciler.reconcile())
    await looked.wait()
    desk.executor.on_gap()  # a second gap, while the first is looked at
    go_on.set()
    await passing
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.ENTRIES_OFF
    await desk.reconciler.reconcile()
    assert isinstance(await desk.executor.open(signal(), approved()), Position)


@pytest.mark.parametrize(
    ("client_id", "reason"),
    [("web_1", "manual"), ("autoclose-7", "liquidation"), ("adl_autoclose", "adl"), ("", "manual")],
)
async def test_a_close_that_nobody_heard_of_is_booked_with_its_result_and_reason(desk, client_id, reason):
    await opened(desk)
    desk.venue.silent = True
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), client_id)
    await desk.reconciler.reconcile()
    position = await desk.closed()
    assert (position.close_reason, position.realised_pnl, position.exit_price) == (reason, 2, 101)
    assert await desk.equal()
    assert desk.archive.of("adjustments") == []


async def test_funding_that_is_learned_after_the_close_belongs_to_the_closed_position(desk: Desk):
    await opened(desk)
    paid_ms = desk.venue.time_ms
    desk.venue.trigger(OrderPurpose.TARGET, "102")
    await desk.closed()
    desk.venue.wallet -= 1
    paid = Adjustment(
        adjustment_id="7", kind="funding", symbol="AUSDT", amount=Decimal(-1), reason="", at_ms=paid_ms
    )
    desk.venue.income.append(paid)
    await desk.reconciler.reconcile()
    assert (await desk.closed()).funding == -1
    assert await desk.equal()


async def test_a_foreign_close_that_nobody_heard_of_is_booked(tmp_path: Path):
    venue = Venue()
    venue.time_ms = WallClock().now_ms()
    venue.trade("FUSDT", Side.SELL, Decimal(3), "web_1")
    async with desk_at(tmp_path, venue) as desk:
        await desk.reconciler.reconcile()
        venue.silent = True
        venue.mark = Decimal(90)
        venue.trade("FUSDT", Side.BUY, Decimal(3), "web_2")
        await desk.reconciler.reconcile()
        assert await desk.equal()
        assert desk.ledger.totals["realised_pnl"] == 30
        assert desk.archive.of("adjustments") == []


async def test_a_foreign_symbol_stays_blocked_while_it_moves(tmp_path: Path):
    venue = Venue()
    venue.trade("FUSDT", Side.SELL, Decimal(3), "web_1")
    async with desk_at(tmp_path, venue) as desk:
        await desk.reconciler.reconcile()
        account = venue.account

        async def traded_meanwhile():
            seen = await account()
            venue.trade("FUSDT", Side.SELL, Decimal(1), "web_2")
            return seen

        venue.account = traded_meanwhile
        await desk.reconciler.reconcile()
        assert "FUSDT" in desk.executor.blocked_symbols()


async def test_a_correction_waits_for_a_moment_in_which_nothing_is_booked(desk: Desk):
    await opened(desk)
    await desk.executor.open(signal("s2", "BUSDT"), approved())
    await quiet(desk)
    desk.venue.silent = desk.venue.amnesia = True
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "web_1")
    await desk.reconciler.reconcile()
    desk.venue.silent = desk.venue.amnesia = False
    account, calls = desk.venue.account, 0

    async def older_than_a_fill():
        nonlocal calls
        calls += 1
        seen = await account()
        if calls == 2:  # the snapshot that the correction is made from
            desk.venue.trade("BUSDT", Side.SELL, Decimal(1), "web_2")
        return seen

    desk.venue.account = older_than_a_fill
    desk.venue.amnesia = True
    await desk.reconciler.reconcile()
    await quiet(desk)
    assert calls >= 3
    assert await desk.equal()
    assert {p.symbol for p in desk.executor.positions()} == {"BUSDT"}


async def test_on_a_full_disk_a_missing_stop_is_still_found(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    position = await opened(desk)
    monkeypatch.setattr(reconcile, "EVENTS_LIMIT_S", 0.02)
    for name in ("save_adjustment", "save_order", "save_position", "save_fill"):
        monkeypatch.setattr(desk.store, name, full_disk)
    desk.executor.on_event(
        Adjustment(adjustment_id="x", kind="transfer", symbol="", amount=Decimal(1), reason="", at_ms=99_000)
    )
    await until(lambda: desk.executor.store_failing)
    del desk.venue.orders[position.stop_order_id]
    await desk.reconciler.reconcile()
    await until(lambda: desk.venue.resting(OrderPurpose.STOP))
    assert desk.counts.counts["reconcile.stops_only"] == 1


async def test_a_record_that_no_archive_takes_ends_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    put = desk.archive.put

    async def picky(stream, record):
        if stream == "orders":
            raise ValueError("cannot be written as JSON")
        await put(stream, record)

    monkeypatch.setattr(desk.archive, "put", picky)
    await opened(desk)
    assert await desk.executor.settle(5)
    assert desk.counts.counts["trading.records_discarded"] >= 3
    assert len(desk.archive.of("fills")) == 1


async def test_what_cannot_be_booked_in_a_pass_quarantines_its_symbol_only(desk, monkeypatch):
    await opened(desk)
    await desk.executor.open(signal("s2", "BUSDT"), approved())
    await quiet(desk)
    desk.venue.silent = True
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "web_1")
    desk.venue.trade("BUSDT", Side.SELL, Decimal(2), "web_2")
    written = desk.store.save_fill

    async def conflict(fill, **words):
        if fill.symbol == "AUSDT":
            raise StateConflict("booked otherwise")
        return await written(fill, **words)

    monkeypatch.setattr(desk.store, "save_fill", conflict)
    await desk.reconciler.reconcile()
    assert set(desk.executor.blocked_symbols()) == {"AUSDT"}
    assert (await desk.closed()).symbol == "BUSDT"


async def test_an_orphan_stop_that_our_books_do_not_know_is_cancelled_once_seen_twice(desk: Desk):
    await opened(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    name = client_order_id("lost", "stop", 0)
    desk.venue.orders[name] = msgspec.structs.replace(
        stop, client_order_id=name, symbol="ZUSDT", venue_order_id="91", status=OrderStatus.OPEN
    )
    await desk.reconciler.reconcile()
    assert desk.venue.orders[name].status is OrderStatus.OPEN
    await desk.reconciler.reconcile()
    assert desk.venue.orders[name].status is OrderStatus.CANCELLED
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    await desk.reconciler.reconcile()
    assert desk.executor.blocked_symbols() == {}


@pytest.mark.parametrize("policy", ["adopt", "protect"])
async def test_a_foreign_position_is_taken_over_with_a_stop_once_seen_twice(tmp_path: Path, policy: str):
    venue = Venue()
    venue.trade("FUSDT", Side.SELL, Decimal(3), "web_1")
    async with desk_at(tmp_path, venue, instrument_of=lambda symbol: RULES, foreign=policy) as desk:
        await desk.reconciler.reconcile()
        assert venue.sent == []
        await desk.reconciler.reconcile()
        await quiet(desk)
        [stop] = venue.sent
        assert (stop.symbol, stop.side, stop.trigger_price) == ("FUSDT", Side.BUY, Decimal(105))
        [position] = desk.executor.positions()
        assert position.protected_ms > 0
        assert desk.executor.blocked_symbols() == {}
        await desk.reconciler.reconcile()
        assert len(venue.sent) == 1
        venue.mark = Decimal(95)
        venue.trade("FUSDT", Side.BUY, Decimal(3), "web_2")
        closed = await desk.closed()
        assert (closed.close_reason, closed.realised_pnl) == ("manual", 15)
        assert await venue.open_orders() == []
        assert await desk.equal()


async def test_a_foreign_position_that_has_a_stop_is_left_alone(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue, foreign="protect") as desk:
        await opened(desk)
        [stop] = venue.resting(OrderPurpose.STOP)
        venue.orders["web_9"] = msgspec.structs.replace(
            stop, client_order_id="web_9", symbol="FUSDT", venue_order_id="91"
        )
        venue.trade("FUSDT", Side.BUY, Decimal(3), "web_1")
        sent = len(venue.sent)
        await desk.executor.events_applied()
        for _ in range(3):
            desk.executor.reconcile_wanted.clear()
            await desk.reconciler.reconcile()
            assert not desk.executor.reconcile_wanted.is_set()
        assert len(venue.sent) == sent
        assert "FUSDT" in desk.executor.blocked_symbols()


async def test_after_lost_books_the_old_legs_are_cancelled_once_a_new_stop_rests(tmp_path: Path):
    venue = Venue()
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    async with desk_at(tmp_path / "before", venue) as desk:
        await opened(desk)
        old = {order.client_order_id for order in await venue.open_orders()}
    async with desk_at(
        tmp_path / "after", venue, instrument_of=lambda symbol: RULES, foreign="adopt"
    ) as desk:
        for _ in range(6):
            desk.executor.reconcile_wanted.clear()
            await desk.reconciler.reconcile()
            await quiet(desk)
            assert venue.resting(OrderPurpose.STOP)
        assert not desk.executor.reconcile_wanted.is_set()
        [stop] = await venue.open_orders()
        assert stop.client_order_id not in old
        [position] = desk.executor.positions()
        assert position.stop_order_id == stop.client_order_id
        await desk.reconciler.reconcile()
        assert desk.executor.blocked_symbols() == {}


async def test_a_guest_is_never_closed_because_its_stop_cannot_be_placed(tmp_path: Path):
    venue = Venue()
    venue.trade("FUSDT", Side.BUY, Decimal(3), "web_1")
    venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=-2010) for _ in range(12)]}
    async with desk_at(tmp_path, venue, foreign="protect", unprotected_limit_s=0.0001) as desk:
        for _ in range(2):
            await desk.reconciler.reconcile()
        await until(lambda: venue.resting(OrderPurpose.STOP))
        assert venue.held["FUSDT"][0] == 3
        assert not [r for r in venue.sent if r.purpose is OrderPurpose.EXIT]


@pytest.mark.parametrize("code", [-2010, -2021])
async def test_a_guest_beyond_its_stop_is_left_to_its_owner(tmp_path: Path, code: int):
    venue = Venue()
    venue.trade("FUSDT", Side.BUY, Decimal(3), "web_1")
    venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=code) for _ in range(9)]}
    async with desk_at(tmp_path, venue, foreign="protect", unprotected_limit_s=0.0001) as desk:
        for _ in range(2):
            await desk.reconciler.reconcile()
        await until(lambda: len(venue.sent) > 5)
        venue.mark = Decimal(90)
        desk.executor.on_price("FUSDT", 90.0)
        await until(lambda: venue.resting(OrderPurpose.STOP))
        await quiet(desk)
        assert {r.purpose for r in venue.sent} == {OrderPurpose.STOP}
        assert venue.held["FUSDT"][0] == 3


async def test_an_unreadable_store_at_the_start_of_a_pass_concludes_nothing(desk: Desk, monkeypatch):
    await opened(desk)
    monkeypatch.setattr(desk.store, "get_value", full_disk)
    with pytest.raises(DataDirectoryUnusable):
        await desk.reconciler.reconcile()
    monkeypatch.undo()
    assert len(desk.executor.positions()) == 1
    assert desk.venue.held["AUSDT"][0] > ZERO


async def test_a_stop_that_was_never_written_down_is_recognised_by_its_name(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        before.store.save_order = full_disk  # type: ignore[method-assign]
        before.store.save_position = full_disk  # type: ignore[method-assign]
        await opened(before)
    [stop] = venue.resting(OrderPurpose.STOP)
    async with desk_at(tmp_path, venue) as after:
        assert after.executor.positions()[0].stop_order_id == ""
        async with after.reconciler.running():
            await quiet(after)
            [position] = after.executor.positions()
            assert position.stop_order_id == stop.client_order_id
            await after.reconciler.reconcile()
            assert after.executor.blocked_symbols() == {}
            assert len([r for r in venue.sent if r.purpose is OrderPurpose.STOP]) == 1
            venue.trigger(OrderPurpose.STOP, "99")
            assert (await after.closed()).close_reason == "stop"
            assert await venue.open_orders() == []


async def older_books(path: Path, venue: Venue) -> Position:
    """A backup with an open position, which ended after the backup was made, put back at `path`/state."""
    async with desk_at(path, venue) as desk:
        position = await opened(desk)
        copy_file(path / "state", path / "backup")
        assert await desk.executor.close(position, CloseReason.EXIT)
        await quiet(desk)
    assert venue.held == {}
    put_back(path / "backup", path / "state", path / "aside")
    venue.sent.clear()
    venue.cancelled.clear()
    return position


async def test_after_a_restore_nothing_is_sent_for_a_position_that_ended_meanwhile(tmp_path: Path):
    venue = Venue()
    position = await older_books(tmp_path, venue)
    async with desk_at(tmp_path, venue) as after:
        after.executor.protect(position.position_id)  # whoever asks
        assert not await after.executor.close(position, CloseReason.EXIT)
        async with after.reconciler.running():
            await quiet(after)
            assert (await after.closed()).position_id == position.position_id
            assert await after.equal()
    assert venue.sent == []


@pytest.mark.parametrize("mark", ["100", "104"])  # 98 would be beyond the old stop
async def test_after_a_restore_a_position_opened_since_is_not_taken_for_the_old_one(
    tmp_path: Path, mark: str
):
    venue = Venue()
    old = await older_books(tmp_path, venue)
    venue.mark = Decimal(mark)
    venue.trade("AUSDT", Side.BUY, old.quantity, "pp-other-e00")
    async with desk_at(tmp_path, venue, foreign="adopt") as after:
        async with after.reconciler.running():
            assert venue.sent == []
            for _ in range(2):  # what is not ours is looked at twice before it is adopted
                await after.reconciler.reconcile()
            await quiet(after)
            assert await after.equal()
            [found] = after.executor.positions()
            assert found.position_id != old.position_id
            assert found.entry_price == venue.mark
    assert venue.held["AUSDT"][0] == old.quantity
    assert {request.position_id for request in venue.sent} == {found.position_id}


async def test_what_perpd_did_and_the_books_lost_is_not_called_foreign(tmp_path: Path):
    venue = Venue()
    await older_books(tmp_path, venue)
    venue.trade("AUSDT", Side.BUY, Decimal(2), "pp-other-e00")
    with capture_logs() as told:
        async with desk_at(tmp_path, venue) as after:
            async with after.reconciler.running():
                tell_positions(after.executor, after.reconciler.held)
    [blocked] = [line for line in told if line["event"].startswith("symbol blocked")]
    assert blocked["event"] == "symbol blocked: not in our books"
    assert "an execution of perpd" in blocked["detail"]
    assert "pp-other-e00" in blocked["detail"]
    [compared] = [
        line for line in told if line["event"].startswith("positions") and "not_in_our_books" in line
    ]
    assert (compared["symbols"], compared["not_in_our_books"]) == ([], ["AUSDT"])
    assert not [line for line in told if line["event"] == "positions agree with the venue"]


async def test_a_stop_in_the_way_is_named_and_not_denied(desk: Desk):
    position = await opened(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    theirs = msgspec.structs.replace(stop, client_order_id="web_7")
    desk.venue.orders["web_7"] = theirs
    with capture_logs() as told:
        desk.venue.vanish(stop.client_order_id)
        await quiet(desk)
    [denied, found] = [line["detail"] for line in told if line["event"] == "position without a stop"][:2]
    assert "-4130" in denied
    assert "a stop that is not in our books rests there: web_7" in found
    [current] = desk.executor.positions()
    assert current.position_id == position.position_id
    assert current.protected_ms


async def test_a_restored_position_that_moved_unexplained_still_gets_its_stop(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        await opened(before)
    [stop] = venue.resting(OrderPurpose.STOP)
    venue.vanish(stop.client_order_id)
    venue.trade("AUSDT", Side.SELL, Decimal(1), "web_1")
    venue.amnesia = True
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            await quiet(after)
            assert after.executor.unprotected() == []
    assert len(venue.resting(OrderPurpose.STOP)) == 1


async def test_a_liquidation_told_without_a_trade_id_is_not_booked_again_with_one(desk: Desk):
    await opened(desk)
    desk.venue.silent = True
    desk.venue.trade("AUSDT", Side.SELL, Decimal(1), "autoclose-1", "77")
    desk.venue.silent = False
    told = desk.venue.fills[-1]
    desk.executor.on_event(msgspec.structs.replace(told, trade_id=f"77-{told.filled_ms}"))
    await quiet(desk)
    desk.venue.silent = True
    desk.venue.trade("AUSDT", Side.SELL, Decimal("0.5"), "web_1", "78")  # missed: the venue's list is read
    await desk.reconciler.reconcile()
    [position] = desk.executor.positions()
    assert position.quantity == Decimal("0.5")
    assert await desk.equal()


async def test_a_correction_leaves_what_was_missed_on_another_symbol_to_its_executions(desk: Desk):
    await opened(desk)
    await desk.executor.open(signal("s2", "BUSDT"), approved())
    await quiet(desk)
    desk.venue.silent = True
    desk.venue.mark = Decimal(99)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "web_1")
    executions = desk.venue.executions

    async def without_the_first(symbol: str, since_ms: int) -> list[Fill]:
        return [] if symbol == "AUSDT" else await executions(symbol, since_ms)

    desk.venue.executions = without_the_first
    await desk.reconciler.reconcile()
    account, calls = desk.venue.account, 0

    async def closed_between_the_two_looks() -> Account:
        nonlocal calls
        calls += 1
        if calls == 2:  # the snapshot of the correction; no event tells of it
            desk.venue.trade("BUSDT", Side.SELL, Decimal(2), "adl_autoclose")
        return await account()

    desk.venue.account = closed_between_the_two_looks
    for _ in range(3):
        await desk.reconciler.reconcile()
    assert desk.executor.positions() == ()
    assert await desk.equal()
    closed = {p.symbol: p.close_reason for p in await desk.store.closed_positions(9)}
    assert closed == {"AUSDT": "manual", "BUSDT": "adl"}


async def test_nothing_is_opened_on_a_foreign_position_before_reconciliation_has_seen_it(desk: Desk):
    desk.venue.trade("AUSDT", Side.SELL, Decimal(5), "web_1")
    await desk.executor.events_applied()
    assert "AUSDT" in desk.executor.blocked_symbols()
    assert "AUSDT" in desk.executor.held_symbols()
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.SYMBOL_HELD
    desk.executor.block_foreign({})  # a pass whose snapshot is older
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.SYMBOL_HELD
    assert desk.venue.sent == []
    desk.venue.trade("AUSDT", Side.BUY, Decimal(5), "web_2")
    await desk.executor.events_applied()
    await desk.reconciler.reconcile()
    assert isinstance(await desk.executor.open(signal(), approved()), Position)


async def test_an_entry_that_is_about_to_leave_stays_when_somebody_else_trades_its_symbol(desk: Desk):
    leverage = desk.venue.set_leverage

    async def traded_meanwhile(*words: object) -> None:
        await leverage(*words)
        desk.venue.trade("AUSDT", Side.SELL, Decimal(5), "web_1")
        await desk.executor.events_applied()

    desk.venue.set_leverage = traded_meanwhile
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.ORDER_REJECTED
    assert desk.venue.sent == []


async def test_stops_that_are_gone_are_asked_for_at_once_and_count_as_missing_meanwhile(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        for symbol in ("AUSDT", "BUSDT", "CUSDT"):
            await desk.executor.open(signal(symbol, symbol), approved())
        await quiet(desk)
        stops = venue.resting(OrderPurpose.STOP)
        kept = {stop.client_order_id: venue.orders.pop(stop.client_order_id) for stop in stops}
        asked: set[str] = set()
        answer, ask = asyncio.Event(), venue.order

        async def slow(order: Order):
            asked.add(order.client_order_id)
            await answer.wait()
            return await ask(order)

        venue.order = slow
        passing = asyncio.create_task(desk.reconciler.reconcile())
        await until(lambda: kept.keys() <= asked)
        assert {symbol for symbol, _ in desk.executor.unprotected()} == {"AUSDT", "BUSDT", "CUSDT"}
        back = stops[0]
        venue.orders[back.client_order_id] = kept[back.client_order_id]  # the snapshot was wrong about one
        answer.set()
        await passing
        await quiet(desk)
        assert desk.executor.unprotected() == []
        assert len(venue.resting(OrderPurpose.STOP)) == 3
        assert venue.orders[back.client_order_id].status is OrderStatus.OPEN


async def test_while_a_missing_stop_is_asked_for_perpd_closes_at_the_stop_itself(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
        [stop] = venue.resting(OrderPurpose.STOP)
        del venue.orders[stop.client_order_id]
        never, asked = asyncio.Event(), asyncio.Event()

        async def unanswered(order: Order):
            asked.set()
            await never.wait()

        ask, venue.order = venue.order, unanswered
        passing = asyncio.create_task(desk.reconciler.reconcile())
        await asked.wait()
        venue.order = ask
        venue.mark = Decimal(98)
        desk.executor.on_price("AUSDT", 98.0)
        await until(lambda: not desk.executor.positions())
        assert [r.purpose for r in venue.sent][-1] is OrderPurpose.EXIT
        never.set()
        passing.cancel()


@pytest.mark.parametrize("heard", [True, False])
async def test_what_somebody_adds_to_a_position_of_ours_stays_theirs(tmp_path: Path, heard: bool):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
        venue.silent = not heard
        venue.trade("AUSDT", Side.BUY, Decimal(50), "web_1")
        for _ in range(3):
            await desk.executor.events_applied()
            desk.executor.reconcile_wanted.clear()
            await desk.reconciler.reconcile()
            await quiet(desk)
        venue.silent = False
        assert not desk.executor.reconcile_wanted.is_set()
        [position] = desk.executor.positions()
        assert position.quantity == 2
        assert "50" in desk.executor.blocked_symbols()["AUSDT"]
        assert await desk.equal()
        assert await desk.executor.close(position, CloseReason.EXIT)
        await quiet(desk)
        assert venue.held["AUSDT"][0] == 50
        assert await venue.open_orders() == []
        await desk.reconciler.reconcile()
        assert "AUSDT" in desk.executor.blocked_symbols()
        assert await desk.equal()
        venue.trade("AUSDT", Side.SELL, Decimal(50), "web_2")
        await desk.executor.events_applied()
        await desk.reconciler.reconcile()
        assert desk.executor.blocked_symbols() == {}


async def test_an_unexplained_quantity_beyond_ours_is_booked_and_not_closed(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
        venue.silent, venue.amnesia = True, True
        venue.trade("AUSDT", Side.BUY, Decimal(50), "web_1")
        for _ in range(3):
            await desk.reconciler.reconcile()
        [position] = desk.executor.positions()
        assert position.quantity == 2
        assert "AUSDT" in desk.executor.blocked_symbols()
        assert await desk.equal()


async def test_of_a_shared_symbol_theirs_is_closed_first_and_the_stop_closes_both(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
        venue.trade("AUSDT", Side.BUY, Decimal(8), "web_1")
        venue.trade("AUSDT", Side.SELL, Decimal(3), "web_2")
        await desk.executor.events_applied()
        [position] = desk.executor.positions()
        assert position.quantity == 2
        venue.trigger(OrderPurpose.STOP, "99")
        closed = await desk.closed()
        assert (closed.close_reason, closed.realised_pnl) == ("stop", -2)
        assert venue.held == {}
        assert await desk.equal()


async def test_with_adopt_what_somebody_adds_becomes_ours(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue, foreign="adopt") as desk:
        await opened(desk)
        venue.trade("AUSDT", Side.BUY, Decimal(50), "web_1")
        await desk.executor.events_applied()
        [position] = desk.executor.positions()
        assert position.quantity == 52
        assert await desk.executor.close(position, CloseReason.EXIT)
        assert venue.held == {}
