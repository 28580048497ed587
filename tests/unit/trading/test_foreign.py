from decimal import Decimal

import msgspec
import pytest

from service.records import (
    Order,
    OrderPurpose,
    OrderStatus,
    OrderType,
    PositionSide,
    Side,
    VenuePosition,
)
from service.trading.foreign import guarded_elsewhere, is_foreign, is_guest, taken_over


def held(quantity: str = "3") -> VenuePosition:
    return VenuePosition(
        symbol="FUSDT",
        quantity=Decimal(quantity),
        entry_price=Decimal(90),
        mark_price=Decimal(100),
        unrealised_pnl=Decimal(0),
        liquidation_price=Decimal(0),
        leverage=0,
        updated_ms=1,
    )


def stop(side: Side, **changes: object) -> Order:
    order = Order(
        client_order_id="web_1",
        venue_order_id="1",
        position_id="",
        symbol="FUSDT",
        side=side,
        type=OrderType.STOP_MARKET,
        purpose=OrderPurpose.STOP,
        status=OrderStatus.OPEN,
        quantity=Decimal(0),
        filled_quantity=Decimal(0),
        average_price=Decimal(0),
        trigger_price=Decimal(90),
        reason="",
        created_ms=1,
        updated_ms=1,
    )
    return msgspec.structs.replace(order, **changes)


@pytest.mark.parametrize(("quantity", "side", "level"), [("3", "LONG", "95"), ("-3", "SHORT", "105")])
def test_the_stop_lies_a_fraction_of_the_mark_away_on_the_losing_side(quantity, side, level):
    position = taken_over(held(quantity), "adopt", 0.05, None, 7)
    assert (position.position_side, position.quantity) == (PositionSide(side), 3)
    assert position.stop == Decimal(level)
    assert (position.entry_price, position.target, position.leverage) == (90, 0, 1)


def test_a_guest_is_only_protected():
    guest, adopted = (taken_over(held(), policy, 0.05, None, 7) for policy in ("protect", "adopt"))
    assert (is_guest(guest), is_guest(adopted)) == (True, False)
    assert is_foreign(guest)
    assert is_foreign(adopted)
    assert guest.position_id != adopted.position_id


@pytest.mark.parametrize(
    ("order", "guarded"),
    [
        (stop(Side.SELL), True),
        (stop(Side.BUY), False),
        (stop(Side.SELL, symbol="GUSDT"), False),
        (stop(Side.SELL, type=OrderType.TAKE_PROFIT_MARKET), False),
    ],
)
def test_a_stop_that_closes_it_is_enough_whoever_placed_it(order, guarded):
    assert guarded_elsewhere(held(), [order]) is guarded
