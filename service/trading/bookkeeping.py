"""Writing down what happened: news of orders merged, fills and adjustments booked, positions ended.

A fill is booked once: ledger, position and store in one transaction. What a change means for a
position's protection is told to whoever protects it.
"""

import itertools
from collections.abc import Callable
from decimal import Decimal

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, StateConflict
from service.ports import Clock, Recorder, StateStore
from service.records import Adjustment, CloseReason, Fill, Order, OrderPurpose, OrderStatus, Position
from service.trading.books import Books
from service.trading.foreign import is_foreign
from service.trading.ledger import Holding, Ledger
from service.trading.ledger import booked as amount_booked
from service.trading.orders import (
    RESTING,
    Instruction,
    OrderEvent,
    Reported,
    client_order_id,
    is_ours,
    step,
)
from service.trading.outbox import Outbox
from service.trading.positions import (
    after_fill,
    beyond,
    close_reason,
    is_open,
    never_opened,
    reopened,
    with_close,
    without_protection,
)

log = structlog.get_logger("trading.bookkeeping")

ZERO = Decimal(0)
FUNDING_LAG_MS = 60_000  # the venue dates a payment a little after the hour
CLOSED_LOOKED_AT = 30
CONTRADICTIONS = (StateConflict, ArithmeticError, LookupError, ValueError)
"""What booking raises when the news contradicts the books: its symbol is quarantined."""


class Bookkeeper:
    """Changes the books, with their lock held.

    Args: protect, sweep: called with the id of a position that lacks protection, or that ended with
    orders of it resting; they must not block. adopts: what somebody else adds to a position of ours
    becomes ours.
    """

    def __init__(
        self,
        books: Books,
        store: StateStore,
        ledger: Ledger,
        outbox: Outbox,
        clock: Clock,
        recorder: Recorder,
        *,
        protect: Callable[[str], None],
        sweep: Callable[[str], None],
        adopts: bool = False,
    ) -> None:
        self._adopts = adopts
        self._books = books
        self._store = store
        self._ledger = ledger
        self._outbox = outbox
        self._clock = clock
        self._recorder = recorder
        self._protect = protect
        self._sweep = sweep

    async def learn(self, update: Order) -> Order | None:
        """Merge news of an order; None when it is not ours."""
        async with self._books.lock:
            order = await self._books.known(update.client_order_id)
            if order is None and is_ours(update.client_order_id):
                order = self._books.recognised(update)
            if order is None:
                self._recorder.count("trading.foreign_order_events")
                if (
                    is_ours(update.client_order_id) and not update.status.final
                ):  # another instance, lost state
                    self._books.reconcile_wanted.set()
                return None
            return await self._advance(order, Reported(update))

    async def tell(self, order: Order, event: OrderEvent) -> Order:
        """Our own knowledge of an order. One whose final event came first has been let go of."""
        async with self._books.lock:
            known = self._books.orders.get(order.client_order_id)
            if known is None:
                return step(order, event, self._clock.now_ms()).order
            return await self._advance(known, event)

    async def _advance(self, order: Order, event: OrderEvent) -> Order:
        """Take one event of an order and do what it asks for. Holds the lock."""
        taken = step(order, event, self._clock.now_ms())
        order = taken.order
        if taken.fault:
            self._recorder.count("trading.order_faults")
            log.warning("impossible order event", client_order_id=order.client_order_id, fault=taken.fault)
        if taken.changed:
            await self._books.save_order(order)
        if Instruction.ASK in taken.instructions:
            self._books.reconcile_wanted.set()
        await self._after_order(order, taken.instructions)
        return order

    async def _after_order(self, order: Order, instructions: tuple[Instruction, ...]) -> None:
        """What an order's news means for its position. Holds the lock."""
        self._books.versions[order.symbol] += 1
        position = self._books.positions.get(order.position_id)
        if Instruction.GUARDS in instructions:
            if position is None:
                self._sweep(order.position_id)
            else:
                await self._guarded(order, position)
        elif Instruction.UNGUARDED in instructions and position is not None:
            await self._unguarded(order, position)
        elif order.type.conditional and order.status is OrderStatus.UNKNOWN and position is None:
            self._sweep(order.position_id)
        if order.status.final and position is None:
            self._books.orders.pop(order.client_order_id, None)
            self._books.filled.pop(order.client_order_id, None)
        elif order.status.final:
            self._books.let_go(order)
        waiter = self._books.changed.get(order.client_order_id)
        if waiter is not None:
            waiter.set()

    async def _guarded(self, order: Order, position: Position) -> None:
        """A stop or target rests. There is one of each: the newest counts, and another is swept."""
        stop = order.purpose is OrderPurpose.STOP
        current = self._books.orders.get(position.stop_order_id if stop else position.target_order_id)
        name = order.client_order_id
        if current is not None and current.client_order_id == name:
            if stop:
                self._books.protected(position.position_id)  # it was in doubt
            return
        if current is not None and current.status in RESTING:
            self._recorder.count("trading.surplus_orders")
            if _attempt(current) > _attempt(order) or current.status is OrderStatus.TRIGGERED:
                self._sweep(position.position_id)
                return
        changes: dict[str, object] = {"stop_order_id" if stop else "target_order_id": name}
        if stop:
            changes |= {"protected_ms": self._clock.now_ms(), "stop": order.trigger_price or position.stop}
            self._books.protected(position.position_id)
        position = msgspec.structs.replace(position, **changes)
        await self._books.save_position(position)
        if stop:
            self._outbox.put("positions", position)
        self._sweep(position.position_id)

    async def _unguarded(self, order: Order, position: Position) -> None:
        """A stop or target ended without executing: if it is the one that counts, another is needed."""
        stop = order.purpose is OrderPurpose.STOP
        if order.client_order_id != (position.stop_order_id if stop else position.target_order_id):
            return
        log.warning("protection ended", symbol=order.symbol, purpose=order.purpose, status=order.status)
        await self._books.save_position(without_protection(position, order.purpose))
        if stop:
            self._books.unprotected_now(position.position_id)
        self._protect(position.position_id)

    async def book(self, fill: Fill) -> bool:
        """Book one execution once: ledger, position and store in one transaction."""
        async with self._books.lock:
            order = await self._owner(fill)
            position = await self._position_of(fill, order)
            booking = self._ledger.preview(fill)
            outcome = None
            ours = self._part_of(fill, order, position)
            if not ours:
                position = None
            record = position
            if position is not None:
                part = msgspec.structs.replace(fill, quantity=ours)
                fee, realised = booking.fee, booking.realised_pnl
                if ours != fill.quantity:
                    fee, realised = (
                        amount_booked(amount * ours / fill.quantity) for amount in (fee, realised)
                    )
                outcome = after_fill(position, part, fee, realised)
                record = outcome.position
                if outcome.closed:
                    cause = order or self._triggered(position)
                    reason = close_reason(fill, cause)
                    traded = self._books.entered.get(position.position_id, ZERO)
                    record = with_close(record, reason, fill.filled_ms, traded)
            try:
                cooling_ms = self._books.cooldowns.until_ms(record) if record is not None else 0
                booked = await self._ledger.book_fill(fill, booking, record, cooldown_until_ms=cooling_ms)
            except DataDirectoryUnusable:
                # The books wait for the disk, the stop does not.
                if position is not None and not position.protected_ms:
                    self._books.positions.setdefault(position.position_id, position)
                    self._books.unprotected_now(position.position_id)
                    self._protect(position.position_id)
                raise
            if not booked:
                await self._name_reason(fill, order)
                return False
            self._books.saved(record.position_id if record is not None else "")
            self._books.versions[fill.symbol] += 1
            self._recorder.count("trading.fills")
            self._outbox.put("fills", fill)
            if order is not None:
                name = order.client_order_id
                if position is not None:
                    if position.position_id not in self._books.positions:  # it comes back
                        before = await self._books.booked(name) - fill.quantity
                        self._books.filled[name] = self._books.entered[position.position_id] = before
                    self._books.remember(order)
                self._books.filled[name] = self._books.filled.get(name, ZERO) + fill.quantity
            if record is not None and outcome is not None:
                foreign = outcome.foreign + fill.quantity - ours
                if foreign:
                    self._block(fill, f"{foreign} executed beyond our position")
                await self._after_fill(fill, record)
            else:
                self._recorder.count("trading.foreign_fills")
                whose = (
                    f"an execution of perpd that is in no position of ours ({fill.client_order_id}):"
                    if is_ours(fill.client_order_id)
                    else "foreign: execution"
                )
                self._block(fill, f"{whose} {fill.trade_id} of {fill.side} {fill.quantity}")
            if order is not None:
                await self._after_order(order, ())
            return True

    def _part_of(self, fill: Fill, order: Order | None, position: Position | None) -> Decimal:
        """The quantity of a fill that is its position's.

        A symbol may be shared: somebody else adds to what we hold. That stays theirs unless the policy is
        to adopt, and what they close is theirs first.
        """
        if position is None:
            return ZERO
        entry = fill.side is position.position_side.entry_side
        if order is not None and not entry:  # a stop for all that is held executes for both
            return min(fill.quantity, position.quantity) or fill.quantity
        if order is not None or self._adopts or is_foreign(position):
            return fill.quantity
        if entry:
            return ZERO
        return max(fill.quantity - beyond(position, self._ledger.holding(fill.symbol).quantity), ZERO)

    def _block(self, fill: Fill, why: str) -> None:
        """Nothing is opened on the symbol until reconciliation has looked at it."""
        self._books.reconcile_wanted.set()
        if fill.symbol not in self._books.foreign:
            self._recorder.count("trading.foreign_symbols")
            log.error("symbol blocked: not in our books", symbol=fill.symbol, detail=why)
        self._books.foreign[fill.symbol] = why

    async def book_missed(self, fill: Fill) -> bool:
        """Book an execution from the venue's list. False when it was booked before.

        The stream may have told of it without a trade id: then it bears the order's id and its time.
        """
        unnumbered = f"{fill.venue_order_id}-{fill.filled_ms}"
        for known in await self._store.fills(fill.client_order_id):
            if known.trade_id == unnumbered and known.quantity == fill.quantity:
                return False
        return await self.book(fill)

    async def book_adjustment(self, adjustment: Adjustment) -> bool:
        """Book funding or a transfer once, and on the position it belongs to."""
        async with self._books.lock:
            if not await self._ledger.book_adjustment(adjustment):
                return False
            self._outbox.put("adjustments", adjustment)
            self._books.versions[adjustment.symbol] += 1
            position = await self._funded(adjustment) if adjustment.kind == "funding" else None
            if position is not None:
                position = msgspec.structs.replace(position, funding=position.funding + adjustment.amount)
                await self._books.save_position(position)
                if position.closed_ms:
                    self._outbox.put("positions", position)  # told again: what it earned has changed
        return True

    async def _funded(self, funding: Adjustment) -> Position | None:
        """The position that a funding payment belongs to: open then, though it may be closed by now."""
        position = self._books.position_on(funding.symbol)
        if position is not None and position.opened_ms <= funding.at_ms + FUNDING_LAG_MS:
            return position
        for closed in await self._store.closed_positions(CLOSED_LOOKED_AT):
            if (
                closed.symbol == funding.symbol
                and closed.opened_ms <= funding.at_ms <= closed.closed_ms + FUNDING_LAG_MS
            ):
                return closed
        return None

    async def correct(
        self,
        symbol: str,
        holding: Holding,
        wallet: Decimal,
        why: str,
        at_ms: int,
        revision: int | None = None,
    ) -> Adjustment | None:
        """Take over what the venue holds of a symbol, and its wallet.

        None when it was done before, or when something was booked since `revision`. The difference is
        taken with the lock held: a fill that is being booked belongs to it.
        """
        async with self._books.lock:
            if revision is not None and self._books.versions.total() != revision:
                return None
            correction = Adjustment(
                adjustment_id=f"correction:{symbol}:{at_ms}",
                kind="correction",
                symbol=symbol,
                amount=wallet - self._ledger.wallet,
                reason=why,
                at_ms=at_ms,
            )
            if not await self._ledger.book_adjustment(correction, holding):
                return None
            self._outbox.put("adjustments", correction)
            return correction

    async def book_settlement(
        self, amount: Decimal, why: str, at_ms: int, revision: int
    ) -> Adjustment | None:
        """Book an amount that nothing explains, at a person's word. None when something was booked since."""
        async with self._books.lock:
            if self._books.versions.total() != revision:
                return None
            settlement = Adjustment(
                adjustment_id=f"settlement:{at_ms}",
                kind="settlement",
                symbol="",
                amount=amount,
                reason=why,
                at_ms=at_ms,
            )
            if not await self._ledger.book_adjustment(settlement):
                return None
            self._outbox.put("adjustments", settlement)
            self._books.versions[""] += 1
            return settlement

    async def take_over(self, position: Position) -> None:
        """A position that somebody else opened becomes ours; its past is in the ledger already."""
        async with self._books.lock:
            name = position.position_id
            await self._books.save_position(position)
            self._books.entered[name] = position.quantity
            self._books.foreign.pop(position.symbol, None)
            self._books.versions[position.symbol] += 1
            self._books.unprotected_now(name)
            self._outbox.put("positions", position)
        self._protect(name)

    def _triggered(self, position: Position) -> Order | None:
        """The position's conditional order that is executing: a fill under a name unknown to us is its."""
        for name in (position.stop_order_id, position.target_order_id):
            order = self._books.orders.get(name)
            if order is not None and order.status is OrderStatus.TRIGGERED:
                return order
        return None

    async def _name_reason(self, fill: Fill, order: Order | None) -> None:
        """A closing fill that was booked under an unknown name is told again under our order's."""
        if order is None or order.position_id in self._books.positions:
            return
        closed = await self._store.position(order.position_id)
        if closed is None or closed.close_reason != CloseReason.MANUAL or closed.closed_ms != fill.filled_ms:
            return
        named = msgspec.structs.replace(closed, close_reason=close_reason(fill, order).value)
        if named != closed:
            await self._books.save_position(named)
            self._books.cooldowns.begin(named, self._clock.now_ms())
            self._outbox.put("positions", named)

    async def _after_fill(self, fill: Fill, position: Position) -> None:
        name = position.position_id
        if position.closed_ms:
            await self._forget(position)
            return
        self._books.positions[name] = position
        if fill.side is position.position_side.entry_side:
            self._books.entered[name] = self._books.entered.get(name, ZERO) + fill.quantity
        stop = self._books.orders.get(position.stop_order_id)
        if stop is not None and 0 < stop.quantity < position.quantity:  # a stop for a quantity, now too small
            position = without_protection(position, OrderPurpose.STOP)
            await self._books.save_position(position)
        if not position.protected_ms:
            self._books.unprotected_now(name)
            self._protect(name)

    async def _forget(self, position: Position) -> None:
        """A position ended: out of memory, into the archive; what still rests is cancelled."""
        name = position.position_id
        self._books.forget(name)
        if position.entry_price:
            self._books.closed_count += 1
            self._recorder.count("trading.positions_closed")
            self._outbox.put("positions", position)
            log.info(
                "position closed",
                symbol=position.symbol,
                reason=position.close_reason,
                realised_pnl=str(position.realised_pnl),
                fees=str(position.fees),
            )
            self._books.cooldowns.begin(position, self._clock.now_ms())
        for order in [order for order in self._books.orders.values() if order.position_id == name]:
            waiter = self._books.changed.get(order.client_order_id)
            if waiter is not None:
                waiter.set()
            elif order.status.final:
                self._books.orders.pop(order.client_order_id)
                self._books.filled.pop(order.client_order_id, None)
        self._sweep(name)

    async def _owner(self, fill: Fill) -> Order | None:
        """Our order that a fill belongs to: by client id, else by the venue's."""
        order = await self._books.known(fill.client_order_id)
        if order is not None or not fill.venue_order_id:
            return order
        return next(
            (
                known
                for known in self._books.orders.values()
                if known.symbol == fill.symbol
                and fill.venue_order_id
                == (known.became_order_id if known.type.conditional else known.venue_order_id)
            ),
            None,
        )

    async def _position_of(self, fill: Fill, order: Order | None) -> Position | None:
        """The position a fill belongs to. A late fill of an ended trade never lands on the next one."""
        if order is None:
            return self._books.position_on(fill.symbol)
        position = self._books.positions.get(order.position_id)
        if position is None and order.purpose is OrderPurpose.ENTRY:
            stored = await self._store.position(order.position_id)
            if stored is not None:  # given up, or closed, before all of its entry was known
                return reopened(stored)
        return position

    async def end_position(self, position_id: str, reason: CloseReason) -> None:
        """Close a position in our books that the venue no longer holds and no fill explains."""
        async with self._books.lock:
            position = self._books.positions.get(position_id)
            if position is None:
                return
            log.error("position vanished", symbol=position.symbol, reason=reason)
            ended = with_close(position, reason, self._clock.now_ms(), ZERO)
            self._books.versions[position.symbol] += 1
            await self._books.save_position(ended)
            await self._forget(ended)

    async def correct_quantity(self, position_id: str, quantity: Decimal) -> None:
        """Take over the venue's quantity of a position; the venue is the truth for it."""
        async with self._books.lock:
            position = self._books.positions.get(position_id)
            if position is not None:
                log.error(
                    "quantity corrected",
                    symbol=position.symbol,
                    ours=str(position.quantity),
                    venue=str(quantity),
                )
                self._books.versions[position.symbol] += 1
                await self._books.save_position(msgspec.structs.replace(position, quantity=quantity))

    async def give_up_entry(self, position_id: str) -> None:
        """End an intention whose entry order ended without a fill."""
        async with self._books.lock:
            position = self._books.positions.get(position_id)
            if position is None or is_open(position):
                return
            for attempt in itertools.count():
                order = await self._books.known(client_order_id(position_id, "entry", attempt))
                if order is None:
                    break
                if not self._books.ended(order):
                    return  # it executed, and its fills are still to come
            ended = never_opened(position, self._clock.now_ms())
            await self._books.save_position(ended)
            await self._forget(ended)


def _attempt(order: Order) -> tuple[int, str]:
    """Orders of one leg in the order in which they were placed."""
    return len(order.client_order_id), order.client_order_id
