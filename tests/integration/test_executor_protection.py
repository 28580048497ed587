"""A position is never naked, and never has two stops: against an in-memory venue."""

from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.records import OrderPurpose, OrderStatus, OrderType
from service.trading.orders import client_order_id
from tests.integration.trading_desk import Desk, Venue, desk_at, opened, quiet


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path, Venue()) as opened:
        yield opened


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


async def test_seconds_without_a_stop_are_counted(desk: Desk):
    position = await opened(desk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert desk.counts.counts["trading.unprotected_ms"] >= 2
    assert desk.executor.unprotected() == []
    assert {o.type for o in desk.venue.resting(OrderPurpose.STOP)} == {OrderType.STOP_MARKET}
