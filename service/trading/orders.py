"""The life of an order as a pure state machine, and how our orders are named.

What the venue says is merged into what is known; order of arrival does not matter. A final order
stays final, a filled quantity never falls, and what cannot be is reported as a fault, not raised.
"""

import hashlib
from decimal import Decimal

import msgspec

from service.records import Order, OrderRequest, OrderStatus

PREFIX = "pp-"
"""Client ids of this daemon start with it, so that foreign orders are recognised."""
LEG_LETTERS = {"entry": "e", "stop": "s", "target": "t", "exit": "x"}

_PROGRESS = {
    OrderStatus.INTENDED: 0,
    OrderStatus.SENT: 1,
    OrderStatus.UNKNOWN: 2,
    OrderStatus.OPEN: 3,
    OrderStatus.PARTLY_FILLED: 4,
    OrderStatus.TRIGGERED: 5,
}


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What an update made of an order. `fault` says what in the update cannot be, or ""."""

    order: Order
    changed: bool
    fault: str = ""


def client_order_id(position_id: str, leg: str, attempt: int) -> str:
    """Deterministic, 26 characters of the venue's alphabet whatever the symbol is written in.

    Args: leg: entry, stop, target or exit; attempt: 0 for the first, counted per leg.
    """
    digest = hashlib.blake2s(position_id.encode(), digest_size=9).hexdigest()
    return f"{PREFIX}{digest}-{LEG_LETTERS[leg]}{attempt:02d}"


def is_ours(client_id: str) -> bool:
    return client_id.startswith(PREFIX)


def new_order(request: OrderRequest, now_ms: int) -> Order:
    """The order as it is written down before it is sent."""
    return Order(
        client_order_id=request.client_order_id,
        venue_order_id="",
        position_id=request.position_id,
        symbol=request.symbol,
        side=request.side,
        type=request.type,
        purpose=request.purpose,
        status=OrderStatus.INTENDED,
        quantity=request.quantity or Decimal(0),
        filled_quantity=Decimal(0),
        average_price=Decimal(0),
        trigger_price=request.trigger_price or Decimal(0),
        reason="",
        created_ms=now_ms,
        updated_ms=now_ms,
    )


def with_status(order: Order, status: OrderStatus, now_ms: int, reason: str = "") -> Applied:
    """Our own knowledge of the order's status, merged as an update."""
    update = msgspec.structs.replace(
        order, status=status, updated_ms=max(now_ms, order.updated_ms), reason=reason or order.reason
    )
    return apply(order, update)


def apply(order: Order, update: Order) -> Applied:
    """Merge what the venue (or we ourselves) learned into what is known of the order.

    Ownership (position, purpose, type, side) is ours and never taken from an update.
    """
    if (update.client_order_id, update.symbol) != (order.client_order_id, order.symbol):
        return Applied(order=order, changed=False, fault="the update belongs to another order")
    status, fault = _next_status(order, update)
    filled_more = update.filled_quantity > order.filled_quantity
    if not fault and order.quantity and update.filled_quantity > order.quantity:
        fault = f"filled {update.filled_quantity} of {order.quantity}"
    if not fault and order.venue_order_id and update.venue_order_id not in ("", order.venue_order_id):
        fault = f"venue order id {order.venue_order_id} became {update.venue_order_id}"
    merged = msgspec.structs.replace(
        order,
        status=status,
        venue_order_id=order.venue_order_id or update.venue_order_id,
        quantity=order.quantity or update.quantity,
        filled_quantity=max(order.filled_quantity, update.filled_quantity),
        average_price=update.average_price if filled_more else order.average_price or update.average_price,
        reason=update.reason or order.reason,
    )
    if merged == order:
        return Applied(order=order, changed=False, fault=fault)
    merged = msgspec.structs.replace(merged, updated_ms=max(order.updated_ms, update.updated_ms))
    return Applied(order=merged, changed=True, fault=fault)


def _next_status(order: Order, update: Order) -> tuple[OrderStatus, str]:
    now, then = update.status, order.status
    if then.final:
        if now.final and now is not then:
            # a fill that the venue made outweighs what we concluded from silence
            if now is OrderStatus.FILLED and update.filled_quantity > order.filled_quantity:
                return now, f"{then} became {now}"
            return then, f"{then} cannot become {now}"
        return then, ""
    if now.final:
        return now, ""
    if now is OrderStatus.TRIGGERED and not order.type.conditional:
        return then, f"an order of type {order.type} cannot be triggered"
    return (now, "") if _PROGRESS[now] > _PROGRESS[then] else (then, "")
