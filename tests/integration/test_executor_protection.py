"""A position is never naked, and never has two stops: against an in-memory venue."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.errors import OrderOutcomeUnknown, OrderRejected, VenueUnavailable
from service.records import CloseReason, OrderPurpose, OrderStatus, OrderType, RefusalReason
from service.trading import executor
from service.trading.books import ATTEMPTS_KEPT
from service.trading.orders import client_order_id
from tests.integration.trading_desk import (
    RULES,
    Desk,
    Venue,
    approved,
    desk_at,
    opened,
    quiet,
    refusal,
    signal,
    until,
)


async def test_of_two_stops_the_newer_counts_and_the_older_is_cancelled(desk: Desk):
    position = await opened(desk)
    [first] = desk.venue.resting(OrderPurpose.STOP)
    second = msgspec.structs.replace(
        first,
        client_order_id=client_order_id(position.position_id, "stop", 1),
        venue_order_id="77",
        trigger_price=Decimal("99.5"),
    )
    await desk.store.save_order(msgspec.structs.replace(second, status=OrderStatus.SENT))
    desk.venue.orders[second.client_order_id] = second
    desk.venue.emit(second)
    await quiet(desk)
    assert [o.client_order_id for o in desk.venue.resting(OrderPurpose.STOP)] == [second.client_order_id]
    [current] = desk.executor.positions()
    assert (current.stop_order_id, current.stop) == (second.client_order_id, Decimal("99.5"))
    assert desk.executor.unprotected() == []


async def test_an_old_stop_that_is_told_again_does_not_take_the_place_of_the_new_one(desk: Desk):
    position = await opened(desk)
    old = desk.venue.orders[position.stop_order_id]
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    [new] = desk.venue.resting(OrderPurpose.STOP)
    desk.venue.emit(old)
    await quiet(desk)
    [current] = desk.executor.positions()
    assert current.stop_order_id == new.client_order_id


async def test_stops_that_come_and_go_for_as_long_as_a_position_lives_do_not_gather(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as desk:
        position = await opened(desk)
        for _ in range(60):
            await replaced(desk)
        assert len(desk.executor._books.orders) <= 2 * ATTEMPTS_KEPT
    async with desk_at(tmp_path, venue) as desk:
        await desk.reconciler.reconcile()
        assert len(desk.executor._books.orders) <= 2 * ATTEMPTS_KEPT
        await replaced(desk)
        names = [request.client_order_id for request in venue.sent]
        assert len(names) == len(set(names)) > 60
        first = venue.orders[client_order_id(position.position_id, "stop", 0)]
        venue.emit(first)  # an old end that is told again
        await quiet(desk)
        [current] = desk.executor.positions()
        await desk.executor.close(current, CloseReason.EXIT)
        await quiet(desk)
        assert desk.executor._books.orders == {}
        assert desk.executor._books.gone == {}


async def replaced(desk: Desk) -> None:
    """The stop is cancelled at the venue, and perpd places another."""
    [current] = desk.executor.positions()
    desk.venue.vanish(current.stop_order_id)
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1


async def test_seconds_without_a_stop_are_counted(desk: Desk):
    position = await opened(desk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert desk.counts.counts["trading.unprotected_ms"] >= 2
    assert desk.executor.unprotected() == []
    assert {o.type for o in desk.venue.resting(OrderPurpose.STOP)} == {OrderType.STOP_MARKET}


async def test_a_stop_that_is_refused_is_placed_as_another_type_before_anything_is_given_up(desk: Desk):
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=-2010)] * 3}
    await desk.executor.open(signal(), approved())
    await quiet(desk)
    stops = [request for request in desk.venue.sent if request.purpose is OrderPurpose.STOP]
    assert [s.working_type for s in stops] == ["MARK_PRICE", "MARK_PRICE", "CONTRACT_PRICE", "CONTRACT_PRICE"]
    assert [s.close_position for s in stops] == [True, True, True, False]
    assert (stops[-1].quantity, stops[-1].reduce_only) == (2, True)
    assert desk.executor.unprotected() == []


async def test_without_a_stop_on_the_venue_perpd_closes_at_the_stop_itself(desk: Desk):
    away = [OrderRejected("no", code=-2010) for _ in range(100_000)]
    desk.venue.before = {OrderPurpose.STOP: away}
    entering = asyncio.create_task(desk.executor.open(signal(), approved()))
    await until(desk.executor.unprotected)
    desk.executor.on_price("AUSDT", 99.5)
    desk.executor.on_price("BUSDT", 1.0)
    assert desk.counts.counts.get("trading.software_stops", 0) == 0
    desk.venue.mark = Decimal("98.9")
    desk.executor.on_price("AUSDT", 98.9)
    desk.executor.on_price("AUSDT", 98.8)
    await entering
    assert (await desk.closed()).close_reason == "stop"
    assert desk.counts.counts["trading.software_stops"] == 1
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]) == 1


async def test_with_its_stop_on_the_venue_a_price_closes_nothing(desk: Desk):
    await opened(desk)
    desk.executor.on_price("AUSDT", 1.0)
    await quiet(desk)
    assert len(desk.executor.positions()) == 1


@pytest.fixture
async def trailing(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path, Venue(), instrument_of=lambda symbol: RULES, trail_r=1.0) as opened:
        yield opened


async def moved(desk: Desk, price: float) -> None:
    desk.executor._protector._trail_after_s.clear()
    desk.executor.on_price("AUSDT", price)
    await quiet(desk)


async def test_a_trailing_stop_places_the_new_one_before_it_cancels_the_old(trailing: Desk):
    first = await opened(trailing)
    venue, done = trailing.venue, []
    venue.known = lambda request: done.append(("place", request.client_order_id))
    cancel = venue.cancel

    async def noted(order):
        done.append(("cancel", order.client_order_id))
        return await cancel(order)

    venue.cancel = noted
    await moved(trailing, 101.0)
    [second] = venue.resting(OrderPurpose.STOP)
    assert done == [("place", second.client_order_id), ("cancel", first.stop_order_id)]
    [position] = trailing.executor.positions()
    assert (position.stop, position.stop_order_id) == (Decimal(100), second.client_order_id)
    assert trailing.counts.counts.get("trading.unprotected_ms", 0) < 1000
    await moved(trailing, 102.0)
    [third] = venue.resting(OrderPurpose.STOP)
    forms = [r.close_position for r in venue.sent if r.purpose is OrderPurpose.STOP]
    assert forms == [True, False, True]
    assert third.trigger_price == Decimal(101)
    assert await trailing.store.position(first.position_id) == trailing.executor.positions()[0]


async def test_a_stop_that_cannot_be_moved_stays(trailing: Desk):
    first = await opened(trailing)
    trailing.venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=-2021)]}
    await moved(trailing, 101.0)
    [stop] = trailing.venue.resting(OrderPurpose.STOP)
    assert stop.client_order_id == first.stop_order_id
    assert trailing.executor.positions() == (first,)
    assert trailing.executor.unprotected() == []


async def test_an_old_stop_that_could_not_be_cancelled_is_swept_by_reconciliation(trailing: Desk):
    await opened(trailing)
    cancel = trailing.venue.cancel

    async def away(order):
        raise VenueUnavailable("away")

    trailing.venue.cancel = away
    await moved(trailing, 101.0)
    assert len(trailing.venue.resting(OrderPurpose.STOP)) == 2
    trailing.venue.cancel = cancel
    await trailing.reconciler.reconcile()
    await quiet(trailing)
    [stop] = trailing.venue.resting(OrderPurpose.STOP)
    assert trailing.executor.positions()[0].stop_order_id == stop.client_order_id


async def test_a_stop_for_a_quantity_is_replaced_when_the_position_grows(trailing: Desk):
    await opened(trailing)
    await moved(trailing, 101.0)
    entry = next(r for r in trailing.venue.sent if r.purpose is OrderPurpose.ENTRY)
    trailing.venue.trade("AUSDT", entry.side, Decimal(1), entry.client_order_id)
    await quiet(trailing)
    [stop] = trailing.venue.resting(OrderPurpose.STOP)
    assert stop.quantity == 0
    assert trailing.executor.unprotected() == []


async def test_no_second_stop_is_placed_while_the_fate_of_the_first_is_unknown(desk: Desk):
    lost = [OrderOutcomeUnknown("no answer")]
    desk.venue.before = {OrderPurpose.STOP: lost}
    asked = desk.venue.order
    deaf = True

    async def unanswered(order):
        if deaf and order.purpose is OrderPurpose.STOP:
            raise VenueUnavailable("away")
        return await asked(order)

    desk.venue.order = unanswered
    entering = asyncio.create_task(desk.executor.open(signal(), approved()))
    await until(lambda: desk.counts.counts.get("trading.stop_failures", 0) > 3)
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.STOP]) == 1
    deaf = False
    await entering
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    assert desk.executor.unprotected() == []


async def test_without_room_for_another_stop_nothing_is_opened(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executor, "MOST_CONDITIONAL", 3)
    await opened(desk)
    answer = await desk.executor.open(signal("s2", "BUSDT"), approved())
    assert refusal(answer) is RefusalReason.ENTRIES_OFF
    assert "no room for a stop" in answer.detail
