"""Closing a position at market.

One exit at a time for a position, and none while the fate of an earlier one is unknown: never two fill.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

import msgspec
import structlog

from service.errors import VenueError
from service.ports import Clock, Exchange
from service.reactions import Reaction
from service.records import (
    CloseReason,
    Instrument,
    OrderPurpose,
    OrderRequest,
    OrderType,
    Position,
    PositionSide,
)
from service.trading.books import Books
from service.trading.orders import exit_leg, new_order
from service.trading.protection import Failure
from service.trading.sending import Rules, Sender
from service.trading.sizing import on_grid, on_tick

log = structlog.get_logger("trading.closing")

EXIT_ROOM = Decimal("0.03")
"""Fraction of the mark price by which a limit exit may trade worse."""


class Closer:
    """Exits. `exiting` holds the ids of positions with one in flight."""

    def __init__(self, exchange: Exchange, books: Books, sender: Sender, clock: Clock, rules: Rules) -> None:
        self._exchange = exchange
        self._rules = rules
        self._books = books
        self._sender = sender
        self._clock = clock
        self.exiting: set[str] = set()

    async def close(self, position: Position, reason: CloseReason) -> bool:
        """Close at market, reduce-only. False when it is not known to be closed yet.

        Stop and target rest until the venue is flat, so the position stays protected all the while. One that
        was not compared with the venue since the start is not closed: the exit could hit another's.
        """
        name = position.position_id
        if name in self._books.unconfirmed:
            log.warning("not closed before it is compared with the venue", symbol=position.symbol)
            self._books.reconcile_wanted.set()
            return False
        if name in self.exiting or name not in self._books.positions:
            return name not in self._books.positions
        self.exiting.add(name)
        try:
            return await self._exit(name, exit_leg(reason))
        finally:
            self.exiting.discard(name)

    async def _exit(self, name: str, leg: str, most: Decimal | None = None) -> bool:
        """Args: leg: which exit; most: what the venue takes in one order, where it refused the whole."""
        for order in self._books.working_orders():
            if order.position_id != name:
                continue
            if order.purpose is OrderPurpose.ENTRY:
                await self._sender.ask(order)  # what else it filled is closed as well
            elif order.purpose is OrderPurpose.EXIT and not await self._sender.ask(order):
                return False  # it may still fill: never two
        position = self._books.positions.get(name)
        if position is None:
            return True
        request = OrderRequest(
            client_order_id=await self._books.next_id(name, leg),
            symbol=position.symbol,
            side=position.position_side.exit_side,
            type=OrderType.MARKET,
            purpose=OrderPurpose.EXIT,
            position_id=name,
            quantity=position.quantity if most is None else min(position.quantity, most),
            reduce_only=True,
        )
        failure = await self._sender.send(request, new_order(request, self._clock.now_ms()))
        if failure is not None and failure.reaction is Reaction.LIMIT_INSTEAD:
            request, failure = await self._as_limit(position, leg, request, failure)
        elif failure is not None and failure.reaction is Reaction.REFRESH_RULES:
            request, failure = await self._on_their_grid(position, leg, request, failure)
        if failure is not None:
            self._books.changed.pop(request.client_order_id, None)
            if failure.reached:
                log.error("exit refused", symbol=position.symbol, code=failure.code, detail=failure.detail)
            else:
                log.error("exit not sent", symbol=position.symbol, detail=failure.detail)
            if failure.reaction is Reaction.LOOK_AT_POSITION:
                self._books.reconcile_wanted.set()
            return False
        await self._sender.wait_filled(request.client_order_id)
        left = self._books.positions.get(name)
        part = request.quantity or position.quantity
        if left is not None and part < position.quantity and left.quantity < position.quantity:
            return await self._exit(name, leg, part)  # filled: the rest follows at once
        return left is None

    async def _on_their_grid(
        self, position: Position, leg: str, refused: OrderRequest, failure: Failure
    ) -> tuple[OrderRequest, Failure | None]:
        """As much of the exit as one market order may be by the venue's rules of now."""
        try:
            instrument = await self._rules(position.symbol)
        except VenueError as error:
            return refused, Failure(code=failure.code, detail=f"{failure.detail}; rules unknown: {error}")
        whole = refused.quantity or position.quantity
        fitted = whole if instrument is None else on_grid(whole, instrument)
        if not 0 < fitted < whole:
            return refused, failure
        self._books.changed.pop(refused.client_order_id, None)
        request = msgspec.structs.replace(
            refused, client_order_id=await self._books.next_id(position.position_id, leg), quantity=fitted
        )
        log.warning(
            "exit is more than one market order may be, closing in parts",
            symbol=position.symbol,
            quantity=str(whole),
            part=str(fitted),
        )
        return request, await self._sender.send(request, new_order(request, self._clock.now_ms()))

    async def _as_limit(
        self, position: Position, leg: str, refused: OrderRequest, failure: Failure
    ) -> tuple[OrderRequest, Failure | None]:
        """The same exit at a price, immediate or cancelled: the venue takes no market order now."""
        try:
            account = await self._exchange.account()
            instrument = await self._rules(position.symbol)
        except VenueError as error:
            return refused, Failure(code=failure.code, detail=f"{failure.detail}; price unknown: {error}")
        held = next((p for p in account.positions if p.symbol == position.symbol), None)
        if held is None or instrument is None:
            return refused, failure
        self._books.changed.pop(refused.client_order_id, None)
        request = msgspec.structs.replace(
            refused,
            client_order_id=await self._books.next_id(position.position_id, leg),
            type=OrderType.LIMIT,
            price=exit_limit(held.mark_price, position.position_side, instrument),
            time_in_force="IOC",
        )
        log.warning("no market exit at these prices, trying a limit", symbol=position.symbol)
        return request, await self._sender.send(request, new_order(request, self._clock.now_ms()))


def exit_limit(mark: Decimal, side: PositionSide, instrument: Instrument) -> Decimal:
    """A price that trades at once unless the book is far from the mark, within the venue's own bounds."""
    room = 1 - EXIT_ROOM if side is PositionSide.LONG else 1 + EXIT_ROOM
    if side is PositionSide.LONG:
        least = max(mark * room, mark * instrument.multiplier_down, instrument.min_price)
        return on_tick(least, instrument.tick_size, ROUND_CEILING)
    most = mark * room
    if instrument.multiplier_up > 0:
        most = min(most, mark * instrument.multiplier_up)
    return on_tick(most, instrument.tick_size, ROUND_FLOOR)
