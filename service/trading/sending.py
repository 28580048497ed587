"""Sending an order, waiting for its end, and asking what became of it.

An order is sent once. No usable answer means asking by client id until it is known.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal

import msgspec
import structlog

from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    VenueCredentials,
    VenueError,
    VenueMalformed,
    VenueUnavailable,
)
from service.ports import Clock, Exchange, Recorder
from service.reactions import Reaction
from service.records import Fill, Instrument, Order, OrderPurpose, OrderRequest, OrderStatus
from service.trading.bookkeeping import CONTRADICTIONS, Bookkeeper
from service.trading.books import Books
from service.trading.ledger import Ledger
from service.trading.orders import (
    RESTING,
    Denied,
    Refused,
    Reported,
    Sent,
    Unanswered,
    step,
)
from service.trading.outbox import Outbox
from service.trading.protection import Failure

log = structlog.get_logger("trading.sending")

BARS_ENTRIES = {
    Reaction.STOP_OPENING: 600.0,
    Reaction.WRONG_MODE: math.inf,
    Reaction.CREDENTIALS: math.inf,
}
"""Refusals that would meet every entry, and for how many wall seconds; without end until the next start."""
EXPECTED = (Reaction.CLOSE_NOW, Reaction.SKIP, Reaction.LOOK_AT_POSITION, Reaction.LOOK_FOR_STOP)
"""Refusals that the market brings about: they say nothing about the way orders go."""
ORDER_WINDOW = 20
Rules = Callable[[str], Awaitable[Instrument | None]]
"""Reads the venue's rules anew and gives those of a symbol. Raises VenueError."""
ASK_DELAYS_S = (0.1, 0.3, 0.8, 1.5, 3.0)
CLOCKS_DIFFER_MS = 10_000  # our time of an order against the venue's of its fills
ZERO = Decimal(0)


async def pause(clock: Clock, wall_s: float) -> None:
    """Sleep wall seconds, however fast market time runs."""
    await clock.sleep_s(wall_s * clock.speed)


class Sender:
    """Orders to the venue and questions about them.

    Args: answer_limit_s: wall seconds until an order without news is asked for; ask_delays_s: wall
    seconds before each question; halted: why nothing may be opened, or '': asked as an entry leaves;
    order_window: outcomes of last orders that are kept.
    """

    def __init__(
        self,
        exchange: Exchange,
        books: Books,
        bookkeeper: Bookkeeper,
        ledger: Ledger,
        outbox: Outbox,
        clock: Clock,
        recorder: Recorder,
        *,
        answer_limit_s: float,
        order_window: int = ORDER_WINDOW,
        ask_delays_s: Sequence[float] = ASK_DELAYS_S,
        halted: Callable[[], str] = lambda: "",
    ) -> None:
        self._exchange = exchange
        self._halted = halted
        self.outcomes: deque[bool] = deque(maxlen=order_window)  # of the last orders: true where it failed
        self._books = books
        self._bookkeeper = bookkeeper
        self._ledger = ledger
        self._outbox = outbox
        self._clock = clock
        self._recorder = recorder
        self._answer_limit_s = answer_limit_s
        self._ask_delays_s = tuple(ask_delays_s)

    async def send(self, request: OrderRequest, order: Order) -> Failure | None:
        """Send one order that is written down, once. A Failure says that nothing rests or fills there."""
        name = request.client_order_id
        if request.purpose is OrderPurpose.ENTRY:
            self._outbox.put("orders", order)  # it was written with its position
        else:
            # Nobody else changes an order before it is sent. With the lock, a stop would wait for what is
            # written of its entry; without, the two share a sync.
            await self._books.save_order(order)
        async with self._books.lock:
            halted = ""
            if request.purpose is OrderPurpose.ENTRY:
                self._books.remember(order)
                # It may have been halted or blocked since it was approved, and while the lock was waited for.
                halted = self._halted() or self._books.foreign.get(request.symbol, "")
            if not halted:
                order = step(order, Sent(), self._clock.now_ms()).order
                self._books.orders[name] = order
                self._books.changed.setdefault(name, asyncio.Event())
                self._books.versions[order.symbol] += 1
        if halted:
            await self._bookkeeper.tell(order, Refused(f"nothing was sent: {halted}"))
            return Failure(code=0, detail=f"nothing was sent: {halted}")
        self._recorder.count("trading.orders")
        started_s = self._clock.monotonic_s()
        try:
            answer = await self._exchange.place(request)
        except (OrderOutcomeUnknown, VenueMalformed) as error:
            return await self._send_unknown(order, error)
        except VenueError as error:
            if error.reaction is Reaction.UNKNOWN:  # a client id that is taken: our earlier send landed
                return await self._send_unknown(order, error)
            return await self._send_failed(order, error)
        finally:
            self._recorder.record("trading.place", self._clock.monotonic_s() - started_s)
        self.outcomes.append(False)
        await self._bookkeeper.learn(answer)
        return None

    async def _send_unknown(self, order: Order, error: VenueError) -> Failure | None:
        name = order.client_order_id
        self._recorder.count("trading.orders_unknown")
        self.outcomes.append(True)
        order = await self._bookkeeper.tell(order, Unanswered(str(error)))
        log.warning(
            "order without an answer: asking", symbol=order.symbol, client_order_id=name, error=str(error)
        )
        await self.ask(order)
        order = self._books.orders.get(name, order)
        if order.status is OrderStatus.REJECTED:
            return Failure(code=0, detail=order.reason)
        return None

    async def _send_failed(self, order: Order, error: VenueError) -> Failure:
        self._recorder.count("trading.orders_rejected")
        self.outcomes.append(error.reaction not in EXPECTED)
        reached = error.answered or not isinstance(error, VenueUnavailable)
        order = await self._bookkeeper.tell(order, Refused(error.words))
        if reached:
            code = error.code
            log.warning(
                "order refused", symbol=order.symbol, purpose=order.purpose, code=code, error=str(error)
            )
        else:
            log.warning("order not sent", symbol=order.symbol, purpose=order.purpose, error=str(error))
        if error.reaction is Reaction.WRONG_ROUTE:
            self._recorder.count("trading.orders_misrouted")
            log.error(
                "perpd spoke to the wrong endpoint, report this fault",
                symbol=order.symbol,
                purpose=order.purpose,
                type=order.type,
            )
        if error.reaction in BARS_ENTRIES or isinstance(error, VenueCredentials):
            self._books.bar_entries(str(error), BARS_ENTRIES.get(error.reaction, math.inf))
        return Failure(code=error.code, detail=error.words, reached=reached)

    async def wait_filled(self, name: str) -> None:
        """Wait for the events that end an order; ask when they do not come."""
        waiter = self._books.changed.setdefault(name, asyncio.Event())
        try:
            async with asyncio.timeout(self._answer_limit_s):
                while (order := self._books.orders.get(name)) is not None and not self._books.ended(order):
                    if order.status is OrderStatus.UNKNOWN:
                        break  # it was asked for already
                    waiter.clear()
                    await waiter.wait()
        except TimeoutError:
            order = self._books.orders.get(name)
            if order is not None:
                await self.ask(order)
        finally:
            self._books.changed.pop(name, None)
            order = self._books.orders.get(name)
            if order is not None and order.status.final and order.position_id not in self._books.positions:
                self._books.orders.pop(name)
                self._books.filled.pop(name, None)

    async def ask(self, order: Order) -> bool:
        """Ask the venue what became of an order, over seconds. True once it is final and booked, or rests.

        An order that the venue denies every time, with nothing resting and nothing held there, never
        arrived: it ends as rejected.
        """
        denials = 0
        for delay_s in self._ask_delays_s:
            await pause(self._clock, delay_s)
            known = self._books.orders.get(order.client_order_id)
            if known is None or self._books.ended(known):
                return True
            try:
                found = await self._exchange.order(known)
            except VenueError as error:
                log.warning("question unanswered", client_order_id=known.client_order_id, error=str(error))
                continue
            if found is None:
                denials += 1
                continue
            if await self._take(*found):
                return True
        if denials == len(self._ask_delays_s):
            return await self._conclude_lost(order)
        self._books.reconcile_wanted.set()
        return False

    async def _take(self, order: Order, fills: Sequence[Fill]) -> bool:
        """Take the venue's own view. True when nothing is left to wait for."""
        try:
            for fill in fills:
                await self._bookkeeper.book(fill)
            learned = await self._bookkeeper.learn(order)
        except DataDirectoryUnusable as error:
            self._books.note_store(error)
            return False
        except CONTRADICTIONS as error:
            self._books.quarantine(order.symbol, error)
            return False
        if learned is None:
            return True
        return self._books.ended(learned) or (learned.type.conditional and learned.status in RESTING)

    async def _conclude_lost(self, order: Order) -> bool:
        """Denied every time: look at what rests, what was executed and what is held before believing it."""
        try:
            resting = await self._exchange.open_orders()
            executions = await self._exchange.executions(order.symbol, order.created_ms - CLOCKS_DIFFER_MS)
            account = await self._exchange.account()
        except VenueError as error:
            log.warning("question unanswered", client_order_id=order.client_order_id, error=str(error))
            self._books.reconcile_wanted.set()
            return False
        for found in resting:
            if found.client_order_id == order.client_order_id:
                return await self._take(found, ())
        fills = [fill for fill in executions if fill.client_order_id == order.client_order_id]
        known = self._books.orders.get(order.client_order_id)
        if known is None or self._books.ended(known):
            return True
        if fills:
            return await self._take(executed(known, fills), fills)
        held = next((p.quantity for p in account.positions if p.symbol == order.symbol), ZERO)
        if not order.type.conditional and held != self._ledger.holding(order.symbol).quantity:
            log.error("order denied, but something is held", symbol=order.symbol, held=str(held))
            self._books.reconcile_wanted.set()
            return False
        await self._bookkeeper.tell(known, Denied("the venue does not know it and holds nothing of it"))
        return True

    async def cancel(self, order: Order) -> bool:
        """Cancel one order of ours. False when it is in flight, or the venue could not be asked."""
        if order.status in (OrderStatus.INTENDED, OrderStatus.SENT, OrderStatus.TRIGGERED):
            return False  # in flight, or executing: what follows decides
        try:
            done = await self._exchange.cancel(order)
        except VenueError as error:
            log.warning("cancel failed", symbol=order.symbol, error=str(error))
            self._books.reconcile_wanted.set()
            return False
        if not done:  # it ended before, perhaps by executing
            return await self.ask(order)
        await self._bookkeeper.tell(
            order, Reported(msgspec.structs.replace(order, status=OrderStatus.CANCELLED))
        )
        return True


def executed(order: Order, fills: Sequence[Fill]) -> Order:
    """The order as its executions show it, where the venue no longer knows it itself."""
    quantity = sum((fill.quantity for fill in fills), ZERO)
    cost = sum((fill.quantity * fill.price for fill in fills), ZERO)
    whole = not order.quantity or quantity >= order.quantity
    return msgspec.structs.replace(
        order,
        status=OrderStatus.FILLED if whole else OrderStatus.EXPIRED,
        filled_quantity=quantity,
        average_price=cost / quantity,
        updated_ms=max(fill.filled_ms for fill in fills),
    )
