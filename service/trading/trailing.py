"""A stop that follows the price. Pure: a position and a price in, the better stop out."""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from service.records import Position, PositionSide
from service.trading.sizing import on_tick

LEAST_STEP = Decimal("0.25")
"""Of the trail's distance: a smaller move is not worth an order and the moment in which two stops rest."""


def trailed_stop(position: Position, price: float, trail_r: float, tick: Decimal) -> Decimal | None:
    """The stop at `trail_r` times the first risk behind the price; None while the present one will do.

    It only ever moves in the position's favour, and starts once the price is further from the entry than
    the trail is long. Args: trail_r: in R, the distance from entry to first stop; 0 never trails.
    """
    risk = abs(position.entry_price - (position.first_stop or position.stop))
    if not trail_r or not risk:
        return None
    sign = position.position_side.sign
    distance = risk * Decimal(repr(trail_r))
    rounding = ROUND_FLOOR if position.position_side is PositionSide.LONG else ROUND_CEILING
    stop = on_tick(Decimal(repr(price)) - sign * distance, tick, rounding)
    gained = (stop - position.stop) * sign
    return stop if gained >= distance * LEAST_STEP and stop > 0 else None
