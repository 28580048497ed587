"""A position of ours from intention to close. Pure: each function returns the record that follows."""

import hashlib
from decimal import Decimal

import msgspec

from service.records import CloseReason, Fill, Order, OrderPurpose, Position, PositionSide, Signal
from service.trading.orders import exit_reason
from service.trading.sizing import Approved

ZERO = Decimal(0)

_VENUE_PREFIXES = (
    ("autoclose-", CloseReason.LIQUIDATION),
    ("adl_autoclose", CloseReason.ADL),
    ("settlement_autoclose-", CloseReason.SETTLEMENT),
)
_PURPOSE_REASONS = {
    OrderPurpose.STOP: CloseReason.STOP,
    OrderPurpose.TARGET: CloseReason.TARGET,
}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A position after a fill. `foreign` is what of the fill belongs to no position of ours."""

    position: Position
    closed: bool
    foreign: Decimal


def position_id_of(signal_id: str) -> str:
    """One signal opens at most one position, so its id follows from the signal's."""
    return "p" + hashlib.blake2s(signal_id.encode(), digest_size=10).hexdigest()


def intended(signal: Signal, approved: Approved, now_ms: int) -> Position:
    """The position that the entry order shall open: no quantity yet.

    Stop and target stay where the strategy put them, whatever the entry's fill: they mark where its
    idea is wrong or done, and that does not move with our slippage.
    """
    return Position(
        position_id=position_id_of(signal.signal_id),
        signal_id=signal.signal_id,
        symbol=signal.symbol,
        position_side=signal.position_side,
        quantity=ZERO,
        entry_price=ZERO,
        stop=approved.stop,
        target=approved.target,
        leverage=approved.leverage,
        margin=approved.margin,
        opened_ms=now_ms,
        first_stop=approved.stop,
    )


def is_open(position: Position) -> bool:
    return position.quantity > 0 and position.closed_ms == 0


def after_fill(position: Position, fill: Fill, fee: Decimal, realised_pnl: Decimal) -> Outcome:
    """The position after one of its fills, entry or exit.

    Args: fee, realised_pnl: as the ledger books them.
    """
    if fill.side is position.position_side.entry_side:
        return Outcome(position=_grown(position, fill, fee), closed=False, foreign=ZERO)
    closing = min(fill.quantity, position.quantity)
    rest = position.quantity - closing
    moved = msgspec.structs.replace(
        position,
        quantity=rest,
        realised_pnl=position.realised_pnl + realised_pnl,
        fees=position.fees + fee,
        closed_ms=0 if rest else fill.filled_ms,
        exit_price=fill.price if not rest else position.exit_price,
    )
    return Outcome(position=moved, closed=not rest, foreign=fill.quantity - closing)


def _grown(position: Position, fill: Fill, fee: Decimal) -> Position:
    quantity = position.quantity + fill.quantity
    cost = position.quantity * position.entry_price + fill.quantity * fill.price
    return msgspec.structs.replace(
        position,
        quantity=quantity,
        entry_price=cost / quantity,
        margin=cost / position.leverage,
        fees=position.fees + fee,
        opened_ms=position.opened_ms if position.quantity else fill.filled_ms,
    )


def with_close(position: Position, reason: CloseReason, at_ms: int, traded: Decimal) -> Position:
    """The closed record. `traded` is all that was bought or sold for the entry.

    The exit price is the average over all exits: what was realised, per unit, away from the entry.
    """
    exit_price = position.exit_price
    if traded:
        exit_price = position.entry_price + position.position_side.sign * position.realised_pnl / traded
    return msgspec.structs.replace(
        position,
        quantity=ZERO,
        closed_ms=position.closed_ms or at_ms,
        close_reason=reason.value,
        exit_price=exit_price,
        protected_ms=0,
    )


def never_opened(position: Position, now_ms: int) -> Position:
    """The end of an intention whose entry was refused; without an entry price it counts as no trade."""
    return msgspec.structs.replace(position, closed_ms=max(now_ms, 1), close_reason="")


def reopened(position: Position) -> Position:
    """An ended position whose entry filled more than was known: it holds that and has no protection."""
    return msgspec.structs.replace(
        position, closed_ms=0, close_reason="", stop_order_id="", target_order_id="", protected_ms=0
    )


def without_protection(position: Position, purpose: OrderPurpose) -> Position:
    """The position without its stop, or without its target."""
    if purpose is OrderPurpose.STOP:
        return msgspec.structs.replace(position, stop_order_id="", protected_ms=0)
    return msgspec.structs.replace(position, target_order_id="")


def close_reason(fill: Fill, order: Order | None) -> CloseReason:
    """Why a fill closed a position: the venue's own client ids first, then our order's purpose and name."""
    for prefix, reason in _VENUE_PREFIXES:
        if fill.client_order_id.startswith(prefix):
            return reason
    if order is None:
        return CloseReason.MANUAL
    if order.purpose is OrderPurpose.EXIT:
        return exit_reason(order.client_order_id)
    return _PURPOSE_REASONS.get(order.purpose, CloseReason.MANUAL)


def beyond(position: Position, held: Decimal) -> Decimal:
    """What is held in the position's direction and is not the position's. Args: held: signed quantity."""
    return max(held * position.position_side.sign - position.quantity, ZERO)


def side_of(quantity: Decimal) -> PositionSide:
    return PositionSide.LONG if quantity > 0 else PositionSide.SHORT
