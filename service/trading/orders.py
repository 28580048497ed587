"""The life of an order as a pure state machine, and how our orders are named.

An event and what is known of the order go in; the order after it and instructions come out. The order
in which events arrive does not matter: a final order stays final, a filled quantity never falls, and an
event that cannot be is a fault in the answer, never an exception.

```
intended ─► sent ─► open ─► partly filled ─► filled          a conditional order (stop, target):
              └─► unknown ─┘       └─► cancelled, expired     open ─► triggered ─► filled, cancelled,
intended, sent, unknown ─► rejected                                                 expired, rejected
```
"""

import hashlib
from decimal import Decimal
from enum import StrEnum

import msgspec

from service.records import CloseReason, Order, OrderPurpose, OrderRequest, OrderStatus

PREFIX = "pp-"
"""Client ids of this daemon start with it, so that foreign orders are recognised."""
LEG_LETTERS = {
    "entry": "e",
    "stop": "s",
    "target": "t",
    "exit": "x",
    "exit_stop": "y",
    "exit_target": "z",
    "exit_expired": "w",
}
LEG_PURPOSES = {
    leg: OrderPurpose.EXIT if leg.startswith("exit") else OrderPurpose(leg) for leg in LEG_LETTERS
}
_EXIT_LEGS = {
    CloseReason.STOP: "exit_stop",
    CloseReason.TARGET: "exit_target",
    CloseReason.EXPIRED: "exit_expired",
}
_LEGS = {letter: leg for leg, letter in LEG_LETTERS.items()}
_EXIT_REASONS = {leg: reason for reason, leg in _EXIT_LEGS.items()}

_PROGRESS = {
    OrderStatus.INTENDED: 0,
    OrderStatus.SENT: 1,
    OrderStatus.UNKNOWN: 2,
    OrderStatus.OPEN: 3,
    OrderStatus.PARTLY_FILLED: 4,
    OrderStatus.TRIGGERED: 5,
}
RESTING = (OrderStatus.OPEN, OrderStatus.PARTLY_FILLED, OrderStatus.TRIGGERED)
_OURS = (OrderStatus.INTENDED, OrderStatus.SENT, OrderStatus.UNKNOWN)
"""The venue has not yet said that it has the order."""


# -- events -----------------------------------------------------------------------------------------


class Sent(msgspec.Struct, frozen=True):
    """The request is about to leave; once for each order."""


class Unanswered(msgspec.Struct, frozen=True):
    """It was sent and no usable answer came."""

    reason: str


class Refused(msgspec.Struct, frozen=True):
    """The venue said no, or nothing was sent."""

    reason: str


class Denied(msgspec.Struct, frozen=True):
    """The venue was asked by every way there is and has nothing of the order."""

    reason: str


class Reported(msgspec.Struct, frozen=True):
    """The venue's own view, by stream, answer or query."""

    order: Order


OrderEvent = Sent | Unanswered | Refused | Denied | Reported


# -- instructions -----------------------------------------------------------------------------------


class Instruction(StrEnum):
    """What is to be done about the order after an event."""

    SAVE = "save"  # it changed: write it down
    ASK = "ask"  # what is known of it is not certain: ask the venue before anything else on its symbol
    GUARDS = "guards"  # a conditional order rests: it protects its position, or must not be there
    UNGUARDED = "unguarded"  # a conditional order ended without executing
    ENDED = "ended"  # nothing more will come of it but late fills


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The order after an event. `fault` says what of the event cannot be, or ""."""

    order: Order
    instructions: tuple[Instruction, ...] = ()
    fault: str = ""

    @property
    def changed(self) -> bool:
        return Instruction.SAVE in self.instructions


# -- names ------------------------------------------------------------------------------------------


def client_order_id(position_id: str, leg: str, attempt: int) -> str:
    """Deterministic, 25 characters of the venue's alphabet whatever the symbol is written in.

    The position's id follows from the signal's, and so from strategy, symbol, candle and side.
    Args: leg: a key of LEG_LETTERS; attempt: 0 for the first, counted per leg.
    """
    digest = hashlib.blake2s(position_id.encode(), digest_size=9).hexdigest()
    return f"{PREFIX}{digest}-{LEG_LETTERS[leg]}{attempt:02d}"


def exit_leg(reason: CloseReason) -> str:
    """The leg of an exit at market. Its name tells why it was sent, to whoever books it after a crash."""
    return _EXIT_LEGS.get(reason, "exit")


def order_leg(client_id: str) -> str:
    """The leg that an id of `client_order_id` names; "" for any other id."""
    return _LEGS.get(client_id.rpartition("-")[2][:1], "") if is_ours(client_id) else ""


def exit_reason(client_id: str) -> CloseReason:
    """Why we sent an exit, by its name."""
    return _EXIT_REASONS.get(order_leg(client_id), CloseReason.EXIT)


def is_ours(client_id: str) -> bool:
    return client_id.startswith(PREFIX)


# -- the machine ------------------------------------------------------------------------------------


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


def step(order: Order, event: OrderEvent, now_ms: int) -> Step:
    """The order after the event, and what is to be done. Never raises.

    Args: now_ms: when we learned it; a report carries its own time.
    """
    if isinstance(event, Reported):
        return _reported(order, event.order)
    if isinstance(event, Sent):
        if order.status is OrderStatus.INTENDED:
            return _moved(order, OrderStatus.SENT, now_ms)
        return Step(order=order, fault=f"sent again while {order.status}")
    if isinstance(event, Unanswered):
        if order.status in (OrderStatus.INTENDED, OrderStatus.SENT):
            return _moved(order, OrderStatus.UNKNOWN, now_ms, event.reason, Instruction.ASK)
        asked = (Instruction.ASK,) if order.status is OrderStatus.UNKNOWN else ()
        return Step(order=order, instructions=asked)  # the venue spoke of it by another way already
    if isinstance(event, Refused):
        return _refused(order, event, now_ms)
    if order.status.final:
        return Step(order=order)
    arrived = order.status not in _OURS
    return _moved(order, OrderStatus.EXPIRED if arrived else OrderStatus.REJECTED, now_ms, event.reason)


def _refused(order: Order, event: Refused, now_ms: int) -> Step:
    if order.status in _OURS:
        return _moved(order, OrderStatus.REJECTED, now_ms, event.reason)
    if order.status is OrderStatus.REJECTED:
        return Step(order=order)
    fault = f"refused ({event.reason}) while {order.status}"
    asked = () if order.status.final else (Instruction.ASK,)
    return Step(order=order, instructions=asked, fault=fault)


def _moved(order: Order, status: OrderStatus, now_ms: int, reason: str = "", *more: Instruction) -> Step:
    after = msgspec.structs.replace(
        order, status=status, reason=reason or order.reason, updated_ms=max(now_ms, order.updated_ms)
    )
    return Step(order=after, instructions=(Instruction.SAVE, *_consequences(after), *more))


def _reported(order: Order, update: Order) -> Step:
    """Merge the venue's view. Ownership (position, purpose, type, side) is ours and never taken from it."""
    if (update.client_order_id, update.symbol) != (order.client_order_id, order.symbol):
        return Step(order=order, fault="the update belongs to another order")
    status, fault = _next_status(order, update)
    filled_more = update.filled_quantity > order.filled_quantity
    if not fault and order.quantity and update.filled_quantity > order.quantity:
        fault = f"filled {update.filled_quantity} of {order.quantity}"
    for name in ("venue_order_id", "became_order_id"):
        before, now = getattr(order, name), getattr(update, name)
        if not fault and before and now not in ("", before):
            fault = f"{name} {before} became {now}"
    merged = msgspec.structs.replace(
        order,
        status=status,
        venue_order_id=order.venue_order_id or update.venue_order_id,
        became_order_id=order.became_order_id or update.became_order_id,
        quantity=order.quantity or update.quantity,
        filled_quantity=max(order.filled_quantity, update.filled_quantity),
        average_price=update.average_price if filled_more else order.average_price or update.average_price,
        reason=update.reason or order.reason,
    )
    if merged == order:
        # Told again, it still says where the order stands: a stop that was given up for lost rests.
        return Step(order=order, instructions=_consequences(order), fault=fault)
    merged = msgspec.structs.replace(merged, updated_ms=max(order.updated_ms, update.updated_ms))
    return Step(order=merged, instructions=(Instruction.SAVE, *_consequences(merged)), fault=fault)


def _consequences(order: Order) -> tuple[Instruction, ...]:
    found = []
    if order.type.conditional and order.status in RESTING:
        found.append(Instruction.GUARDS)
    if order.status.final:
        found.append(Instruction.ENDED)
        if order.type.conditional and order.status is not OrderStatus.FILLED:
            found.append(Instruction.UNGUARDED)
    return tuple(found)


def _next_status(order: Order, update: Order) -> tuple[OrderStatus, str]:
    """The status after a report, and what of it cannot be."""
    now, then = update.status, order.status
    if now in _OURS:
        return then, f"the venue cannot report {now}"
    if now is OrderStatus.TRIGGERED and not order.type.conditional:
        return then, f"an order of type {order.type} cannot be triggered"
    if then.final:
        return _after_the_end(order, update)
    if now.final:
        return now, ""
    return (now, "") if _PROGRESS[now] > _PROGRESS[then] else (then, "")


def _after_the_end(order: Order, update: Order) -> tuple[OrderStatus, str]:
    """A report about an order that ended. What the venue shows outweighs what we concluded from silence."""
    now, then = update.status, order.status
    if now is then:
        return then, ""
    if now.final:
        if now is OrderStatus.FILLED and update.filled_quantity > order.filled_quantity:
            return now, f"{then} became {now}"
        if then is OrderStatus.REJECTED and not order.venue_order_id:
            return now, f"{then} became {now}"
        return then, f"{then} cannot become {now}"
    if then is OrderStatus.REJECTED and not order.venue_order_id:
        return now, f"{then} became {now}"  # we had concluded that it never arrived
    return then, ""  # told late
