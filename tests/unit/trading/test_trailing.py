from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import Position, PositionSide
from service.trading.trailing import trailed_stop

TICK = Decimal("0.1")


def position(side: PositionSide = PositionSide.LONG, stop: str = "98") -> Position:
    first = Decimal(100) - side.sign * 2
    return Position(
        position_id="p",
        signal_id="s",
        symbol="AUSDT",
        position_side=side,
        quantity=Decimal(1),
        entry_price=Decimal(100),
        stop=Decimal(stop),
        target=Decimal(110),
        leverage=1,
        margin=Decimal(100),
        opened_ms=1,
        first_stop=first,
    )


@pytest.mark.parametrize(
    ("stop", "price", "moved"),
    [
        ("98", 100.0, None),  # at the entry the first stop is where it belongs
        ("98", 100.4, None),  # not worth an order yet
        ("98", 100.5, "98.5"),
        ("98", 103.07, "101.0"),  # away from the price, on the tick
        ("101", 103.0, None),
        ("101", 99.0, None),  # never back
    ],
)
def test_the_stop_of_a_long_follows_the_price_at_its_first_risk(stop, price, moved):
    expected = None if moved is None else Decimal(moved)
    assert trailed_stop(position(stop=stop), price, 1.0, TICK) == expected


def test_the_stop_of_a_short_is_the_mirror_image():
    short = position(PositionSide.SHORT, "102")
    assert trailed_stop(short, 99.5, 1.0, TICK) == Decimal("101.5")
    assert trailed_stop(short, 96.93, 1.0, TICK) == Decimal("99.0")
    assert trailed_stop(short, 101.0, 1.0, TICK) is None


def test_off_by_default_and_without_a_known_risk():
    assert trailed_stop(position(), 200.0, 0.0, TICK) is None
    assert (
        trailed_stop(msgspec.structs.replace(position(), first_stop=Decimal(100)), 200.0, 1.0, TICK) is None
    )


@given(st.lists(st.floats(1, 1000), max_size=20), st.sampled_from(list(PositionSide)), st.floats(0.1, 5))
def test_a_stop_only_ever_moves_in_favour_and_stays_behind_the_price(prices, side, trail_r):
    held = position(side, "98" if side is PositionSide.LONG else "102")
    for price in prices:
        stop = trailed_stop(held, price, trail_r, TICK)
        if stop is None:
            continue
        assert (stop - held.stop) * side.sign > 0
        assert (Decimal(price) - stop) * side.sign > 0
        held = msgspec.structs.replace(held, stop=stop)
