"""What is known of our orders and positions: in memory, and written down in the store.

One `lock` keeps it: whoever changes an order or a position holds it, except who makes a new order. A store
that cannot be written stops entries and nothing else.
"""

import asyncio
import itertools
from collections import Counter
from decimal import Decimal

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, StateConflict
from service.ports import Clock, Recorder, StateStore
from service.records import Order, OrderPurpose, OrderStatus, Position
from service.trading.cooldowns import Cooldowns
from service.trading.orders import LEG_LETTERS, LEG_PURPOSES, client_order_id, is_ours, order_leg
from service.trading.outbox import Outbox
from service.trading.positions import is_open

log = structlog.get_logger("trading.books")

ZERO = Decimal(0)
ATTEMPTS_KEPT = 10
"""Of one leg of an open position; of what ended without an execution before these the store alone knows."""


class Books:
    """Shared by the parts of the executor; read freely, change with `lock` held, but for a new order."""

    def __init__(
        self, store: StateStore, outbox: Outbox, clock: Clock, recorder: Recorder, cooldowns: Cooldowns
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._recorder = recorder
        self._restored = False
        self.lock = asyncio.Lock()
        self.orders: dict[str, Order] = {}  # of open positions, as `let_go` leaves them, and all not final
        self.filled: dict[str, Decimal] = {}  # booked per order in `orders`
        self.changed: dict[str, asyncio.Event] = {}  # per order somebody waits for
        self.positions: dict[str, Position] = {}  # not closed, meant to be ones included
        self.unconfirmed: set[str] = set()
        """Ids of restored positions that were not compared with the venue: nothing is sent for them, since
        older books may hold one that ended, and another may have been opened on its symbol since."""
        self.begun: set[str] = set()  # of `positions`, begun in this run: all their orders are in `orders`
        self.entered: dict[str, Decimal] = {}  # quantity entered per open position
        self.gone: dict[str, dict[str, int]] = {}  # per open position and leg: attempts that were let go of
        self.unprotected_since: dict[str, float] = {}  # position to monotonic seconds
        self.foreign: dict[str, str] = {}  # symbol to why; set by reconciliation
        self.quarantined: dict[str, str] = {}  # symbol to why; until the next start
        self.cooldowns = cooldowns
        self.versions: Counter[str] = Counter()
        self._barred: tuple[str, float] = ("", 0.0)  # why the venue lets nothing be opened, until when
        self.closed_count = 0
        self.store_failing = False
        self.unsaved: dict[str, Order | Position] = {}  # by id: newest records that the store did not take
        self.reconcile_wanted = asyncio.Event()

    async def restore(self) -> None:
        """Read positions and orders from the store; once, however often it is asked."""
        if self._restored:
            return
        for position in await self._store.open_positions():
            self.positions[position.position_id] = position
            self.unconfirmed.add(position.position_id)
            self.entered[position.position_id] = await self._entered(position.position_id)
            if is_open(position) and not position.protected_ms:
                self.unprotected_now(position.position_id)
            for leg in LEG_LETTERS:
                await self._restore_leg(position.position_id, leg)
        for order in await self._store.open_orders():
            await self._restore_order(order)
        self.cooldowns.restore(await self._store.cooldowns(), self._clock.now_ms())
        self._restored = True
        if self.positions:
            log.info("positions restored", symbols=[p.symbol for p in self.positions.values()])

    async def _entered(self, position_id: str) -> Decimal:
        total = ZERO
        for attempt in itertools.count():
            name = client_order_id(position_id, "entry", attempt)
            if await self._store.order(name) is None:
                return total
            total += await self.booked(name)
        raise AssertionError("unreachable")

    async def _restore_leg(self, position_id: str, leg: str) -> None:
        """Final ones too: their executions may not all be booked."""
        for attempt in itertools.count():
            order = await self._store.order(client_order_id(position_id, leg, attempt))
            if order is None:
                return
            await self._restore_order(order)
            self.let_go(order)

    async def _restore_order(self, order: Order) -> None:
        self.filled[order.client_order_id] = await self.booked(order.client_order_id)
        self.orders[order.client_order_id] = order

    async def booked(self, name: str) -> Decimal:
        """The quantity of an order's executions in the store."""
        return sum((fill.quantity for fill in await self._store.fills(name)), ZERO)

    def working_orders(self) -> tuple[Order, ...]:
        """Our orders that are not final, or whose executions are not all booked."""
        return tuple(order for order in self.orders.values() if not self.ended(order))

    def unprotected_now(self, position_id: str) -> None:
        """No stop of the position rests on the venue; the first to say so starts the clock."""
        self.unprotected_since.setdefault(position_id, self._clock.monotonic_s())

    def protected(self, position_id: str) -> None:
        """The position has its stop, or is no more. How long it went without is told and counted."""
        since_s = self.unprotected_since.pop(position_id, None)
        if since_s is None:
            return
        seconds = self._clock.monotonic_s() - since_s
        self._recorder.record("trading.unprotected", seconds)
        self._recorder.count("trading.unprotected_ms", max(round(seconds * 1000), 1))

    def unprotected(self) -> list[tuple[str, float]]:
        """Symbol and wall seconds of each position that has no stop on the venue."""
        now_s = self._clock.monotonic_s()
        return [
            (self.positions[name].symbol, now_s - since_s) for name, since_s in self.unprotected_since.items()
        ]

    def orders_of(self, position_id: str) -> tuple[Order, ...]:
        """The orders of one position that are not final, or whose executions are not all booked."""
        return tuple(order for order in self.working_orders() if order.position_id == position_id)

    def is_leftover(self, order: Order) -> bool:
        """A conditional order that must not rest: its position ended, or has a newer one in its place."""
        position = self.positions.get(order.position_id)
        if not order.type.conditional or position is None:
            return order.type.conditional
        current = position.stop_order_id if order.purpose is OrderPurpose.STOP else position.target_order_id
        resting = order.status in (OrderStatus.OPEN, OrderStatus.PARTLY_FILLED)
        return resting and current not in ("", order.client_order_id)

    def ended(self, order: Order) -> bool:
        """Final, with all its executions booked."""
        if not order.status.final:
            return False
        due = order.filled_quantity
        if order.status is OrderStatus.FILLED:
            due = max(due, order.quantity)
        return self.filled.get(order.client_order_id, ZERO) >= due

    async def known(self, name: str) -> Order | None:
        """Our order of that client id, from memory or store; None when it is not ours."""
        order = self.orders.get(name)
        if order is None and is_ours(name):
            order = await self._store.order(name)
        return order

    def recognised(self, found: Order) -> Order | None:
        """An order that bears our name and was never written down: the name tells whose it is."""
        for position in self.positions.values():
            for leg in LEG_LETTERS:
                if found.client_order_id.startswith(client_order_id(position.position_id, leg, 0)[:-2]):
                    return msgspec.structs.replace(
                        found,
                        position_id=position.position_id,
                        purpose=LEG_PURPOSES[leg],
                        status=OrderStatus.INTENDED,
                        venue_order_id="",
                        filled_quantity=ZERO,
                        average_price=ZERO,
                    )
        return None

    def position_on(self, symbol: str) -> Position | None:
        """The open position on a symbol."""
        return next((p for p in self.positions.values() if p.symbol == symbol and is_open(p)), None)

    async def next_id(self, position_id: str, leg: str) -> str:
        """The first client id of a leg that no order has had.

        The orders of an open position are in memory, or counted as let go of, so a store that cannot be read
        is no reason to leave the position without its stop.
        """
        attempt = self.gone.get(position_id, {}).get(leg, 0)
        while (name := client_order_id(position_id, leg, attempt)) in self.orders or (
            position_id not in self.begun and await self._stored(name)
        ):
            attempt += 1
        return name

    async def _stored(self, name: str) -> bool:
        try:
            return await self._store.order(name) is not None
        except DataDirectoryUnusable as error:
            self.note_store(error)
            return False

    def remember(self, order: Order) -> None:
        self.orders.setdefault(order.client_order_id, order)

    def let_go(self, order: Order) -> None:
        """One more order of an open position ended: forget the oldest of its leg that executed nothing.

        A stop that trails, or that the venue refuses, has an order every few seconds for as long as the
        position lives. An order that is asked for again is read from the store.
        """
        position, leg = self.positions.get(order.position_id), order_leg(order.client_order_id)
        if position is None or not leg:
            return
        first = last = self.gone.get(order.position_id, {}).get(leg, 0)
        while client_order_id(order.position_id, leg, last) in self.orders:
            last += 1
        while last - first > ATTEMPTS_KEPT:
            name = client_order_id(order.position_id, leg, first)
            if not self._done_with(self.orders[name], position):
                break
            del self.orders[name]
            self.filled.pop(name, None)
            first += 1
            self.gone.setdefault(order.position_id, {})[leg] = first

    def _done_with(self, order: Order, position: Position) -> bool:
        name = order.client_order_id
        in_use = name in (position.stop_order_id, position.target_order_id) or name in self.changed
        executed = order.filled_quantity or self.filled.get(name)
        return self.ended(order) and not executed and not in_use and name not in self.unsaved

    def forget(self, position_id: str) -> None:
        """A position ended. Its orders leave with their own ends."""
        self.positions.pop(position_id, None)
        self.unconfirmed.discard(position_id)
        self.begun.discard(position_id)
        self.entered.pop(position_id, None)
        self.gone.pop(position_id, None)
        self.protected(position_id)

    async def save_order(self, order: Order) -> None:
        """Into store, memory and archive. A store that fails never keeps a position from its protection."""
        self.orders[order.client_order_id] = order
        try:
            await self._store.save_order(order)
            self.saved(order.client_order_id)
        except DataDirectoryUnusable as error:
            self.unsaved[order.client_order_id] = order
            self.note_store(error)
        except StateConflict as error:
            self.quarantine(order.symbol, error)
        self._outbox.put("orders", order)

    async def save_position(self, position: Position) -> None:
        """Into store and memory; a closed one into the store only. Fails as `save_order` does."""
        if not position.closed_ms:
            self.positions[position.position_id] = position
        try:
            await self._put(position)
            self.saved(position.position_id)
        except DataDirectoryUnusable as error:
            self.unsaved[position.position_id] = position
            self.note_store(error)
        except StateConflict as error:
            self.quarantine(position.symbol, error)

    async def _put(self, position: Position) -> None:
        """With the cooldown that its end began, in one transaction."""
        await self._store.save_position(position, cooldown_until_ms=self.cooldowns.until_ms(position))

    def saved(self, name: str) -> None:
        """The store took this record."""
        self.unsaved.pop(name, None)
        self.store_failing = bool(self.unsaved)

    async def save_again(self) -> None:
        """Write what the store did not take, each record as it is now. Raises DataDirectoryUnusable."""
        async with self.lock:
            for name, record in list(self.unsaved.items()):
                try:
                    if isinstance(record, Order):
                        await self._store.save_order(record)
                        self._outbox.kept_late("orders", record)
                    else:
                        await self._put(record)
                        self._outbox.kept_late("positions", record)
                except StateConflict as error:
                    self.quarantine(record.symbol, error)
                del self.unsaved[name]
            self.store_failing = bool(self.unsaved)  # a new order's write may have failed meanwhile
        log.info("state can be written again")

    def note_store(self, error: DataDirectoryUnusable) -> None:
        self.store_failing = True
        self._recorder.count("trading.store_failures")
        log.error("state cannot be written: no entries", error=str(error))

    def bar_entries(self, reason: str, seconds: float) -> None:
        """The venue lets nothing be opened. Args: seconds: wall time, infinite until the next start."""
        self._recorder.count("trading.entries_barred")
        log.error("no entries: the venue allows none", reason=reason, seconds=seconds)
        self._barred = (reason, max(self._barred[1], self._clock.monotonic_s() + seconds))

    @property
    def entries_barred(self) -> str:
        """Why the venue lets nothing be opened now, or ""."""
        reason, until_s = self._barred
        return reason if self._clock.monotonic_s() < until_s else ""

    def quarantine(self, symbol: str, error: Exception) -> None:
        self._recorder.count("trading.quarantined")
        self.quarantined[symbol] = f"what happened could not be booked: {error!r}"
        log.error("symbol quarantined: what happened could not be booked", symbol=symbol, exc_info=error)
        self.reconcile_wanted.set()
