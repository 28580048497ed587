"""An in-memory venue that honours the Exchange port, and an executor at work on it.

Assumptions of the venue: market orders fill whole at the mark, fees are 0.05 %, events arrive in order
and at once unless held back, a triggered conditional order fills at the mark.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import msgspec

from service.clock import WallClock
from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    OrderRejected,
    VenueError,
    VenueUnavailable,
)
from service.records import (
    Account,
    Adjustment,
    Fill,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    Position,
    PositionSide,
    RefusalReason,
    Side,
    VenuePosition,
)
from service.settings import TradingSettings
from service.store.sqlite import SqliteStore, open_sqlite
from service.trading.executor import Executor, rules_unknown
from service.trading.ledger import Ledger, open_ledger
from service.trading.orders import new_order
from service.trading.protecting import InstrumentOf
from service.trading.ranking import Refused
from service.trading.reconcile import Reconciler
from service.trading.sending import Rules
from service.trading.sizing import Approved
from tests.recorder import Kept, Recorder
from tests.samples import instrument, signal

FEE = Decimal("0.0005")
ZERO = Decimal(0)

RULES = instrument(
    "AUSDT",
    tick_size=Decimal("0.5"),
    step_size=Decimal("1.5"),
    market_step_size=Decimal("1.5"),
    max_price=Decimal(1000),
    min_quantity=Decimal("1.5"),
    market_min_quantity=Decimal("1.5"),
    market_max_quantity=Decimal(1000),
    multiplier_up=Decimal("1.01"),
    multiplier_down=Decimal("0.99"),
)


class Venue:
    """One account in memory. `before[purpose]` runs on each place and may raise; `lose[purpose]` counts
    answers that are lost after the effect; `silent` holds events back."""

    def __init__(self) -> None:
        self.mark = Decimal(100)
        self.wallet = Decimal(1000)
        self.held: dict[str, tuple[Decimal, Decimal]] = {}
        self.orders: dict[str, Order] = {}
        self.fills: list[Fill] = []
        self.income: list[Adjustment] = []
        self.sent: list[OrderRequest] = []
        self.cancelled: list[str] = []
        self.before: dict[OrderPurpose, list[VenueError]] = {}
        self.lose: dict[OrderPurpose, int] = {}
        self.silent = False
        self.repeats = 1
        self.forgetful = False  # denies every order it is asked for
        self.amnesia = False  # denies every execution
        self.reachable = True
        self.listener: Callable[[Order | Fill | Adjustment], None] = lambda event: None
        self.known: Callable[[OrderRequest], object] = lambda request: None
        self.time_ms = 10_000
        self.numbers = itertools.count(1)
        self.traded = asyncio.Event()

    def emit(self, event: Order | Fill | Adjustment) -> None:
        if not self.silent:
            for _ in range(self.repeats):
                self.listener(event)

    def _now(self) -> int:
        self.time_ms += 1
        return self.time_ms

    def _check(self) -> None:
        if not self.reachable:
            raise VenueUnavailable("out of reach")

    async def set_leverage(self, symbol: str, leverage: int, margin_type: str) -> None:
        self._check()

    async def place(self, request: OrderRequest) -> Order:
        self._check()
        self.known(request)
        self.sent.append(request)
        failures = self.before.get(request.purpose)
        if failures:
            raise failures.pop(0)
        if request.close_position and not self.held.get(request.symbol, (ZERO,))[0]:
            raise OrderRejected("no position to close", code=-4509)
        whole = [o for o in self.resting(request.purpose) if o.symbol == request.symbol and not o.quantity]
        if request.close_position and whole:
            raise OrderRejected("a closePosition order of this direction rests", code=-4130)
        if request.reduce_only and not self.held.get(request.symbol, (ZERO,))[0]:
            raise OrderRejected("ReduceOnly Order is rejected.", code=-2022)
        order = msgspec.structs.replace(
            new_order(request, self._now()),
            venue_order_id=str(next(self.numbers)),
            status=OrderStatus.OPEN,
        )
        self.orders[order.client_order_id] = order
        self.emit(order)
        if not request.type.conditional:
            quantity, held = request.quantity or ZERO, abs(self.held.get(request.symbol, (ZERO,))[0])
            self.execute(order.client_order_id, min(quantity, held) if request.reduce_only else quantity)
        if self.lose.get(request.purpose, 0):
            self.lose[request.purpose] -= 1
            raise OrderOutcomeUnknown("time-out", code=-1007)
        return order

    def execute(self, name: str, quantity: Decimal, client_id: str = "") -> None:
        """Fill an order at the mark."""
        order = self.orders[name]
        self.trade(order.symbol, order.side, quantity, client_id or name, order.venue_order_id)
        self.orders[name] = msgspec.structs.replace(
            order,
            status=OrderStatus.EXPIRED if order.quantity > quantity else OrderStatus.FILLED,
            quantity=order.quantity or quantity,
            filled_quantity=quantity,
            average_price=self.mark,
            updated_ms=self._now(),
        )
        self.emit(self.orders[name])

    def trade(self, symbol: str, side: Side, quantity: Decimal, client_id: str, venue_id: str = "") -> None:
        signed = quantity if side is Side.BUY else -quantity
        amount, entry = self.held.get(symbol, (ZERO, ZERO))
        realised = ZERO
        if amount * signed < 0:
            closing = min(abs(amount), abs(signed))
            realised = closing * (self.mark - entry) * (1 if amount > 0 else -1)
        elif amount + signed:
            entry = (amount * entry + signed * self.mark) / (amount + signed)
        fee = quantity * self.mark * FEE
        self.wallet += realised - fee
        if amount + signed:
            self.held[symbol] = (amount + signed, entry)
        else:
            self.held.pop(symbol, None)
        fill = Fill(
            trade_id=str(len(self.fills) + 1),
            client_order_id=client_id,
            venue_order_id=venue_id,
            symbol=symbol,
            side=side,
            price=self.mark,
            quantity=quantity,
            fee=fee,
            fee_asset="USDT",
            realised_pnl=realised,
            maker=False,
            filled_ms=self._now(),
        )
        self.fills.append(fill)
        self.traded.set()
        self.emit(fill)

    def trigger(self, purpose: OrderPurpose, mark: str) -> None:
        self.mark = Decimal(mark)
        order = self.resting(purpose)[0]
        self.orders[order.client_order_id] = msgspec.structs.replace(order, status=OrderStatus.TRIGGERED)
        self.emit(self.orders[order.client_order_id])
        self.execute(order.client_order_id, abs(self.held[order.symbol][0]))

    def resting(self, purpose: OrderPurpose) -> list[Order]:
        return [o for o in self.orders.values() if o.purpose is purpose and o.status is OrderStatus.OPEN]

    async def cancel(self, order: Order) -> bool:
        self._check()
        self.cancelled.append(order.client_order_id)
        found = self.orders.get(order.client_order_id)
        if found is None or found.status.final:
            return False
        self.vanish(order.client_order_id)
        return True

    async def executions(self, symbol: str, since_ms: int) -> list[Fill]:
        self._check()
        return [f for f in self.fills if f.symbol == symbol and f.filled_ms >= since_ms and not self.amnesia]

    def vanish(self, name: str) -> None:
        self.orders[name] = msgspec.structs.replace(self.orders[name], status=OrderStatus.CANCELLED)
        self.emit(self.orders[name])

    async def order(self, order: Order) -> tuple[Order, list[Fill]] | None:
        self._check()
        found = self.orders.get(order.client_order_id)
        if found is None or self.forgetful:
            return None
        return found, [f for f in self.fills if f.client_order_id == order.client_order_id]

    async def open_orders(self) -> list[Order]:
        self._check()
        return [o for o in self.orders.values() if not o.status.final and o.type.conditional]

    async def adjustments(self, since_ms: int) -> list[Adjustment]:
        self._check()
        return [a for a in self.income if a.at_ms >= since_ms]

    async def account(self) -> Account:
        self._check()
        positions = tuple(
            VenuePosition(
                symbol=symbol,
                quantity=quantity,
                entry_price=entry,
                mark_price=self.mark,
                unrealised_pnl=quantity * (self.mark - entry),
                liquidation_price=ZERO,
                leverage=3,
                updated_ms=self.time_ms,
            )
            for symbol, (quantity, entry) in self.held.items()
        )
        unrealised = sum((p.unrealised_pnl for p in positions), ZERO)
        return Account(
            wallet_balance=self.wallet,
            unrealised_pnl=unrealised,
            equity=self.wallet + unrealised,
            available_balance=self.wallet,
            positions=positions,
            at_ms=self._now(),
        )


class Desk(msgspec.Struct, kw_only=True):
    """All that a test touches."""

    venue: Venue
    executor: Executor
    reconciler: Reconciler
    store: SqliteStore
    ledger: Ledger
    archive: Kept
    counts: Recorder

    async def closed(self) -> Position:
        await quiet(self)
        [position] = await self.store.closed_positions(10)
        return position

    async def equal(self) -> bool:
        return self.ledger.compare(await self.venue.account()).difference == 0


async def quiet(desk: Desk) -> None:
    """Everything in flight has ended; unlike `settle`, entries stay allowed."""
    async with asyncio.timeout(30):
        while True:
            await desk.executor.events_applied()
            waiting = [*desk.executor._flights, *desk.executor._protector.background]
            if not waiting:
                return
            await asyncio.wait(waiting)


@asynccontextmanager
async def desk_at(
    path: Path,
    venue: Venue,
    *,
    rules: Rules = rules_unknown,
    instrument_of: InstrumentOf = lambda symbol: None,
    halted: Callable[[], str] = lambda: "",
    cooldown_minutes: float = 0.0,
    **settings: object,
) -> AsyncIterator[Desk]:
    trading = msgspec.structs.replace(TradingSettings(answer_limit_s=0.2, reconcile_s=3600), **settings)
    archive, counts, clock = Kept(), Recorder(), WallClock()
    async with open_sqlite(path / "state") as store:
        ledger, opening = await open_ledger(store, await venue.account(), counts)
        if opening is not None:  # tests look at what is booked later
            booked = await store.unarchived("adjustments")
            await store.archived([("adjustments", adjustment) for adjustment in booked])
        executor = Executor(
            venue,
            store,
            archive,
            ledger,
            clock,
            trading,
            counts,
            ask_delays_s=(0, 0.001, 0.002),
            retry_s=0.001,
            rules=rules,
            instrument_of=instrument_of,
            halted=halted,
            order_window=4,
            cooldown_minutes=cooldown_minutes,
        )
        venue.listener = executor.on_event
        async with executor.running():
            yield Desk(
                venue=venue,
                executor=executor,
                reconciler=Reconciler(
                    executor, venue, store, ledger, clock, counts, trading, instrument_of=instrument_of
                ),
                store=store,
                ledger=ledger,
                archive=archive,
                counts=counts,
            )
            venue.listener = lambda event: None


def approved(side: PositionSide = PositionSide.LONG) -> Approved:
    return Approved(
        quantity=Decimal(2),
        leverage=4,
        entry=Decimal(100),
        stop=Decimal(100 - side.sign),
        target=Decimal(100 + 2 * side.sign),
        notional=Decimal(200),
        margin=Decimal(50),
        risk_amount=Decimal("2.2"),
        equity=Decimal(1000),
    )


async def opened(desk: Desk) -> Position:
    position = await desk.executor.open(signal(), approved())
    assert isinstance(position, Position)
    await quiet(desk)
    [current] = desk.executor.positions()
    return current


def refusal(answer: Position | Refused) -> RefusalReason:
    assert isinstance(answer, Refused)
    return answer.reason


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def full_disk(*_args: object, **_kwargs: object) -> None:
    raise DataDirectoryUnusable("No space left on device")
