"""What is known of our orders and positions: in memory, and written down in the store.

One `lock` keeps it: whoever changes an order or a position holds it. A store that cannot be written
stops entries and nothing else.
"""

import asyncio
from collections import Counter
from decimal import Decimal

import structlog

from service.errors import DataDirectoryUnusable, StateConflict
from service.ports import Clock, Recorder, StateStore
from service.records import CloseReason, Order, OrderStatus, Position
from service.trading.orders import client_order_id, is_ours
from service.trading.outbox import Outbox
from service.trading.positions import is_open

log = structlog.get_logger("trading.books")

ZERO = Decimal(0)


class Books:
    """Shared by the parts of the executor; read freely, change with `lock` held."""

    def __init__(self, store: StateStore, outbox: Outbox, clock: Clock, recorder: Recorder) -> None:
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._recorder = recorder
        self._restored = False
        self.lock = asyncio.Lock()
        self.orders: dict[str, Order] = {}  # of open positions, and all that are not final
        self.filled: dict[str, Decimal] = {}  # booked per order in `orders`
        self.changed: dict[str, asyncio.Event] = {}  # per order somebody waits for
        self.positions: dict[str, Position] = {}  # not closed, meant to be ones included
        self.entered: dict[str, Decimal] = {}  # quantity entered per open position
        self.meant: dict[str, CloseReason] = {}  # why we are closing, per position
        self.unprotected_since: dict[str, float] = {}  # position to monotonic seconds
        self.foreign: dict[str, str] = {}  # symbol to why; set by reconciliation
        self.quarantined: dict[str, str] = {}  # symbol to why; until the next start
        self.versions: Counter[str] = Counter()
        self.store_failing = False
        self.reconcile_wanted = asyncio.Event()

    async def restore(self) -> None:
        """Read positions and orders from the store; once, however often it is asked."""
        if self._restored:
            return
        self._restored = True
        for position in await self._store.open_positions():
            self.positions[position.position_id] = position
            entries = await self._store.fills(client_order_id(position.position_id, "entry", 0))
            self.entered[position.position_id] = sum((fill.quantity for fill in entries), ZERO)
            if is_open(position) and not position.protected_ms:
                self.unprotected_since[position.position_id] = self._clock.monotonic_s()
            entry = await self._store.order(client_order_id(position.position_id, "entry", 0))
            if entry is not None and not is_open(position):
                self.filled[entry.client_order_id] = self.entered[position.position_id]
                self.orders[entry.client_order_id] = entry  # final perhaps, and yet without its fills
        for order in await self._store.open_orders():
            fills = await self._store.fills(order.client_order_id)
            self.filled[order.client_order_id] = sum((fill.quantity for fill in fills), ZERO)
            self.orders[order.client_order_id] = order
        if self.positions:
            log.info("positions restored", symbols=[p.symbol for p in self.positions.values()])

    def working_orders(self) -> tuple[Order, ...]:
        """Our orders that are not final, or whose executions are not all booked."""
        return tuple(order for order in self.orders.values() if not self.ended(order))

    def unprotected(self) -> list[tuple[str, float]]:
        """Symbol and wall seconds of each position that has no stop on the venue."""
        now_s = self._clock.monotonic_s()
        return [
            (self.positions[name].symbol, now_s - since_s) for name, since_s in self.unprotected_since.items()
        ]

    def ended(self, order: Order) -> bool:
        """Final, with all its executions booked."""
        if not order.status.final:
            return False
        due = order.filled_quantity
        if order.status is OrderStatus.FILLED:
            due = max(due, order.quantity)
        return self.filled.get(order.client_order_id, ZERO) >= due

    async def known(self, name: str) -> Order | None:
        order = self.orders.get(name)
        if order is None and is_ours(name):
            order = await self._store.order(name)
        return order

    def position_on(self, symbol: str) -> Position | None:
        return next((p for p in self.positions.values() if p.symbol == symbol and is_open(p)), None)

    async def next_id(self, position_id: str, leg: str) -> str:
        attempt = 0
        while True:
            name = client_order_id(position_id, leg, attempt)
            if name not in self.orders and await self._store.order(name) is None:
                return name
            attempt += 1

    def remember(self, order: Order) -> None:
        self.orders.setdefault(order.client_order_id, order)

    async def save_order(self, order: Order) -> None:
        """Into store, memory and archive. A store that fails never keeps a position from its protection."""
        self.orders[order.client_order_id] = order
        try:
            await self._store.save_order(order)
            self.store_failing = False
        except DataDirectoryUnusable as error:
            self.note_store(error)
        except StateConflict as error:
            self.quarantine(order.symbol, error)
        self._outbox.put("orders", order)

    async def save_position(self, position: Position) -> None:
        if not position.closed_ms:
            self.positions[position.position_id] = position
        try:
            await self._store.save_position(position)
            self.store_failing = False
        except DataDirectoryUnusable as error:
            self.note_store(error)

    def note_store(self, error: DataDirectoryUnusable) -> None:
        self.store_failing = True
        self._recorder.count("trading.store_failures")
        log.error("state cannot be written: no entries", error=str(error))

    def quarantine(self, symbol: str, error: Exception) -> None:
        self._recorder.count("trading.quarantined")
        self.quarantined[symbol] = f"what happened could not be booked: {error!r}"
        log.error("symbol quarantined: what happened could not be booked", symbol=symbol, exc_info=error)
        self.reconcile_wanted.set()
