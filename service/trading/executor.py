"""Turns approved signals into protected positions, and the venue's events into books.

Promises: an order is written down before it is sent and never sent twice; no usable answer means
asking by client id, the symbol kept busy meanwhile; a position gets its stop at once or is closed; a
fill is booked once. One task applies the venue's events, in order; one lock keeps the books.

The work is done by its parts: `entering`, `closing`, `sending`, `protecting`, `bookkeeping`, on `books`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import structlog

from service.errors import DataDirectoryUnusable
from service.ports import Archive, Clock, Exchange, Recorder, StateStore, UserEvent
from service.records import (
    Adjustment,
    CloseReason,
    Fill,
    Instrument,
    Order,
    Position,
    RefusalReason,
    Signal,
)
from service.settings import TradingSettings
from service.trading.bookkeeping import CONTRADICTIONS, Bookkeeper
from service.trading.books import Books
from service.trading.closing import Closer
from service.trading.cooldowns import Cooldowns
from service.trading.entering import Opener
from service.trading.ledger import Holding, Ledger
from service.trading.outbox import Outbox
from service.trading.positions import is_open
from service.trading.protecting import InstrumentOf, Protector
from service.trading.ranking import Refused
from service.trading.sending import ASK_DELAYS_S, ORDER_WINDOW, Rules, Sender, pause
from service.trading.sizing import Approved

log = structlog.get_logger("trading.executor")

QUEUE_EVENTS = 10_000
RETRY_S = 1.0
MOST_CONDITIONAL = 200  # over all symbols


async def rules_unknown(symbol: str) -> Instrument | None:
    """Where nobody can read the venue's rules anew."""
    return None


class Executor:
    """Orders, positions and their protection. Enter `running()` before anything else.

    Args: ask_delays_s: wall seconds before each question about an order without an answer;
    retry_s: wall seconds between attempts while the venue is out of reach; rules: reads the venue's rules
    anew and gives those of a symbol; instrument_of: gives them as last read;
    halted: why nothing may be opened, or ''; order_window: last orders whose outcomes are kept;
    cooldown_minutes: market time without entries on a symbol after a stop there, 0 for none.
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
        rules: Rules = rules_unknown,
        instrument_of: InstrumentOf = lambda symbol: None,
        halted: Callable[[], str] = lambda: "",
        order_window: int = ORDER_WINDOW,
        cooldown_minutes: float = 0.0,
    ) -> None:
        self._clock = clock
        self._recorder = recorder
        self._retry_s = retry_s
        self._queue: asyncio.Queue[UserEvent] = asyncio.Queue(QUEUE_EVENTS)
        self._flights: set[asyncio.Future[None]] = set()
        self._opening: set[str] = set()
        self._halted = halted
        self._draining = False
        self._gap = self._reconciled_gap = 0
        self._outbox = Outbox(archive, recorder, store)
        self._books = books = Books(store, self._outbox, clock, recorder, Cooldowns(cooldown_minutes))
        self._bookkeeper = keeper = Bookkeeper(
            books,
            store,
            ledger,
            self._outbox,
            clock,
            recorder,
            protect=self.protect,
            sweep=self._sweep,
            adopts=settings.foreign == "adopt",
        )
        self._sender = sender = Sender(
            exchange,
            books,
            keeper,
            ledger,
            self._outbox,
            clock,
            recorder,
            answer_limit_s=settings.answer_limit_s,
            ask_delays_s=ask_delays_s,
            halted=halted,
            order_window=order_window,
        )
        self._closer = Closer(exchange, books, sender, clock, rules)
        self._protector = Protector(
            exchange,
            books,
            keeper,
            sender,
            self._closer,
            clock,
            settings,
            recorder,
            retry_s=retry_s,
            rules=rules,
            instrument_of=instrument_of,
        )
        self._opener = Opener(
            exchange,
            store,
            books,
            keeper,
            sender,
            self._protector,
            clock,
            settings,
            margin_type=margin_type,
            rules=rules,
        )
        self._ledger = ledger
        self.reconcile_wanted = books.reconcile_wanted

    # -- life ---------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Read positions and orders from the store; once, however often it is asked."""
        await self._outbox.restore()
        await self._books.restore()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Executor"]:
        """Read what the store knows, then apply events until the block ends."""
        await self.restore()
        async with asyncio.TaskGroup() as tasks:
            self._protector.start(tasks)
            processor = tasks.create_task(self._process(), name="trading.events")
            writer = tasks.create_task(self._outbox.run(), name="trading.records")
            try:
                yield self
            finally:
                self._protector.stop()
                await self._outbox.close()
                processor.cancel()
                writer.cancel()
                self._protector.cancel()

    async def settle(self, limit_s: float) -> bool:
        """Accept no more entries and wait until orders in flight have ended and stops are placed.

        Stops and targets stay on the venue. Args: limit_s: wall seconds. False when time ran out.
        """
        self._draining = True
        background = self._protector.background
        try:
            async with asyncio.timeout(limit_s):
                await self._queue.join()  # an event that waits for the disk has left the queue
                while waiting := {*self._flights, *background}:
                    await asyncio.wait(waiting)
                    await self._queue.join()
                await self._outbox.written()
        except TimeoutError:
            log.error(
                "orders did not settle in time",
                in_flight=len(self._flights),
                events=self._queue.qsize(),
                records=self._outbox.depth,
                unprotected=[symbol for symbol, _ in self.unprotected()],
            )
            return False
        return True

    # -- what others ask ----------------------------------------------------------------------------

    def positions(self) -> tuple[Position, ...]:
        """Open positions with a quantity."""
        return tuple(p for p in self._books.positions.values() if is_open(p))

    def pending_positions(self) -> tuple[Position, ...]:
        """Meant to be: their entry has no fill yet."""
        return tuple(p for p in self._books.positions.values() if not is_open(p))

    def held_symbols(self) -> frozenset[str]:
        """Symbols on which no entry may be made: held, busy, or blocked."""
        return frozenset(
            {p.symbol for p in self._books.positions.values()}
            | {order.symbol for order in self._books.working_orders()}
            | self._opening
            | self._books.foreign.keys()
            | self._books.quarantined.keys()
        )

    def cooling(self) -> dict[str, float]:
        """Symbols whose last position ended at its stop, and the minutes until one may be opened again."""
        return self._books.cooldowns.left(self._clock.now_ms())

    def blocked_symbols(self) -> dict[str, str]:
        """Symbols that are not traded at all, and why."""
        return {**self._books.foreign, **self._books.quarantined}

    @property
    def store_failing(self) -> bool:
        """The last write of state failed: no entries until one succeeds."""
        return self._books.store_failing

    async def store_back(self) -> None:
        """The store takes writes again: give it what it missed. Raises DataDirectoryUnusable."""
        await self._books.save_again()

    @property
    def queue_depth(self) -> int:
        return self._queue.qsize()

    def version(self, symbol: str) -> int:
        """Counts what happened on a symbol, so that a snapshot taken meanwhile can be told apart."""
        return self._books.versions[symbol]

    def busy_symbols(self) -> frozenset[str]:
        """Symbols on which something is in flight."""
        acting = {
            self._books.positions[p].symbol
            for p in (self._protector.at_work() | self._closer.exiting) & self._books.positions.keys()
        }
        return frozenset(self._opening | acting)

    def working_orders(self) -> tuple[Order, ...]:
        """Our orders that are not final, or whose executions are not all booked."""
        return self._books.working_orders()

    def unprotected(self) -> list[tuple[str, float]]:
        """Symbol and wall seconds of each position that has no stop on the venue."""
        return self._books.unprotected()

    def order_errors(self) -> tuple[int, int]:
        """Of the last orders sent: how many failed or had no answer, and how many there were."""
        outcomes = self._sender.outcomes
        return sum(outcomes), len(outcomes)

    def forget_order_errors(self) -> None:
        self._sender.outcomes.clear()

    @property
    def closed_count(self) -> int:
        """Positions closed since the start."""
        return self._books.closed_count

    # -- events -------------------------------------------------------------------------------------

    def on_event(self, event: UserEvent) -> None:
        """Take one event of the private stream; called on the loop, never blocks."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._recorder.count("trading.events_discarded")
            self.on_gap()

    def on_price(self, symbol: str, price: float) -> None:
        """A newer price of a symbol; called on the loop thousands of times a second, never blocks."""
        if self._books.positions:
            position = self._books.position_on(symbol)
            if position is not None:
                self._protector.on_price(position, price)

    def on_gap(self) -> None:
        """Events may have been missed: no entries until a reconciliation that began later is complete."""
        self._gap += 1
        self._books.reconcile_wanted.set()

    @property
    def gap(self) -> int:
        """The number of the newest gap."""
        return self._gap

    def reconciled_since(self, gap: int) -> bool:
        """Whether a reconciliation that began after that gap is complete."""
        return self._reconciled_gap >= gap

    def reconciled(self, gap: int) -> None:
        """A complete reconciliation began after that gap."""
        self._reconciled_gap = max(self._reconciled_gap, gap)

    async def events_applied(self, limit_s: float | None = None) -> bool:
        """Returns once every event taken so far is in the books. False when that took too long (wall)."""
        try:
            async with asyncio.timeout(limit_s):
                await self._queue.join()
        except TimeoutError:
            return False
        return True

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
                self._books.note_store(error)
                await pause(self._clock, self._retry_s)
            except CONTRADICTIONS as error:
                self._books.quarantine(event.symbol, error)
                return

    async def _dispatch(self, event: UserEvent) -> None:
        if isinstance(event, Order):
            await self._bookkeeper.learn(event)
        elif isinstance(event, Fill):
            await self._bookkeeper.book(event)
        else:
            await self.book_adjustment(event)

    # -- entries and exits --------------------------------------------------------------------------

    async def open(self, signal: Signal, approved: Approved) -> Position | Refused:
        """Enter at market and protect. Returns the position, protected or in the hands of its ladder.

        Refused: ORDER_REJECTED (nothing is held), ORDER_UNKNOWN (the symbol stays busy until the venue
        says what became of it), SYMBOL_HELD, COOLDOWN or ENTRIES_OFF (nothing was sent).
        """
        symbol = signal.symbol
        refused = self._entry_barred(symbol)
        if refused:
            return refused
        flight: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flights.add(flight)
        self._opening.add(symbol)
        try:
            return await self._opener.enter(signal, approved)
        finally:
            self._opening.discard(symbol)
            self._flights.discard(flight)
            flight.set_result(None)

    def _entry_barred(self, symbol: str) -> Refused | None:
        if self._draining:
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail="draining, running is needed")
        if halted := self._halted():
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail=halted)
        if self._books.store_failing:
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail="state cannot be written")
        if self._reconciled_gap < self._gap:
            return Refused(
                reason=RefusalReason.ENTRIES_OFF, detail="events may have been missed, reconciling first"
            )
        resting = sum(order.type.conditional for order in self._books.working_orders())
        if resting + 2 > MOST_CONDITIONAL:
            return Refused(
                reason=RefusalReason.ENTRIES_OFF,
                detail=f"{resting} conditional orders rest, the venue takes {MOST_CONDITIONAL}: "
                "there is no room for a stop",
            )
        if self._books.entries_barred:
            return Refused(reason=RefusalReason.ENTRIES_OFF, detail=self._books.entries_barred)
        blocked = self.blocked_symbols().get(symbol)
        held = self._ledger.holding(symbol).quantity
        if held and not blocked and self._books.position_on(symbol) is None:
            blocked = f"foreign: position {held}"  # nobody has looked at it yet
        if blocked or symbol in self.held_symbols():
            return Refused(
                reason=RefusalReason.SYMBOL_HELD, detail=blocked or "1 position or order there, 0 allowed"
            )
        return self._books.cooldowns.refusal(symbol, self._clock.now_ms())

    async def close(self, position: Position, reason: CloseReason) -> bool:
        """Close at market, reduce-only. False when it is not known to be closed yet.

        Stop and target rest until the venue is flat, so the position stays protected all the while.
        """
        return await self._closer.close(position, reason)

    def protect(self, position_id: str) -> None:
        """See to it that the position has its stop and its target."""
        self._protector.protect(position_id)

    def is_leftover(self, order: Order) -> bool:
        """An order that must not rest, by what is known of it now."""
        known = self._books.orders.get(order.client_order_id, order)
        return not known.type.conditional or self._books.is_leftover(known)

    def _sweep(self, position_id: str) -> None:
        self._protector.sweep(position_id)

    # -- what reconciliation does -------------------------------------------------------------------

    async def ask(self, order: Order) -> bool:
        """Ask the venue what became of an order. True once it is final and booked, or rests."""
        return await self._sender.ask(order)

    async def book_adjustment(self, adjustment: Adjustment) -> bool:
        """Book funding or a transfer once, and on the position it belongs to."""
        return await self._bookkeeper.book_adjustment(adjustment)

    def stop_in_doubt(self, position_id: str) -> None:
        """The stop does not rest and may be executing: until that is known the position counts as without."""
        self._books.unprotected_now(position_id)

    def stop_missing(self, position_id: str) -> None:
        """The venue does not hold the stop that we believed in."""
        self._protector.stop_missing(position_id)

    def target_missing(self, position_id: str) -> None:
        """The venue does not hold the target that we believed in."""
        self._protector.target_missing(position_id)

    def unconfirmed_positions(self) -> tuple[Position, ...]:
        """Restored ones that were not compared with the venue yet: nothing is sent for them."""
        return tuple(p for p in self._books.positions.values() if p.position_id in self._books.unconfirmed)

    def confirmed(self, position_id: str) -> None:
        """The venue holds a restored position as our books have it."""
        self._protector.confirmed(position_id)

    async def give_up_entry(self, position_id: str) -> None:
        """End an intention whose entry order ended without a fill."""
        await self._bookkeeper.give_up_entry(position_id)

    async def end_position(self, position_id: str, reason: CloseReason) -> None:
        """Close a position in our books that the venue no longer holds and no fill explains."""
        await self._bookkeeper.end_position(position_id, reason)

    async def correct_quantity(self, position_id: str, quantity: Decimal) -> None:
        """Take over the venue's quantity of a position; the venue is the truth for it."""
        await self._bookkeeper.correct_quantity(position_id, quantity)

    async def cancel(self, order: Order) -> bool:
        """Cancel one order of ours. False when the venue could not be asked."""
        return await self._sender.cancel(order)

    async def correct_books(
        self,
        symbol: str,
        holding: Holding,
        wallet: Decimal,
        why: str,
        at_ms: int,
        *,
        revision: int | None = None,
    ) -> Adjustment | None:
        """Take over what the venue holds of a symbol, and its wallet.

        None when it was done before, or when anything was booked since `revision`.
        """
        return await self._bookkeeper.correct(symbol, holding, wallet, why, at_ms, revision)

    async def book_settlement(
        self, amount: Decimal, why: str, at_ms: int, *, revision: int
    ) -> Adjustment | None:
        """Book an amount that nothing explains, at a person's word.

        None when it was done before, or when anything was booked since `revision`.
        """
        return await self._bookkeeper.book_settlement(amount, why, at_ms, revision)

    @property
    def revision(self) -> int:
        """Counts what happened on all symbols: see `version`."""
        return self._books.versions.total()

    async def book_missed(self, fill: Fill) -> bool:
        """Book an execution that the stream did not bring. False when it was booked before."""
        return await self._bookkeeper.book_missed(fill)

    async def take_over(self, position: Position) -> None:
        """A position that somebody else opened becomes ours, and gets its stop."""
        await self._bookkeeper.take_over(position)

    def quarantine(self, symbol: str, error: Exception) -> None:
        """What happened on a symbol cannot be booked: it is not traded until the next start."""
        self._books.quarantine(symbol, error)

    def block_foreign(self, found: dict[str, str], *, keep: frozenset[str] = frozenset()) -> None:
        """Symbols with foreign positions or orders; those no longer found are free again.

        Args: keep: symbols that were not looked at; what was known of them stays.
        """
        for symbol in found.keys() - self._books.foreign.keys():
            self._recorder.count("trading.foreign_symbols")
            log.error("symbol blocked: not in our books", symbol=symbol, detail=found[symbol])
        kept = {symbol: why for symbol, why in self._books.foreign.items() if symbol in keep}
        self._books.foreign = kept | found
