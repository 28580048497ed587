"""Turns approved signals into protected positions, and the venue's events into books.

Promises: an order is written down before it is sent and never sent twice; no usable answer means
asking by client id, the symbol kept busy meanwhile; a position gets its stop at once or is closed; a
fill is booked once. One task applies the venue's events, in order; one lock keeps the books.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import msgspec
import structlog

from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    StateConflict,
    VenueError,
    VenueMalformed,
)
from service.ports import Archive, Clock, Exchange, Recorder, StateStore, UserEvent
from service.records import (
    Adjustment,
    CloseReason,
    Fill,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
    Position,
    Record,
    RefusalReason,
    Signal,
)
from service.settings import TradingSettings
from service.trading.ledger import Ledger
from service.trading.orders import Applied, apply, client_order_id, is_ours, new_order, with_status
from service.trading.positions import (
    after_fill,
    close_reason,
    intended,
    is_open,
    never_opened,
    position_id_of,
    with_close,
)
from service.trading.protection import (
    ALREADY_THERE,
    BREACHED,
    NOTHING_HELD,
    POSITION_GONE,
    Failure,
    Step,
    next_stop_step,
    next_target_step,
    other_working_type,
)
from service.trading.ranking import Refused
from service.trading.sizing import Approved

log = structlog.get_logger("trading.executor")

QUEUE_EVENTS = 10_000
OUTBOX_RECORDS = 10_000
OUTBOX_LIMIT_S = 2.0
LONGEST_RETRY_S = 60.0
ASK_DELAYS_S = (0.1, 0.3, 0.8, 1.5, 3.0)
RETRY_S = 1.0
RESTING = (OrderStatus.OPEN, OrderStatus.PARTLY_FILLED, OrderStatus.TRIGGERED)
ZERO = Decimal(0)


class Executor:
    """Orders, positions and their protection. Enter `running()` before anything else.

    Args: ask_delays_s: wall seconds before each question about an order without an answer;
    retry_s: wall seconds between attempts while the venue is out of reach.
    """

    def __init__(
        self,
        exchange: Exchange,
        store: StateStore,
        archive: Archive,
        ledger: Ledger,
        clock: Clock,
        settings: TradingSettings,
        recorder: Recorder,
        *,
        margin_type: str = "ISOLATED",
        ask_delays_s: Sequence[float] = ASK_DELAYS_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._archive = archive
        self._ledger = ledger
        self._clock = clock
        self._settings = settings
        self._recorder = recorder
        self._margin_type = margin_type
        self._ask_delays_s = tuple(ask_delays_s)
        self._retry_s = retry_s
        self._queue: asyncio.Queue[UserEvent] = asyncio.Queue(QUEUE_EVENTS)
        self._books = asyncio.Lock()
        self._tasks: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._flights: set[asyncio.Future[None]] = set()
        self._orders: dict[str, Order] = {}  # of open positions, and all that are not final
        self._filled: dict[str, Decimal] = {}  # booked per order in `_orders`
        self._changed: dict[str, asyncio.Event] = {}  # per order somebody waits for
        self._positions: dict[str, Position] = {}  # not closed, meant to be ones included
        self._entered: dict[str, Decimal] = {}  # quantity entered per open position
        self._meant: dict[str, CloseReason] = {}  # why we are closing, per position
        self._unprotected: dict[str, float] = {}  # position to monotonic seconds
        self._protecting: dict[str, asyncio.Task[None]] = {}
        self._opening: set[str] = set()
        self._exiting: set[str] = set()
        self._foreign: dict[str, str] = {}  # symbol to why; set by reconciliation
        self._quarantined: dict[str, str] = {}  # symbol to why; until the next start
        self._versions: Counter[str] = Counter()
        self._restored = False
        self._draining = False
        self._store_failing = False
        # What goes to the archive waits here, so that a full disk never holds up a stop. Entries are off
        # while the archive cannot be written: what gathers is what ends the positions that are open.
        self._outbox: asyncio.Queue[tuple[str, Record]] = asyncio.Queue(OUTBOX_RECORDS)
        self.reconcile_wanted = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Executor"]:
        """Read what the store knows, then apply events until the block ends."""
        await self.restore()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            processor = tasks.create_task(self._process(), name="trading.events")
            writer = tasks.create_task(self._write_records(), name="trading.records")
            try:
                yield self
            finally:
                self._tasks = None
                await self._records_written()
                processor.cancel()
                writer.cancel()
                for task in list(self._background):
                    task.cancel()

    def _record(self, stream: str, record: Record) -> None:
        try:
            self._outbox.put_nowait((stream, record))
        except asyncio.QueueFull:
            self._recorder.count("trading.records_discarded")
            log.error("a record could not be kept for the archive", stream=stream, record=str(record)[:500])

    async def _records_written(self) -> None:
        """Hand the last records to the archive, within a limit: a full disk must not hold up the end."""
        try:
            async with asyncio.timeout(OUTBOX_LIMIT_S):
                await self._outbox.join()
        except TimeoutError:
            log.error("records did not reach the archive", records=self._outbox.qsize())

    async def _write_records(self) -> None:
        while True:
            stream, record = await self._outbox.get()
            try:
                await self._archive.put(stream, record)
            finally:
                self._outbox.task_done()

    async def settle(self, limit_s: float) -> bool:
        """Accept no more entries and wait until orders in flight have ended and stops are placed.

        Stops and targets stay on the venue. Args: limit_s: wall seconds. False when time ran out.
        """
        self._draining = True
        try:
            async with asyncio.timeout(limit_s):
                while self._flights or self._background or self._queue.qsize():
                    waiting: set[asyncio.Future[None]] = {*self._flights, *self._background}
                    if waiting:
                        await asyncio.wait(waiting)
                    await self._queue.join()
                await self._outbox.join()
        except TimeoutError:
            log.error(
                "orders did not settle in time",
                in_flight=len(self._flights),
                events=self._queue.qsize(),
                records=self._outbox.qsize(),
                unprotected=[symbol for symbol, _ in self.unprotected()],
            )
            return False
        return True

    # -- what others ask ----------------------------------------------------------------------------

    def positions(self) -> tuple[Position, ...]:
        """Open positions with a quantity."""
        return tuple(p for p in self._positions.values() if is_open(p))

    def pending_positions(self) -> tuple[Position, ...]:
        """Meant to be: their entry has no fill yet."""
        return tuple(p for p in self._positions.values() if not is_open(p))

    def working_orders(self) -> tuple[Order, ...]:
        """Our orders that are not final, or whose executions are not all booked."""
        return tuple(order for order in self._orders.values() if not self._ended(order))

    def held_symbols(self) -> frozenset[str]:
        """Symbols on which no entry may be made: held, busy, or blocked."""
        return frozenset(
            {p.symbol for p in self._positions.values()}
            | {order.symbol for order in self.working_orders()}
            | self._opening
            | self._foreign.keys()
            | self._quarantined.keys()
        )

    def blocked_symbols(self) -> dict[str, str]:
        """Symbols that are not traded at all, and why."""
        return {**self._foreign, **self._quarantined}

    def unprotected(self) -> list[tuple[str, float]]:
        """Symbol and wall seconds of each position that has no stop on the venue."""
        now_s = self._clock.monotonic_s()
        return [
            (self._positions[name].symbol, now_s - since_s) for name, since_s in self._unprotected.items()
        ]

    @property
    def store_failing(self) -> bool:
        """The last write of state failed: no entries until one succeeds."""
        return self._store_failing

    @property
    def queue_depth(self) -> int:
        return self._queue.qsize()

    def version(self, symbol: str) -> int:
        """Counts what happened on a symbol, so that a snapshot taken meanwhile can be told apart."""
        return self._versions[symbol]

    def busy_symbols(self) -> frozenset[str]:
        """Symbols on which something is in flight."""
        acting = {
            self._positions[p].symbol for p in {*self._protecting, *self._exiting} & self._positions.keys()
        }
        return frozenset(self._opening | acting)

    # -- events -------------------------------------------------------------------------------------

    def on_event(self, event: UserEvent) -> None:
        """Take one event of the private stream; called on the loop, never blocks."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._recorder.count("trading.events_discarded")
            self.reconcile_wanted.set()

    def on_gap(self) -> None:
        """Events may have been missed."""
        self.reconcile_wanted.set()

    async def events_applied(self) -> None:
        """Returns once every event taken so far is in the books."""
        await self._queue.join()

    async def _process(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                await self._apply_event(event)
            finally:
                self._queue.task_done()

    async def _apply_event(self, event: UserEvent) -> None:
        """A full disk makes it wait; an event that breaks the books quarantines its symbol."""
        while True:
            try:
                await self._dispatch(event)
                return
            except DataDirectoryUnusable as error:
                self._note_store(error)
                await self._pause(self._retry_s)
            except (StateConflict, ArithmeticError, LookupError, ValueError) as error:
                self._quarantine(event.symbol, error)
                return

    async def _dispatch(self, event: UserEvent) -> None:
        if isinstance(event, Order):
            await self._learn(event)
        elif isinstance(event, Fill):
            await self._book(event)
        else:
            await self.book_adjustment(event)

    def _quarantine(self, symbol: str, error: Exception) -> None:
        self._recorder.count("trading.quarantined")
        self._quarantined[symbol] = f"what happened could not be booked: {error!r}"
        log.error("symbol quarantined: what happened could not be booked", symbol=symbol, exc_info=error)
        self.reconcile_wanted.set()

    async def book_adjustment(self, adjustment: Adjustment) -> bool:
        """Book funding or a transfer once, and on the position it belongs to."""
        async with self._books:
            if not await self._ledger.book_adjustment(adjustment):
                return False
            self._record("adjustments", adjustment)
            position = self._position_on(adjustment.symbol)
            if adjustment.kind == "funding" and position is not None:
                await self._save_position(
                    msgspec.structs.replace(position, funding=position.funding + adjustment.amount)
                )
        return True

    async def _learn(self, update: Order) -> Order | None:
        """Merge news of an order; None when it is not ours."""
        async with self._books:
            order = await self._known(update.client_order_id)
            if order is None:
                self._recorder.count("trading.foreign_order_events")
                if is_ours(update.client_order_id):
                    self.reconcile_wanted.set()  # our prefix, not our books: another instance, or lost state
                return None
            order = await self._merge(order, apply(order, update))
            await self._after_order(order)
            return order

    async def _merge(self, order: Order, applied: Applied) -> Order:
        if applied.fault:
            self._recorder.count("trading.order_faults")
            log.warning("impossible order update", client_order_id=order.client_order_id, fault=applied.fault)
        if applied.changed:
            await self._save_order(applied.order)
        return applied.order

    async def _after_order(self, order: Order) -> None:
        """What an order's new state means for its position. Holds the lock."""
        self._versions[order.symbol] += 1
        position = self._positions.get(order.position_id)
        if order.type.conditional:
            if position is None:
                if order.status in RESTING or order.status is OrderStatus.UNKNOWN:
                    self._spawn_sweep(order.position_id)
            else:
                await self._after_protective(order, position)
        if order.status.final and position is None:
            self._orders.pop(order.client_order_id, None)
            self._filled.pop(order.client_order_id, None)
        waiter = self._changed.get(order.client_order_id)
        if waiter is not None:
            waiter.set()

    async def _after_protective(self, order: Order, position: Position) -> None:
        stop = order.purpose is OrderPurpose.STOP
        current = position.stop_order_id if stop else position.target_order_id
        name = order.client_order_id
        if order.status in RESTING and current != name:
            changes: dict[str, object] = {"stop_order_id" if stop else "target_order_id": name}
            if stop:
                changes["protected_ms"] = self._clock.now_ms()
                self._unprotected.pop(position.position_id, None)
            position = msgspec.structs.replace(position, **changes)
            await self._save_position(position)
            if stop:
                self._record("positions", position)
        elif order.status.final and order.status is not OrderStatus.FILLED and current == name:
            log.warning("protection ended", symbol=order.symbol, purpose=order.purpose, status=order.status)
            await self._save_position(_without(position, order.purpose))
            if stop:
                self._unprotected.setdefault(position.position_id, self._clock.monotonic_s())
            self._spawn_protect(position.position_id)

    async def _book(self, fill: Fill) -> bool:
        """Book one execution once: ledger, position and store in one transaction."""
        async with self._books:
            order = await self._owner(fill)
            position = await self._position_of(fill, order)
            booking = self._ledger.preview(fill)
            outcome = None
            record = position
            if position is not None:
                outcome = after_fill(position, fill, booking.fee, booking.realised_pnl)
                record = outcome.position
                if outcome.closed:
                    cause = order or self._triggered(position)
                    reason = close_reason(fill, cause, self._meant.get(position.position_id))
                    traded = self._entered.get(position.position_id, ZERO)
                    record = with_close(record, reason, fill.filled_ms, traded)
            try:
                booked = await self._ledger.book_fill(fill, booking, record)
            except DataDirectoryUnusable:
                # The books wait for the disk, the stop does not.
                if position is not None and not position.protected_ms:
                    self._unprotected.setdefault(position.position_id, self._clock.monotonic_s())
                    self._spawn_protect(position.position_id)
                raise
            if not booked:
                await self._name_reason(fill, order)
                return False
            self._store_failing = False
            self._recorder.count("trading.fills")
            self._record("fills", fill)
            if order is not None:
                name = order.client_order_id
                self._filled[name] = self._filled.get(name, ZERO) + fill.quantity
            if record is not None and outcome is not None:
                if outcome.foreign:
                    self._foreign[fill.symbol] = f"{outcome.foreign} executed beyond our position"
                    self.reconcile_wanted.set()
                await self._after_fill(fill, record)
            else:
                self._recorder.count("trading.foreign_fills")
                self.reconcile_wanted.set()
            if order is not None:
                await self._after_order(order)
            return True

    def _triggered(self, position: Position) -> Order | None:
        """The position's conditional order that is executing: a fill under a name unknown to us is its."""
        for name in (position.stop_order_id, position.target_order_id):
            order = self._orders.get(name)
            if order is not None and order.status is OrderStatus.TRIGGERED:
                return order
        return None

    async def _name_reason(self, fill: Fill, order: Order | None) -> None:
        """A closing fill that was booked under an unknown name is told again under our order's."""
        if order is None or order.position_id in self._positions:
            return
        closed = await self._store.position(order.position_id)
        if closed is None or closed.close_reason != CloseReason.MANUAL or closed.closed_ms != fill.filled_ms:
            return
        named = msgspec.structs.replace(closed, close_reason=close_reason(fill, order, None).value)
        if named != closed:
            await self._save_position(named)
            self._record("positions", named)

    async def _after_fill(self, fill: Fill, position: Position) -> None:
        name = position.position_id
        if position.closed_ms:
            await self._forget(position)
            return
        self._positions[name] = position
        if fill.side is position.position_side.entry_side:
            self._entered[name] = self._entered.get(name, ZERO) + fill.quantity
        if not position.protected_ms:
            self._unprotected.setdefault(name, self._clock.monotonic_s())
            self._spawn_protect(name)

    async def _forget(self, position: Position) -> None:
        """A position ended: out of memory, into the archive; what still rests is cancelled."""
        name = position.position_id
        self._positions.pop(name, None)
        self._entered.pop(name, None)
        self._meant.pop(name, None)
        self._unprotected.pop(name, None)
        if position.entry_price:
            self._recorder.count("trading.positions_closed")
            self._record("positions", position)
            log.info(
                "position closed",
                symbol=position.symbol,
                reason=position.close_reason,
                realised_pnl=str(position.realised_pnl),
                fees=str(position.fees),
            )
        for order in [order for order in self._orders.values() if order.position_id == name]:
            waiter = self._changed.get(order.client_order_id)
            if waiter is not None:
                waiter.set()
            elif order.status.final:
                self._orders.pop(order.client_order_id)
                self._filled.pop(order.client_order_id, None)
        self._spawn_sweep(name)

    async def _owner(self, fill: Fill) -> Order | None:
        """Our order that a fill belongs to: by client id, else by the venue's."""
        order = await self._known(fill.client_order_id)
        if order is not None or not fill.venue_order_id:
            return order
        return next(
            (
                known
                for known in self._orders.values()
                if known.symbol == fill.symbol and known.venue_order_id == fill.venue_order_id
            ),
            None,
        )

    async def _position_of(self, fill: Fill, order: Order | None) -> Position | None:
        """The position a fill belongs to. A late fill of an ended trade never lands on the next one."""
        if order is None:
            return self._position_on(fill.symbol)
        position = self._positions.get(order.position_id)
        if position is None and order.purpose is OrderPurpose.ENTRY:
            stored = await self._store.position(order.position_id)
            if stored is not None and not stored.entry_price:  # given up too early: it did open
                return msgspec.structs.replace(stored, closed_ms=0)
        return position

    def _position_on(self, symbol: str) -> Position | None:
        return next((p for p in self._positions.values() if p.symbol == symbol and is_open(p)), None)

    async def _known(self, name: str) -> Order | None:
        order = self._orders.get(name)
        if order is None and is_ours(name):
            order = await self._store.order(name)
        return order

    # -- entries ------------------------------------------------------------------------------------

    async def open(self, signal: Signal, approved: Approved) -> Position | Refused:
        """Enter at market and protect. Returns the position, protected or in the hands of its ladder.

        Refused: ORDER_REJECTED (nothing is held), ORDER_UNKNOWN (the symbol stays busy until the venue
        says what became of it), SYMBOL_HELD or ENTRIES_OFF (nothing was sent).
        """
        symbol = signal.symbol
        refused = self._entry_barred(symbol)
        if refused:
            return refused
        flight: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flights.add(flight)
        self._opening.add(symbol)
        try:
            return await self._enter(signal, approved)
        finally:
            self._opening.discard(symbol)
            self._flights.discard(flight)
            flight.set_result(None)

    def _entry_barred(self, symbol: str) -> Refused | None:
        if self._draining:
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail="draining, running is needed")
        if self._store_failing:
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail="state cannot be written")
        blocked = self.blocked_symbols().get(symbol)
        if blocked or symbol in self.held_symbols():
            return Refused(
                reason=RefusalReason.SYMBOL_HELD, detail=blocked or "1 position or order there, 0 allowed"
            )
        return None

    async def _enter(self, signal: Signal, approved: Approved) -> Position | Refused:
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
            self._note_store(error)
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail=f"state cannot be written: {error}")
        self._positions[name] = position
        failure = await self._send(request, order)
        await self._wait_filled(request.client_order_id)
        return await self._entered_as(name, request.client_order_id, failure)

    async def _entered_as(self, name: str, order_id: str, failure: Failure | None) -> Position | Refused:
        order = await self._known(order_id)
        position = self._positions.get(name)
        if position is not None and is_open(position):
            task = self._protecting.get(name)
            if task is not None:
                await asyncio.wait({task})
            return self._positions.get(name, position)
        if order is not None and not self._ended(order):
            return Refused(
                reason=RefusalReason.ORDER_UNKNOWN,
                detail=f"no whole answer within {self._settings.answer_limit_s:g} s; the symbol stays busy",
            )
        if position is None:  # opened and closed again meanwhile
            stored = await self._store.position(name)
            if stored is not None and stored.entry_price:
                return stored
        await self.give_up_entry(name)
        detail = failure.detail if failure else f"the venue: {order.reason if order else 'no order'}"
        return Refused(reason=RefusalReason.ORDER_REJECTED, detail=detail)

    async def give_up_entry(self, position_id: str) -> None:
        """End an intention whose entry order ended without a fill."""
        async with self._books:
            position = self._positions.get(position_id)
            if position is None or is_open(position):
                return
            order = await self._known(client_order_id(position_id, "entry", 0))
            if order is not None and not self._ended(order):
                return  # it executed, and its fills are still to come
            ended = never_opened(position, self._clock.now_ms())
            await self._save_position(ended)
            await self._forget(ended)

    # -- exits --------------------------------------------------------------------------------------

    async def close(self, position: Position, reason: CloseReason) -> bool:
        """Close at market, reduce-only. False when it is not known to be closed yet.

        Stop and target rest until the venue is flat, so the position stays protected all the while.
        """
        name = position.position_id
        if name in self._exiting or name not in self._positions:
            return name not in self._positions
        self._exiting.add(name)
        self._meant[name] = reason
        try:
            return await self._exit(name)
        finally:
            self._exiting.discard(name)

    async def _exit(self, name: str) -> bool:
        for order in self.working_orders():
            earlier = order.position_id == name and order.purpose is OrderPurpose.EXIT
            if earlier and not await self.ask(order):
                return False  # it may still fill: never two
        position = self._positions.get(name)
        if position is None:
            return True
        request = OrderRequest(
            client_order_id=await self._next_id(name, "exit"),
            symbol=position.symbol,
            side=position.position_side.exit_side,
            type=OrderType.MARKET,
            purpose=OrderPurpose.EXIT,
            position_id=name,
            quantity=position.quantity,
            reduce_only=True,
        )
        failure = await self._send(request, new_order(request, self._clock.now_ms()))
        if failure is not None:
            self._changed.pop(request.client_order_id, None)
            log.error("exit refused", symbol=position.symbol, code=failure.code, detail=failure.detail)
            if failure.code in POSITION_GONE:
                self.reconcile_wanted.set()
            return False
        await self._wait_filled(request.client_order_id)
        return name not in self._positions

    # -- sending and asking -------------------------------------------------------------------------

    async def _send(self, request: OrderRequest, order: Order) -> Failure | None:
        """Send one order that is written down, once. A Failure says that nothing rests or fills there."""
        name = request.client_order_id
        async with self._books:
            if request.purpose is not OrderPurpose.ENTRY:  # an entry was written with its position
                await self._save_order(order)
            else:
                self._remember(order)
                self._record("orders", order)
            self._orders[name] = with_status(order, OrderStatus.SENT, self._clock.now_ms()).order
            self._changed.setdefault(name, asyncio.Event())
            self._versions[order.symbol] += 1
        self._recorder.count("trading.orders")
        started_s = self._clock.monotonic_s()
        try:
            answer = await self._exchange.place(request)
        except (OrderOutcomeUnknown, VenueMalformed) as error:
            return await self._send_unknown(name, error)
        except VenueError as error:
            if error.code in ALREADY_THERE and request.purpose is OrderPurpose.ENTRY:
                return await self._send_unknown(name, error)  # our earlier send landed
            return await self._send_failed(name, error)
        finally:
            self._recorder.record("trading.place", self._clock.monotonic_s() - started_s)
        await self._learn(answer)
        return None

    async def _send_unknown(self, name: str, error: VenueError) -> Failure | None:
        self._recorder.count("trading.orders_unknown")
        order = await self._set_status(name, OrderStatus.UNKNOWN, str(error))
        log.warning(
            "order without an answer: asking", symbol=order.symbol, client_order_id=name, error=str(error)
        )
        await self.ask(order)
        order = self._orders.get(name, order)
        if order.status is OrderStatus.REJECTED:
            return Failure(code=0, detail=order.reason)
        return None

    async def _send_failed(self, name: str, error: VenueError) -> Failure:
        self._recorder.count("trading.orders_rejected")
        order = await self._set_status(name, OrderStatus.REJECTED, f"{error.code}: {error}")
        log.warning(
            "order refused", symbol=order.symbol, purpose=order.purpose, code=error.code, error=str(error)
        )
        return Failure(code=error.code, detail=f"{error.code}: {error}")

    async def _set_status(self, name: str, status: OrderStatus, reason: str) -> Order:
        async with self._books:
            order = await self._known(name)  # its final event may have come first and let go of it
            if order is None:
                raise KeyError(f"order {name} is not in the books")
            order = await self._merge(order, with_status(order, status, self._clock.now_ms(), reason))
            await self._after_order(order)
            return order

    async def ask(self, order: Order) -> bool:
        """Ask the venue what became of an order, over seconds. True once it is final and booked, or rests.

        An order that the venue denies every time, with nothing resting and nothing held there, never
        arrived: it ends as rejected.
        """
        denials = 0
        for delay_s in self._ask_delays_s:
            await self._pause(delay_s)
            known = self._orders.get(order.client_order_id)
            if known is None or self._ended(known):
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
        self.reconcile_wanted.set()
        return False

    async def _take(self, order: Order, fills: Sequence[Fill]) -> bool:
        """Take the venue's own view. True when nothing is left to wait for."""
        try:
            for fill in fills:
                await self._book(fill)
        except DataDirectoryUnusable as error:
            self._note_store(error)
            return False
        learned = await self._learn(order)
        if learned is None:
            return True
        return self._ended(learned) or (learned.type.conditional and learned.status in RESTING)

    async def _conclude_lost(self, order: Order) -> bool:
        """Denied every time: look at what rests and what is held before believing it."""
        try:
            resting = await self._exchange.open_orders()
            account = await self._exchange.account()
        except VenueError as error:
            log.warning("question unanswered", client_order_id=order.client_order_id, error=str(error))
            self.reconcile_wanted.set()
            return False
        for found in resting:
            if found.client_order_id == order.client_order_id:
                return await self._take(found, ())
        known = self._orders.get(order.client_order_id)
        if known is None or self._ended(known):
            return True
        held = next((p.quantity for p in account.positions if p.symbol == order.symbol), ZERO)
        if not order.type.conditional and held != self._ledger.holding(order.symbol).quantity:
            log.error("order denied, but something is held", symbol=order.symbol, held=str(held))
            self.reconcile_wanted.set()
            return False
        await self._set_status(
            order.client_order_id, OrderStatus.REJECTED, "the venue does not know it and holds nothing of it"
        )
        return True

    def _ended(self, order: Order) -> bool:
        """Final, with all its executions booked."""
        if not order.status.final:
            return False
        due = order.filled_quantity
        if order.status is OrderStatus.FILLED:
            due = max(due, order.quantity)
        return self._filled.get(order.client_order_id, ZERO) >= due

    async def _wait_filled(self, name: str) -> None:
        """Wait for the events that end an order; ask when they do not come."""
        waiter = self._changed.setdefault(name, asyncio.Event())
        try:
            async with asyncio.timeout(self._settings.answer_limit_s):
                while (order := self._orders.get(name)) is not None and not self._ended(order):
                    if order.status is OrderStatus.UNKNOWN:
                        break  # it was asked for already
                    waiter.clear()
                    await waiter.wait()
        except TimeoutError:
            order = self._orders.get(name)
            if order is not None:
                await self.ask(order)
        finally:
            self._changed.pop(name, None)
            order = self._orders.get(name)
            if order is not None and order.status.final and order.position_id not in self._positions:
                self._orders.pop(name)
                self._filled.pop(name, None)

    # -- protection ---------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None] | None:
        if self._tasks is None:
            work.close()
            return None
        task = self._tasks.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def protect(self, position_id: str) -> None:
        """See to it that the position has its stop and its target."""
        self._spawn_protect(position_id)

    def stop_missing(self, position_id: str) -> None:
        """The venue does not hold the stop that we believed in."""
        self._forget_protection(position_id, OrderPurpose.STOP)
        self._unprotected.setdefault(position_id, self._clock.monotonic_s())
        self._spawn_protect(position_id)

    def target_missing(self, position_id: str) -> None:
        self._forget_protection(position_id, OrderPurpose.TARGET)
        self._spawn_protect(position_id)

    def _forget_protection(self, position_id: str, purpose: OrderPurpose) -> None:
        position = self._positions.get(position_id)
        if position is not None:
            self._positions[position_id] = _without(position, purpose)

    def _spawn_protect(self, name: str) -> None:
        if name in self._protecting or name not in self._positions:
            return
        task = self._spawn(self._protect(name), f"trading.protect.{name}")
        if task is not None:
            self._protecting[name] = task

    async def _protect(self, name: str) -> None:
        """Stop and target at the same time: neither waits for the other's answer."""
        try:
            async with asyncio.TaskGroup() as legs:
                legs.create_task(self._keep_stop(name), name=f"trading.stop.{name}")
                legs.create_task(self._keep_target(name), name=f"trading.target.{name}")
        finally:
            self._protecting.pop(name, None)

    async def _keep_stop(self, name: str) -> None:
        failures: list[Failure] = []
        rounds = 0
        while (position := self._positions.get(name)) is not None and not position.protected_ms:
            since_s = self._unprotected.get(name, self._clock.monotonic_s())
            step = next_stop_step(
                failures,
                unprotected_s=self._clock.monotonic_s() - since_s,
                limit_s=self._settings.unprotected_limit_s,
            )
            if failures:
                self._recorder.count("trading.stop_failures")
                # Beyond its stop already: the ladder closes it at once, as the stop would have.
                tell = log.warning if failures[-1].code in BREACHED else log.error
                tell("stop not placed", symbol=position.symbol, step=step, detail=failures[-1].detail)
            if step is Step.CLOSE:
                breached = failures[-1].code in BREACHED
                if await self.close(position, CloseReason.STOP if breached else CloseReason.EXIT):
                    return
                if await self._look_for_stop(position) is NOTHING_HELD:
                    return  # reconciliation decides what became of it
                failures.clear()
                await self._pause(min(self._retry_s * 2**rounds, LONGEST_RETRY_S))
                rounds += 1
                continue
            failure = await self._stop_step(position, step)
            if failure is NOTHING_HELD:
                return
            if failure is not None:
                failures.append(failure)

    async def _stop_step(self, position: Position, step: Step) -> Failure | None:
        configured: str = self._settings.stop_working_type
        if step is Step.ASK:
            return await self._look_for_stop(position)
        working_type = configured if step is Step.PLACE else other_working_type(configured)
        return await self._place_protective(position, OrderPurpose.STOP, working_type)

    async def _keep_target(self, name: str) -> None:
        failures: list[Failure] = []
        while (position := self._positions.get(name)) is not None and not position.target_order_id:
            step = next_target_step(failures)
            if failures:
                log.warning(
                    "target not placed", symbol=position.symbol, step=step, detail=failures[-1].detail
                )
            if step is Step.GIVE_UP:
                return  # the stop protects; reconciliation tries again
            if step is Step.CLOSE:
                await self.close(position, CloseReason.TARGET)
                return
            working_type = self._settings.stop_working_type
            failure = await self._place_protective(position, OrderPurpose.TARGET, working_type)
            if failure is not None:
                failures.append(failure)

    async def _place_protective(
        self, position: Position, purpose: OrderPurpose, working_type: str
    ) -> Failure | None:
        """One conditional order that closes the whole position. None when it rests, or nothing is left."""
        stop = purpose is OrderPurpose.STOP
        name = await self._next_id(position.position_id, purpose.value)
        request = OrderRequest(
            client_order_id=name,
            symbol=position.symbol,
            side=position.position_side.exit_side,
            type=OrderType.STOP_MARKET if stop else OrderType.TAKE_PROFIT_MARKET,
            purpose=purpose,
            position_id=position.position_id,
            trigger_price=position.stop if stop else position.target,
            close_position=True,
            working_type=working_type,
        )
        failure = await self._send(request, new_order(request, self._clock.now_ms()))
        self._changed.pop(name, None)
        if failure is not None:
            return failure
        order = await self._known(name)
        if order is None or order.status in RESTING or order.status is OrderStatus.FILLED:
            return None
        if position.position_id not in self._positions:
            return None
        return Failure(code=0, detail=f"{purpose} is {order.status}: {order.reason}")

    async def _look_for_stop(self, position: Position) -> Failure | None:
        """The venue says that a stop is there, or that the position is gone: see what is true.

        A closing order of ours that belongs to an ended trade is in the way and is cancelled.
        """
        try:
            account = await self._exchange.account()
            resting = await self._exchange.open_orders()
        except VenueError as error:
            return Failure(code=error.code, detail=f"question unanswered: {error}")
        for order in resting:
            known = await self._known(order.client_order_id) if order.symbol == position.symbol else None
            if known is None or not known.type.conditional:
                continue
            if known.position_id == position.position_id:
                await self._learn(order)
            else:
                await self._cancel(known)
        if all(held.symbol != position.symbol for held in account.positions):
            self.reconcile_wanted.set()
            return NOTHING_HELD
        current = self._positions.get(position.position_id)
        if current is None or current.protected_ms:
            return None
        return Failure(code=0, detail="no stop of this position rests on the venue")

    def _spawn_sweep(self, name: str) -> None:
        if any(order.position_id == name and order.type.conditional for order in self.working_orders()):
            self._spawn(self._sweep(name), f"trading.sweep.{name}")

    async def _sweep(self, name: str) -> None:
        """Cancel the conditional orders of a position that ended."""
        for order in self.working_orders():
            if order.position_id == name and order.type.conditional and name not in self._positions:
                await self._cancel(order)

    async def cancel(self, order: Order) -> bool:
        """Cancel one order of ours. False when the venue could not be asked."""
        return await self._cancel(order)

    async def _cancel(self, order: Order) -> bool:
        if order.status in (OrderStatus.INTENDED, OrderStatus.SENT, OrderStatus.TRIGGERED):
            return False  # in flight, or executing: what follows decides
        try:
            await self._exchange.cancel(order)
        except VenueError as error:
            log.warning("cancel failed", symbol=order.symbol, error=str(error))
            self.reconcile_wanted.set()
            return False
        await self._set_status(order.client_order_id, OrderStatus.CANCELLED, "")
        return True

    # -- what reconciliation does -------------------------------------------------------------------

    def block_foreign(self, found: dict[str, str]) -> None:
        """Symbols with foreign positions or orders; those no longer found are free again."""
        for symbol in found.keys() - self._foreign.keys():
            self._recorder.count("trading.foreign_symbols")
            log.error("symbol blocked: not ours", symbol=symbol, detail=found[symbol])
        self._foreign = dict(found)

    async def end_position(self, position_id: str, reason: CloseReason) -> None:
        """Close a position in our books that the venue no longer holds and no fill explains."""
        async with self._books:
            position = self._positions.get(position_id)
            if position is None:
                return
            log.error("position vanished", symbol=position.symbol, reason=reason)
            ended = with_close(position, reason, self._clock.now_ms(), ZERO)
            self._versions[position.symbol] += 1
            await self._save_position(ended)
            await self._forget(ended)

    async def correct_quantity(self, position_id: str, quantity: Decimal) -> None:
        """Take over the venue's quantity of a position; the venue is the truth for it."""
        async with self._books:
            position = self._positions.get(position_id)
            if position is not None:
                log.error(
                    "quantity corrected",
                    symbol=position.symbol,
                    ours=str(position.quantity),
                    venue=str(quantity),
                )
                self._versions[position.symbol] += 1
                await self._save_position(msgspec.structs.replace(position, quantity=quantity))

    # -- small parts --------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Read positions and orders from the store; once, however often it is asked."""
        if self._restored:
            return
        self._restored = True
        for position in await self._store.open_positions():
            self._positions[position.position_id] = position
            entries = await self._store.fills(client_order_id(position.position_id, "entry", 0))
            self._entered[position.position_id] = sum((fill.quantity for fill in entries), ZERO)
            if is_open(position) and not position.protected_ms:
                self._unprotected[position.position_id] = self._clock.monotonic_s()
            entry = await self._store.order(client_order_id(position.position_id, "entry", 0))
            if entry is not None and not is_open(position):
                self._filled[entry.client_order_id] = self._entered[position.position_id]
                self._orders[entry.client_order_id] = entry  # final perhaps, and yet without its fills
        for order in await self._store.open_orders():
            fills = await self._store.fills(order.client_order_id)
            self._filled[order.client_order_id] = sum((fill.quantity for fill in fills), ZERO)
            self._orders[order.client_order_id] = order
        if self._positions:
            log.info("positions restored", symbols=[p.symbol for p in self._positions.values()])

    async def _next_id(self, position_id: str, leg: str) -> str:
        attempt = 0
        while True:
            name = client_order_id(position_id, leg, attempt)
            if name not in self._orders and await self._store.order(name) is None:
                return name
            attempt += 1

    def _remember(self, order: Order) -> None:
        self._orders.setdefault(order.client_order_id, order)

    async def _save_order(self, order: Order) -> None:
        """Into store, memory and archive. A store that fails never keeps a position from its protection."""
        self._orders[order.client_order_id] = order
        try:
            await self._store.save_order(order)
            self._store_failing = False
        except DataDirectoryUnusable as error:
            self._note_store(error)
        except StateConflict as error:
            self._quarantine(order.symbol, error)
        self._record("orders", order)

    async def _save_position(self, position: Position) -> None:
        if not position.closed_ms:
            self._positions[position.position_id] = position
        try:
            await self._store.save_position(position)
            self._store_failing = False
        except DataDirectoryUnusable as error:
            self._note_store(error)

    def _note_store(self, error: DataDirectoryUnusable) -> None:
        self._store_failing = True
        self._recorder.count("trading.store_failures")
        log.error("state cannot be written: no entries", error=str(error))

    async def _pause(self, wall_s: float) -> None:
        await self._clock.sleep_s(wall_s * self._clock.speed)


def _without(position: Position, purpose: OrderPurpose) -> Position:
    if purpose is OrderPurpose.STOP:
        return msgspec.structs.replace(position, stop_order_id="", protected_ms=0)
    return msgspec.structs.replace(position, target_order_id="")


def _rejected(error: VenueError, what: str) -> Refused:
    return Refused(reason=RefusalReason.ORDER_REJECTED, detail=f"{what}: {error.code}: {error}")
