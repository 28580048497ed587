"""Closing a position at market.

One exit at a time for a position, and none while the fate of an earlier one is unknown: never two fill.
"""

import structlog

from service.ports import Clock
from service.records import CloseReason, OrderPurpose, OrderRequest, OrderType, Position
from service.trading.books import Books
from service.trading.orders import new_order
from service.trading.protection import POSITION_GONE
from service.trading.sending import Sender

log = structlog.get_logger("trading.closing")


class Closer:
    """Exits. `exiting` holds the ids of positions with one in flight."""

    def __init__(self, books: Books, sender: Sender, clock: Clock) -> None:
        self._books = books
        self._sender = sender
        self._clock = clock
        self.exiting: set[str] = set()

    async def close(self, position: Position, reason: CloseReason) -> bool:
        """Close at market, reduce-only. False when it is not known to be closed yet.

        Stop and target rest until the venue is flat, so the position stays protected all the while.
        """
        name = position.position_id
        if name in self.exiting or name not in self._books.positions:
            return name not in self._books.positions
        self.exiting.add(name)
        self._books.meant[name] = reason
        try:
            return await self._exit(name)
        finally:
            self.exiting.discard(name)

    async def _exit(self, name: str) -> bool:
        for order in self._books.working_orders():
            earlier = order.position_id == name and order.purpose is OrderPurpose.EXIT
            if earlier and not await self._sender.ask(order):
                return False  # it may still fill: never two
        position = self._books.positions.get(name)
        if position is None:
            return True
        request = OrderRequest(
            client_order_id=await self._books.next_id(name, "exit"),
            symbol=position.symbol,
            side=position.position_side.exit_side,
            type=OrderType.MARKET,
            purpose=OrderPurpose.EXIT,
            position_id=name,
            quantity=position.quantity,
            reduce_only=True,
        )
        failure = await self._sender.send(request, new_order(request, self._clock.now_ms()))
        if failure is not None:
            self._books.changed.pop(request.client_order_id, None)
            log.error("exit refused", symbol=position.symbol, code=failure.code, detail=failure.detail)
            if failure.code in POSITION_GONE:
                self._books.reconcile_wanted.set()
            return False
        await self._sender.wait_filled(request.client_order_id)
        return name not in self._books.positions
