"""The executor and reconciliation against an in-memory venue that honours the Exchange port.

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
import pytest

from service.clock import WallClock
from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    OrderRejected,
    RequestRejected,
    StateConflict,
    VenueError,
    VenueUnavailable,
)
from service.records import (
    Account,
    Adjustment,
    CloseReason,
    Fill,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
    Position,
    PositionSide,
    Record,
    RefusalReason,
    Side,
    Signal,
    VenuePosition,
)
from service.settings import TradingSettings
from service.store.sqlite import SqliteStore, open_sqlite
from service.trading.executor import Executor
from service.trading.ledger import Holding, Ledger, open_ledger
from service.trading.orders import new_order
from service.trading.ranking import Refused
from service.trading.reconcile import Reconciler
from service.trading.sizing import Approved

FEE = Decimal("0.0005")
ZERO = Decimal(0)


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
        self.forgetful = False
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
            self.execute(order.client_order_id, request.quantity or ZERO)
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
            status=OrderStatus.FILLED,
            quantity=quantity,
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

    async def cancel(self, order: Order) -> None:
        self._check()
        self.cancelled.append(order.client_order_id)
        found = self.orders.get(order.client_order_id)
        if found is not None and not found.status.final:
            self.vanish(order.client_order_id)

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


class Kept:
    writable = True

    def __init__(self) -> None:
        self.records: list[tuple[str, Record]] = []

    async def put(self, stream: str, record: Record) -> None:
        self.records.append((stream, record))

    def of(self, stream: str) -> list[Record]:
        return [record for name, record in self.records if name == stream]


class Counts:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def record(self, operation: str, seconds: float) -> None: ...

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


class Desk(msgspec.Struct, kw_only=True):
    """All that a test touches."""

    venue: Venue
    executor: Executor
    reconciler: Reconciler
    store: SqliteStore
    ledger: Ledger
    archive: Kept
    counts: Counts

    async def closed(self) -> Position:
        await quiet(self)
        [position] = await self.store.closed_positions(10)
        return position

    async def equal(self) -> bool:
        return self.ledger.compare(await self.venue.account()).difference == 0


async def quiet(desk: Desk) -> None:
    """Everything in flight has ended; unlike `settle`, entries stay allowed."""
    async with asyncio.timeout(5):
        while True:
            await desk.executor.events_applied()
            waiting = [*desk.executor._flights, *desk.executor._protector.background]
            if not waiting:
                return
            await asyncio.wait(waiting)


@asynccontextmanager
async def desk_at(path: Path, venue: Venue, **settings: object) -> AsyncIterator[Desk]:
    trading = msgspec.structs.replace(TradingSettings(answer_limit_s=0.2), **settings)
    archive, counts, clock = Kept(), Counts(), WallClock()
    async with open_sqlite(path / "state") as store:
        ledger, _ = await open_ledger(store, await venue.account(), counts)
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
        )
        venue.listener = executor.on_event
        async with executor.running():
            yield Desk(
                venue=venue,
                executor=executor,
                reconciler=Reconciler(
                    executor, venue, store, archive, ledger, clock, counts, interval_s=3600
                ),
                store=store,
                ledger=ledger,
                archive=archive,
                counts=counts,
            )
            venue.listener = lambda event: None


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path, Venue()) as opened:
        yield opened


def signal(name: str = "s1", symbol: str = "AUSDT", side: PositionSide = PositionSide.LONG) -> Signal:
    return Signal(
        signal_id=name,
        strategy="s",
        symbol=symbol,
        position_side=side,
        candle_close_ms=0,
        entry=100.0,
        stop=100.0 - side.sign,
        target=100.0 + 2 * side.sign,
        atr=0.5,
        confidence=0.6,
        scores={},
        features={},
    )


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


async def test_an_entry_gets_its_stop_and_target_on_the_venue(desk: Desk):
    position = await opened(desk)
    assert (position.quantity, position.entry_price, position.margin) == (2, 100, 50)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    [target] = desk.venue.resting(OrderPurpose.TARGET)
    assert (stop.trigger_price, target.trigger_price) == (99, 102)
    assert (stop.side, stop.type) == (Side.SELL, OrderType.STOP_MARKET)
    assert (position.stop_order_id, position.target_order_id) == (
        stop.client_order_id,
        target.client_order_id,
    )
    assert position.protected_ms > 0
    assert desk.executor.unprotected() == []
    assert all(r.close_position for r in desk.venue.sent if r.type.conditional)
    assert await desk.equal()


async def test_an_entry_is_written_down_before_it_is_sent(tmp_path: Path):
    venue = Venue()
    written: list[int] = []

    def look(request: OrderRequest) -> None:
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(tmp_path / "state")) as db:
            sql = "select count(*) from orders where client_order_id = ?"
            written.append(db.execute(sql, (request.client_order_id,)).fetchone()[0])

    venue.known = look
    async with desk_at(tmp_path, venue) as desk:
        await opened(desk)
    assert written == [1, 1, 1]


@pytest.mark.parametrize(
    ("purpose", "mark", "reason", "pnl"),
    [(OrderPurpose.STOP, "99", "stop", -2), (OrderPurpose.TARGET, "102", "target", 4)],
)
async def test_a_close_by_one_leg_cancels_the_other(desk: Desk, purpose, mark, reason, pnl):
    await opened(desk)
    desk.venue.trigger(purpose, mark)
    position = await desk.closed()
    assert (position.close_reason, position.realised_pnl, position.exit_price) == (reason, pnl, Decimal(mark))
    assert position.fees == (100 + Decimal(mark)) * 2 * FEE
    assert position.quantity == 0
    assert await desk.venue.open_orders() == []
    assert desk.executor.held_symbols() == frozenset()
    assert await desk.equal()
    assert desk.archive.of("positions")[-1] == position


async def test_duplicated_events_are_booked_once(desk: Desk):
    desk.venue.repeats = 3
    await opened(desk)
    desk.venue.trigger(OrderPurpose.STOP, "99")
    position = await desk.closed()
    assert position.realised_pnl == -2
    assert len(desk.archive.of("fills")) == 2
    assert await desk.equal()


async def test_a_lost_answer_is_asked_for_and_never_sent_again(desk: Desk):
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1, OrderPurpose.STOP: 1, OrderPurpose.TARGET: 1}
    position = await opened(desk)
    assert position.protected_ms > 0
    purposes = sorted(request.purpose for request in desk.venue.sent)
    assert purposes == ["entry", "stop", "target"]
    assert desk.counts.counts["trading.orders_unknown"] == 3
    assert await desk.equal()


async def test_an_entry_whose_request_was_lost_ends_as_rejected(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderOutcomeUnknown("time-out")]}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert desk.executor.held_symbols() == frozenset()
    assert await desk.store.closed_positions(10) == []
    assert await desk.store.open_positions() == []


async def test_an_entry_of_unknown_fate_keeps_its_symbol_busy_and_is_protected_once_found(desk: Desk):
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1}

    def cut(request: OrderRequest) -> None:
        desk.venue.known = lambda request: None
        desk.venue.reachable = False

    desk.venue.known = cut
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert refusal(await desk.executor.open(signal("s2"), approved())) is RefusalReason.SYMBOL_HELD
    assert len(desk.venue.sent) == 1
    desk.venue.reachable = True
    await desk.reconciler.reconcile()
    await quiet(desk)
    [position] = desk.executor.positions()
    assert position.protected_ms > 0
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    assert await desk.equal()


async def test_a_denied_order_is_not_given_up_while_something_is_held(desk: Desk):
    desk.venue.silent = True
    desk.venue.forgetful = True
    desk.venue.lose = {OrderPurpose.ENTRY: 1}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert "AUSDT" in desk.executor.held_symbols()


async def test_a_rejected_entry_is_refused_with_the_venues_words(desk: Desk):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("Margin is insufficient.", code=-2019)]}
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert isinstance(answer, Refused)
    assert "-2019" in answer.detail
    assert desk.executor.held_symbols() == frozenset()


async def test_one_signal_is_entered_once(desk: Desk):
    await opened(desk)
    desk.venue.trigger(OrderPurpose.STOP, "99")
    await desk.closed()
    assert refusal(await desk.executor.open(signal(), approved())) is RefusalReason.SYMBOL_HELD
    assert isinstance(await desk.executor.open(signal("s2"), approved()), Position)


async def test_a_stop_that_is_already_breached_closes_at_market(desk: Desk):
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("would trigger", code=-2021)]}
    await desk.executor.open(signal(), approved())
    position = await desk.closed()
    assert position.close_reason == "stop"
    assert desk.venue.held == {}
    [exit_] = [request for request in desk.venue.sent if request.purpose is OrderPurpose.EXIT]
    assert exit_.reduce_only
    assert await desk.venue.open_orders() == []


async def test_a_rejected_stop_is_tried_again_then_with_the_other_working_type(desk: Desk):
    refused = OrderRejected("no", code=-4131)
    desk.venue.before = {OrderPurpose.STOP: [refused, refused]}
    position = await opened(desk)
    stops = [request for request in desk.venue.sent if request.purpose is OrderPurpose.STOP]
    assert [request.working_type for request in stops] == ["MARK_PRICE", "MARK_PRICE", "CONTRACT_PRICE"]
    assert len({request.client_order_id for request in stops}) == 3
    assert position.stop_order_id == stops[-1].client_order_id


async def test_a_stop_that_cannot_be_placed_closes_the_position(desk: Desk):
    desk.venue.before = {OrderPurpose.STOP: [OrderRejected("no", code=-4131) for _ in range(3)]}
    await desk.executor.open(signal(), approved())
    position = await desk.closed()
    assert position.close_reason == "exit"
    assert desk.venue.held == {}


async def test_an_outage_after_the_entry_ends_in_a_stop_or_a_close(desk: Desk):
    down = [VenueUnavailable("down") for _ in range(9)]
    desk.venue.before = {OrderPurpose.STOP: down, OrderPurpose.EXIT: [VenueUnavailable("down")] * 2}
    await desk.executor.open(signal(), approved())
    await quiet(desk)
    assert desk.executor.unprotected() == []
    held = desk.venue.held.get("AUSDT", (ZERO,))[0]
    assert (held == 0) or desk.venue.resting(OrderPurpose.STOP)


async def test_a_target_that_is_reached_already_is_taken(desk: Desk):
    desk.venue.before = {OrderPurpose.TARGET: [OrderRejected("would trigger", code=-2021)]}
    await desk.executor.open(signal(), approved())
    assert (await desk.closed()).close_reason == "target"


async def test_a_target_that_is_refused_leaves_the_stop(desk: Desk):
    desk.venue.before = {OrderPurpose.TARGET: [OrderRejected("no", code=-1)] * 2}
    position = await opened(desk)
    assert position.protected_ms > 0
    assert position.target_order_id == ""
    await desk.reconciler.reconcile()
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.TARGET)) == 1


async def test_a_stop_that_the_venue_cancels_is_placed_again(desk: Desk):
    position = await opened(desk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    [again] = desk.executor.positions()
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert again.stop_order_id == stop.client_order_id != position.stop_order_id


async def test_a_stop_lost_without_an_event_is_placed_again_by_reconciliation(desk: Desk):
    position = await opened(desk)
    del desk.venue.orders[position.stop_order_id]
    await desk.reconciler.reconcile()
    await quiet(desk)
    [again] = desk.executor.positions()
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert again.stop_order_id == stop.client_order_id != position.stop_order_id


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("autoclose-1", "liquidation"),
        ("adl_autoclose", "adl"),
        ("settlement_autoclose-1", "settlement"),
        ("web_1", "manual"),
    ],
)
async def test_closes_by_others_are_recognised(desk: Desk, prefix, reason):
    await opened(desk)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), prefix)
    assert (await desk.closed()).close_reason == reason
    assert await desk.venue.open_orders() == []
    assert await desk.equal()


async def test_a_stop_that_fills_under_an_unknown_name_is_still_a_stop(desk: Desk):
    position = await opened(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    desk.venue.emit(msgspec.structs.replace(stop, status=OrderStatus.TRIGGERED))
    desk.venue.mark = Decimal(99)
    desk.venue.execute(position.stop_order_id, Decimal(2), "x-1")
    assert (await desk.closed()).close_reason == "stop"


async def test_a_fill_that_is_named_later_names_the_reason(desk: Desk):
    position = await opened(desk)
    desk.venue.mark = Decimal(99)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "x-1")
    assert (await desk.closed()).close_reason == "manual"
    desk.venue.emit(msgspec.structs.replace(desk.venue.fills[-1], client_order_id=position.stop_order_id))
    assert (await desk.closed()).close_reason == "stop"
    assert await desk.equal()


async def test_a_partial_close_leaves_the_rest_open_and_protected(desk: Desk):
    await opened(desk)
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal("0.5"), "web_1")
    await quiet(desk)
    [position] = desk.executor.positions()
    assert (position.quantity, position.realised_pnl) == (Decimal("1.5"), Decimal("0.5"))
    desk.venue.trigger(OrderPurpose.TARGET, "102")
    closed = await desk.closed()
    assert (closed.realised_pnl, closed.exit_price) == (Decimal("3.5"), Decimal("101.75"))


async def test_perpd_closes_a_position_when_asked(desk: Desk):
    position = await opened(desk)
    assert await desk.executor.close(position, CloseReason.EXPIRED)
    assert (await desk.closed()).close_reason == "expired"
    assert await desk.executor.close(position, CloseReason.EXIT)
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]) == 1


async def test_an_exit_of_unknown_fate_is_not_followed_by_a_second_one(desk: Desk):
    position = await opened(desk)
    desk.venue.silent = True
    desk.venue.lose = {OrderPurpose.EXIT: 1}
    assert await desk.executor.close(position, CloseReason.EXIT)
    assert len([r for r in desk.venue.sent if r.purpose is OrderPurpose.EXIT]) == 1
    assert desk.venue.held == {}


async def test_a_restart_goes_on_with_the_same_position(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        position = await opened(before)
        wallet = before.ledger.wallet
    async with desk_at(tmp_path, venue) as after:
        assert after.executor.positions() == (position,)
        assert after.ledger.wallet == wallet
        async with after.reconciler.running():
            assert after.executor.unprotected() == []
            assert len(venue.sent) == 3
            venue.trigger(OrderPurpose.STOP, "99")
            closed = await after.closed()
    assert (closed.close_reason, closed.realised_pnl) == ("stop", -2)


async def test_what_happened_while_it_was_down_is_booked_at_the_start(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        await opened(before)
    venue.trigger(OrderPurpose.STOP, "98.5")
    venue.wallet -= 1
    venue.income.append(
        Adjustment(
            adjustment_id="7",
            kind="funding",
            symbol="AUSDT",
            amount=Decimal(-1),
            reason="",
            at_ms=venue.time_ms,
        )
    )
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            closed = await after.closed()
            assert await after.equal()
    assert (closed.close_reason, closed.funding) == ("stop", -1)
    assert closed.exit_price == Decimal("98.5")
    assert await venue.open_orders() == []


async def test_a_crash_between_writing_and_sending_leaves_nothing_behind(tmp_path: Path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:

        def die(request: OrderRequest) -> None:
            raise asyncio.CancelledError

        venue.known = die
        with pytest.raises(asyncio.CancelledError):
            await before.executor.open(signal(), approved())
    venue.known = lambda request: None
    async with desk_at(tmp_path, venue) as after:
        assert after.executor.held_symbols() == {"AUSDT"}
        async with after.reconciler.running():
            await quiet(after)
            await after.reconciler.reconcile()
            assert after.executor.held_symbols() == frozenset()
    assert venue.sent == []


async def test_a_crash_after_sending_ends_in_a_protected_position(tmp_path: Path):
    venue = Venue()
    venue.silent = True
    async with desk_at(tmp_path, venue, answer_limit_s=60.0) as before:
        task = asyncio.create_task(before.executor.open(signal(), approved()))
        await venue.traded.wait()
        task.cancel()
        await asyncio.wait({task})
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            await quiet(after)
            [position] = after.executor.positions()
            assert position.protected_ms > 0
            assert await after.equal()
    assert len([r for r in venue.sent if r.purpose is OrderPurpose.ENTRY]) == 1


async def test_a_foreign_position_blocks_its_symbol_and_is_left_alone(tmp_path: Path):
    venue = Venue()
    venue.trade("FUSDT", Side.SELL, Decimal(3), "web_1")
    async with desk_at(tmp_path, venue) as desk:
        async with desk.reconciler.running():
            answer = await desk.executor.open(signal(symbol="FUSDT"), approved())
            assert isinstance(answer, Refused)
            assert "foreign" in answer.detail
            assert await desk.equal()
            venue.trade("FUSDT", Side.BUY, Decimal(3), "web_2")
            await desk.reconciler.reconcile()
            assert desk.executor.blocked_symbols() == {}
            assert await desk.equal()
    assert venue.sent == []


async def test_a_position_that_vanished_without_a_trace_is_closed_after_a_second_look(desk: Desk):
    await opened(desk)
    desk.venue.silent = True
    desk.venue.mark = Decimal(101)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "web_1")
    await desk.reconciler.reconcile()
    assert len(desk.executor.positions()) == 1
    await desk.reconciler.reconcile()
    position = await desk.closed()
    assert position.close_reason == "manual"
    assert await desk.equal()
    assert [a.kind for a in desk.archive.of("adjustments")] == ["correction"]


async def test_a_quantity_that_the_venue_changed_is_taken_over(desk: Desk):
    await opened(desk)
    desk.venue.silent = True
    desk.venue.trade("AUSDT", Side.SELL, Decimal("0.5"), "web_1")
    for _ in range(2):
        await desk.reconciler.reconcile()
    [position] = desk.executor.positions()
    assert position.quantity == Decimal("1.5")
    assert await desk.equal()


async def test_an_orphan_stop_of_a_flat_symbol_is_swept(desk: Desk):
    await opened(desk)
    desk.venue.reachable = False
    desk.venue.trade("AUSDT", Side.SELL, Decimal(2), "autoclose-1")
    await desk.closed()
    assert "AUSDT" in desk.executor.held_symbols()
    desk.venue.reachable = True
    assert len(await desk.venue.open_orders()) == 2
    await desk.reconciler.reconcile()
    await quiet(desk)
    assert await desk.venue.open_orders() == []
    assert desk.executor.held_symbols() == frozenset()


async def test_settling_refuses_entries_and_leaves_stops_on_the_venue(desk: Desk):
    await opened(desk)
    assert await desk.executor.settle(5)
    assert refusal(await desk.executor.open(signal("s2", "BUSDT"), approved())) is RefusalReason.ENTRIES_OFF
    assert len(await desk.venue.open_orders()) == 2


async def test_events_beyond_the_queue_are_counted_and_reconciled(desk: Desk):
    event = Adjustment(
        adjustment_id="x", kind="transfer", symbol="", amount=Decimal(1), reason="", at_ms=10_500
    )
    for _ in range(10_001):
        desk.executor.on_event(event)
    assert desk.counts.counts["trading.events_discarded"] == 1
    assert desk.executor.reconcile_wanted.is_set()


async def test_a_full_disk_stops_entries_and_keeps_protection(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    position = await opened(desk)

    async def full(*_: object) -> None:
        raise DataDirectoryUnusable("full")

    monkeypatch.setattr(desk.store, "save_intent", full)
    monkeypatch.setattr(desk.store, "save_order", full)
    answer = await desk.executor.open(signal("s2", "BUSDT"), approved())
    assert refusal(answer) is RefusalReason.ENTRIES_OFF
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 1
    assert desk.executor.unprotected() == []


async def test_a_venue_order_id_used_twice_quarantines_its_symbol_and_keeps_the_stop(desk: Desk):
    position = await opened(desk)
    desk.venue.numbers = itertools.count(2)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    assert desk.executor.unprotected() == []
    assert desk.venue.resting(OrderPurpose.STOP)
    assert "AUSDT" in desk.executor.blocked_symbols()
    assert isinstance(await desk.executor.open(signal("s2", "BUSDT"), approved()), Position)


async def test_shorts_are_the_mirror_image(desk: Desk):
    short = PositionSide.SHORT
    answer = await desk.executor.open(signal(side=short), approved(short))
    assert isinstance(answer, Position)
    await quiet(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert (stop.side, stop.trigger_price) == (Side.BUY, 101)
    desk.venue.trigger(OrderPurpose.TARGET, "98")
    position = await desk.closed()
    assert (position.realised_pnl, position.exit_price, position.close_reason) == (4, 98, "target")


async def test_a_refused_leverage_sends_no_order(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    async def refuse(*_: object) -> None:
        raise RequestRejected("Leverage 20 is not valid", code=-4028)

    monkeypatch.setattr(desk.venue, "set_leverage", refuse)
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_REJECTED
    assert desk.venue.sent == []


async def test_entries_on_many_symbols_at_once_stay_apart(desk: Desk):
    names = [f"{n}USDT" for n in range(8)]
    answers = await asyncio.gather(*(desk.executor.open(signal(name, name), approved()) for name in names))
    assert all(isinstance(answer, Position) for answer in answers)
    await quiet(desk)
    assert {p.symbol for p in desk.executor.positions()} == set(names)
    assert len(desk.venue.resting(OrderPurpose.STOP)) == 8
    assert await desk.equal()


async def test_a_position_flattened_elsewhere_ends_without_a_storm_of_orders(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        await opened(desk)
        venue.silent = True
        venue.trade("AUSDT", Side.SELL, Decimal(2), "by-hand")
        venue.silent = False
        for name, order in list(venue.orders.items()):
            if not order.status.final:
                venue.vanish(name)
        sent = len(venue.sent)
        for _ in range(8):
            await desk.reconciler.reconcile()
            await asyncio.sleep(0.05)
        assert desk.executor.positions() == ()
        assert len(venue.sent) - sent <= 12
        assert not any(order.purpose is OrderPurpose.ENTRY for order in venue.sent[sent:])


async def test_an_entry_whose_fill_cannot_be_written_has_its_stop_all_the_same(tmp_path, monkeypatch):
    async with desk_at(tmp_path, Venue()) as desk:
        written = desk.store.save_fill

        async def full(*_args, **_kwargs):
            raise DataDirectoryUnusable("No space left on device")

        monkeypatch.setattr(desk.store, "save_fill", full)
        await desk.executor.open(signal(), approved())
        async with asyncio.timeout(5):
            while not desk.venue.resting(OrderPurpose.STOP):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert desk.executor.store_failing
        monkeypatch.setattr(desk.store, "save_fill", written)
        async with asyncio.timeout(10):
            while not desk.executor.positions():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert desk.executor.unprotected() == []


async def test_an_archive_that_hangs_holds_up_no_stop(tmp_path, monkeypatch):
    async with desk_at(tmp_path, Venue()) as desk:
        stuck = asyncio.Event()

        async def hang(_stream, _record):
            await stuck.wait()

        monkeypatch.setattr(desk.archive, "put", hang)
        position = await desk.executor.open(signal(), approved())
        assert isinstance(position, Position)
        assert desk.venue.resting(OrderPurpose.STOP)
        assert desk.executor.unprotected() == []
        stuck.set()


async def test_an_entry_whose_fills_come_late_is_neither_given_up_nor_foreign(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        venue.silent = True
        whole = venue.order

        async def without_fills(order):
            found = await whole(order)
            return (found[0], []) if found else None

        venue.order = without_fills
        refused = await desk.executor.open(signal(), approved())
        assert isinstance(refused, Refused)
        assert refused.reason is RefusalReason.ORDER_UNKNOWN
        venue.order, venue.silent = whole, False
        for _ in range(3):
            await desk.reconciler.reconcile()
            await quiet(desk)
        [position] = desk.executor.positions()
        assert position.quantity == venue.held["AUSDT"][0]
        assert venue.resting(OrderPurpose.STOP)
        assert not desk.executor.blocked_symbols()


async def test_a_missed_loss_is_a_loss_and_no_withdrawal(tmp_path):
    async with desk_at(tmp_path, Venue()) as desk:
        venue = desk.venue
        deposits = desk.ledger.deposits
        await opened(desk)
        venue.silent = True
        venue.mark = Decimal(30)
        venue.trade("AUSDT", Side.SELL, Decimal(2), "autoclose-1")
        venue.silent = False
        for name, order in list(venue.orders.items()):
            if not order.status.final:
                venue.vanish(name)
        for _ in range(4):
            await desk.reconciler.reconcile()
            await asyncio.sleep(0.05)
        assert desk.ledger.deposits == deposits
        assert desk.ledger.totals["corrections"] < 0
        assert desk.ledger.compare(await venue.account()).difference == 0


async def test_refused_exits_leave_nothing_behind_in_memory(tmp_path):
    async with desk_at(tmp_path, Venue(), unprotected_limit_s=0.0001) as desk:
        desk.venue.before = {
            OrderPurpose.STOP: [OrderRejected("breached", code=-2021)] * 40,
            OrderPurpose.EXIT: [VenueUnavailable("away") for _ in range(5)],
        }
        await desk.executor.open(signal(), approved())
        await quiet(desk)
        async with asyncio.timeout(10):
            while desk.executor.positions():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await quiet(desk)
        assert desk.executor._books.orders == {}
        assert desk.executor._books.changed == {}


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def full_disk(*_args: object, **_kwargs: object) -> None:
    raise DataDirectoryUnusable("No space left on device")


async def test_a_stop_that_ends_while_the_target_is_being_placed_is_placed_again(desk, monkeypatch):
    venue, place, stuck = desk.venue, desk.venue.place, asyncio.Event()

    async def slow_target(request: OrderRequest) -> Order:
        if request.purpose is OrderPurpose.TARGET:
            await stuck.wait()
        return await place(request)

    monkeypatch.setattr(venue, "place", slow_target)
    entering = asyncio.create_task(desk.executor.open(signal(), approved()))
    await until(lambda: venue.resting(OrderPurpose.STOP) and desk.executor.unprotected() == [])
    [first] = venue.resting(OrderPurpose.STOP)
    venue.vanish(first.client_order_id)
    await until(lambda: venue.resting(OrderPurpose.STOP))
    stuck.set()
    await entering
    await quiet(desk)
    assert desk.executor.unprotected() == []


async def test_an_entry_does_not_wait_for_ever_for_a_stop_that_cannot_be_placed(tmp_path):
    async with desk_at(tmp_path, Venue(), unprotected_limit_s=0.05) as desk:
        away = [VenueUnavailable("away") for _ in range(1000)]
        desk.venue.before = {OrderPurpose.STOP: away, OrderPurpose.EXIT: away}
        async with asyncio.timeout(5):
            position = await desk.executor.open(signal(), approved())
        assert isinstance(position, Position)
        assert [symbol for symbol, _ in desk.executor.unprotected()] == ["AUSDT"]
        desk.venue.before = {}
        await quiet(desk)
        assert desk.executor.unprotected() == []


async def test_a_store_that_cannot_even_be_read_keeps_no_position_from_its_stop(desk, monkeypatch):
    position = await opened(desk)
    monkeypatch.setattr(desk.store, "save_order", full_disk)
    monkeypatch.setattr(desk.store, "order", full_disk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    [stop] = desk.venue.resting(OrderPurpose.STOP)
    assert stop.client_order_id != position.stop_order_id
    assert desk.executor.unprotected() == []


async def test_a_stop_that_was_never_written_is_swept_though_its_end_comes_first(desk, monkeypatch):
    position = await opened(desk)
    monkeypatch.setattr(desk.store, "save_order", full_disk)
    desk.venue.vanish(position.stop_order_id)
    await quiet(desk)
    cancel = desk.venue.cancel

    async def answered_late(order: Order) -> None:
        await cancel(order)
        await desk.executor.events_applied()

    monkeypatch.setattr(desk.venue, "cancel", answered_late)
    desk.venue.trigger(OrderPurpose.TARGET, "102")
    await quiet(desk)
    assert await desk.venue.open_orders() == []
    assert desk.executor.working_orders() == ()


async def test_a_contradiction_found_by_asking_quarantines_its_symbol_only(desk, monkeypatch):
    async def conflict(*_args: object, **_kwargs: object) -> bool:
        raise StateConflict("booked otherwise")

    written = desk.store.save_fill
    monkeypatch.setattr(desk.store, "save_fill", conflict)
    desk.venue.lose = {OrderPurpose.ENTRY: 1}
    desk.venue.silent = True
    answer = await desk.executor.open(signal(), approved())
    assert refusal(answer) is RefusalReason.ORDER_UNKNOWN
    assert "AUSDT" in desk.executor.blocked_symbols()
    monkeypatch.setattr(desk.store, "save_fill", written)
    desk.venue.silent = False
    assert isinstance(await desk.executor.open(signal("s2", "BUSDT"), approved()), Position)


async def test_a_late_fill_of_an_entry_given_up_has_its_stop_on_a_full_disk_too(desk, monkeypatch):
    desk.venue.before = {OrderPurpose.ENTRY: [OrderRejected("no", code=-2019)]}
    await desk.executor.open(signal(), approved())
    [entry] = desk.venue.sent
    written = desk.store.save_fill
    monkeypatch.setattr(desk.store, "save_fill", full_disk)
    desk.venue.trade("AUSDT", Side.BUY, Decimal(2), entry.client_order_id)
    await until(lambda: desk.executor.store_failing)
    assert {symbol for symbol, _ in desk.executor.unprotected()} <= {"AUSDT"}
    await until(lambda: desk.venue.resting(OrderPurpose.STOP))
    monkeypatch.setattr(desk.store, "save_fill", written)
    await until(desk.executor.positions)
    await quiet(desk)
    assert desk.executor.unprotected() == []


async def test_settling_waits_for_the_event_that_waits_for_the_disk(desk, monkeypatch):
    monkeypatch.setattr(desk.store, "save_adjustment", full_disk)
    desk.executor.on_event(
        Adjustment(adjustment_id="x", kind="transfer", symbol="", amount=Decimal(1), reason="", at_ms=99_000)
    )
    await until(lambda: desk.executor.store_failing)
    assert not await desk.executor.settle(0.05)
    monkeypatch.undo()
    assert await desk.executor.settle(5)


async def test_a_stop_known_as_filled_before_a_crash_is_booked_as_a_stop_after_it(tmp_path):
    venue = Venue()
    async with desk_at(tmp_path, venue) as before:
        position = await opened(before)
        venue.silent = True
        venue.trigger(OrderPurpose.STOP, "99")
        before.executor.on_event(venue.orders[position.stop_order_id])
        await quiet(before)
    venue.silent = False
    async with desk_at(tmp_path, venue) as after:
        async with after.reconciler.running():
            closed = await after.closed()
            assert await after.equal()
    assert (closed.close_reason, closed.realised_pnl) == ("stop", -2)


async def test_a_start_that_failed_at_the_store_reads_everything_the_next_time(desk, monkeypatch):
    position = await opened(desk)
    executor = Executor(
        desk.venue, desk.store, desk.archive, desk.ledger, WallClock(), TradingSettings(), desk.counts
    )
    monkeypatch.setattr(desk.store, "open_orders", full_disk)
    with pytest.raises(DataDirectoryUnusable):
        await executor.restore()
    monkeypatch.undo()
    await executor.restore()
    assert executor.positions() == (position,)
    assert len(executor.working_orders()) == 2


async def test_a_correction_counts_the_fill_that_is_being_booked(desk, monkeypatch):
    await opened(desk)
    written, booking, go_on = desk.store.save_fill, asyncio.Event(), asyncio.Event()

    async def slow(*args: object, **kwargs: object) -> bool:
        booking.set()
        await go_on.wait()
        return await written(*args, **kwargs)

    monkeypatch.setattr(desk.store, "save_fill", slow)
    desk.venue.mark = Decimal(98)
    desk.venue.trade("AUSDT", Side.SELL, Decimal(1), "by-hand")
    await booking.wait()
    account = await desk.venue.account()
    correcting = asyncio.create_task(
        desk.executor.correct_books(
            "BUSDT", Holding(), account.wallet_balance, "looked at by hand", account.at_ms
        )
    )
    await asyncio.sleep(0)
    go_on.set()
    correction = await correcting
    assert correction is not None
    assert correction.amount == 0
    assert await desk.equal()
