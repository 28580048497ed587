"""What perpd does about a position that it did not open. Pure.

ignore: it is left alone, and its symbol is not traded. protect: it gets a stop where none rests, and
nothing else is ever sent for it. adopt: it becomes a position of ours, with a stop and without a target;
it takes a place among the positions and `flatten` closes it. What somebody adds to a position of ours is
ours only with adopt; otherwise it stays theirs and blocks the symbol.
"""

import hashlib
from collections.abc import Sequence
from decimal import Decimal

from service.records import (
    Instrument,
    Order,
    OrderPurpose,
    OrderType,
    Position,
    VenuePosition,
)
from service.trading.positions import side_of
from service.trading.sizing import fitted_trigger

PREFIX = "foreign:"
GUEST = f"{PREFIX}protect:"
"""Signal ids of positions taken over begin with these; a guest is only protected."""


def is_foreign(position: Position) -> bool:
    """It was taken over: how it does says nothing about our signals."""
    return position.signal_id.startswith(PREFIX)


def is_guest(position: Position) -> bool:
    """It has a stop of ours and is nobody's business otherwise."""
    return position.signal_id.startswith(GUEST)


def guarded_elsewhere(found: VenuePosition, resting: Sequence[Order]) -> bool:
    """A stop that closes it rests already, whoever placed it."""
    closing = side_of(found.quantity).exit_side
    return any(
        order.symbol == found.symbol and order.side is closing and order.type is OrderType.STOP_MARKET
        for order in resting
    )


def taken_over(
    found: VenuePosition, policy: str, stop_fraction: float, instrument: Instrument | None, now_ms: int
) -> Position:
    """The position as ours. Its stop lies `stop_fraction` of the mark price away from it."""
    side = side_of(found.quantity)
    stop = found.mark_price * (1 - side.sign * Decimal(repr(stop_fraction)))
    if instrument is not None:
        stop = fitted_trigger(stop, side, OrderPurpose.STOP, instrument)
    name = f"{PREFIX}{policy}:{found.symbol}:{now_ms}"
    quantity = abs(found.quantity)
    leverage = found.leverage or 1
    return Position(
        position_id="f" + hashlib.blake2s(name.encode(), digest_size=10).hexdigest(),
        signal_id=name,
        symbol=found.symbol,
        position_side=side,
        quantity=quantity,
        entry_price=found.entry_price,
        stop=stop,
        target=Decimal(0),
        leverage=leverage,
        margin=quantity * found.entry_price / leverage,
        opened_ms=now_ms,
        first_stop=stop,
    )
