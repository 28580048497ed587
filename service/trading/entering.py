"""Entering a position: leverage, the intention written down, one market order, protection."""

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.ports import Clock, Exchange, StateStore
from service.reactions import Reaction
from service.records import (
    OrderPurpose,
    OrderRequest,
    OrderType,
    Position,
    RefusalReason,
    Signal,
)
from service.settings import TradingSettings
from service.trading.bookkeeping import Bookkeeper
from service.trading.books import Books
from service.trading.orders import client_order_id, new_order
from service.trading.positions import intended, is_open, position_id_of
from service.trading.protecting import Protector
from service.trading.protection import Failure
from service.trading.ranking import Refused
from service.trading.sending import Rules, Sender
from service.trading.sizing import Approved, fitted_quantity

log = structlog.get_logger("trading.entering")


class Opener:
    """Entries, one per signal for ever; a second order only where the first broke the venue's grid."""

    def __init__(
        self,
        exchange: Exchange,
        store: StateStore,
        books: Books,
        bookkeeper: Bookkeeper,
        sender: Sender,
        protector: Protector,
        clock: Clock,
        settings: TradingSettings,
        *,
        margin_type: str,
        rules: Rules,
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._books = books
        self._bookkeeper = bookkeeper
        self._sender = sender
        self._protector = protector
        self._clock = clock
        self._margin_type = margin_type
        self._rules = rules
        self._settings = settings

    async def enter(self, signal: Signal, approved: Approved) -> Position | Refused:
        name = position_id_of(signal.signal_id)
        if await self._store.order(client_order_id(name, "entry", 0)) is not None:
            return Refused(
                reason=RefusalReason.SYMBOL_HELD, detail="1 entry of this signal exists, 0 allowed"
            )
        try:
            await self._exchange.set_leverage(signal.symbol, approved.leverage, self._margin_type)
        except VenueError as error:
            return _rejected(error, f"leverage {approved.leverage}x")
        position = intended(signal, approved, self._clock.now_ms())
        request = OrderRequest(
            client_order_id=client_order_id(name, "entry", 0),
            symbol=signal.symbol,
            side=signal.position_side.entry_side,
            type=OrderType.MARKET,
            purpose=OrderPurpose.ENTRY,
            position_id=name,
            quantity=approved.quantity,
        )
        order = new_order(request, self._clock.now_ms())
        try:
            await self._store.save_intent(position, order)
        except DataDirectoryUnusable as error:
            self._books.note_store(error)
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail=f"state cannot be written: {error}")
        self._books.positions[name] = position
        self._books.begun.add(name)
        failure = await self._sender.send(request, order)
        if failure is not None and failure.reaction is Reaction.REFRESH_RULES:
            request, failure = await self._once_more(request, approved, failure)
        await self._sender.wait_filled(request.client_order_id)
        return await self._entered_as(name, request.client_order_id, failure)

    async def _once_more(
        self, refused: OrderRequest, approved: Approved, failure: Failure
    ) -> tuple[OrderRequest, Failure | None]:
        """The same entry on the venue's rules as they are now; the refused one when none fits them."""
        try:
            instrument = await self._rules(refused.symbol)
        except VenueError as error:
            return refused, Failure(code=failure.code, detail=f"{failure.detail}; rules not read: {error}")
        if instrument is None:
            return refused, failure
        quantity = fitted_quantity(approved.quantity, approved.entry, instrument)
        if isinstance(quantity, Refused):
            return refused, Failure(code=failure.code, detail=f"{failure.detail}; {quantity.detail}")
        again = msgspec.structs.replace(
            refused,
            client_order_id=client_order_id(refused.position_id, "entry", 1),
            quantity=quantity,
        )
        order = new_order(again, self._clock.now_ms())
        try:
            await self._store.save_order(order)
        except DataDirectoryUnusable as error:
            self._books.note_store(error)
            return refused, failure
        log.warning("entry refused by the venue's rules, once more", symbol=again.symbol, quantity=quantity)
        self._books.changed.pop(refused.client_order_id, None)
        return again, await self._sender.send(again, order)

    async def _entered_as(self, name: str, order_id: str, failure: Failure | None) -> Position | Refused:
        order = await self._books.known(order_id)
        position = self._books.positions.get(name)
        if position is not None and is_open(position):
            await self._protector.placed(name, self._settings.unprotected_limit_s)
            return self._books.positions.get(name, position)
        if order is not None and not self._books.ended(order):
            return Refused(
                reason=RefusalReason.ORDER_UNKNOWN,
                detail=f"no whole answer within {self._settings.answer_limit_s:g} s; the symbol stays busy",
            )
        if position is None:  # opened and closed again meanwhile
            stored = await self._store.position(name)
            if stored is not None and stored.entry_price:
                return stored
        await self._bookkeeper.give_up_entry(name)
        detail = failure.detail if failure else f"the venue: {order.reason if order else 'no order'}"
        return Refused(reason=RefusalReason.ORDER_REJECTED, detail=detail)


def _rejected(error: VenueError, what: str) -> Refused:
    return Refused(reason=RefusalReason.ORDER_REJECTED, detail=f"{what}: {error.words}")
