"""Comparing our books with the venue: at start, after a gap in the private stream, and regularly.

The venue is the truth for quantity, our ledger for intent. `plan` is pure: two views in, findings out.
`Reconciler` fetches the views, leaves alone what moved meanwhile, and acts: missing stops first. What
contradicts our books (a position vanished or changed) must be seen twice, since a snapshot may be older
than the events already booked.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.ports import Archive, Clock, Exchange, Recorder, StateStore
from service.records import (
    Account,
    CloseReason,
    Order,
    OrderPurpose,
    OrderStatus,
    Position,
)
from service.trading.executor import Executor
from service.trading.ledger import Holding, Ledger, LedgerCheck
from service.trading.orders import is_ours

log = structlog.get_logger("trading.reconcile")

ZERO = Decimal(0)
ADJUSTMENTS_SEEN = "reconcile.adjustments_ms"
OVERLAP_MS = 600_000  # the income history may lag behind the event it reports
LEAST_WALL_S = 1.0  # between two passes, however fast market time runs
CENT = Decimal("0.01")
PASSES_AT_START = 3


class OurView(msgspec.Struct, frozen=True, kw_only=True):
    """What we believe. `skipped` symbols moved since the venue's snapshot and are left alone."""

    positions: tuple[Position, ...]
    pending: tuple[Position, ...]
    orders: tuple[Order, ...]  # not final
    skipped: frozenset[str]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What differs, in the order in which it is acted upon."""

    stops_missing: tuple[Position, ...]
    targets_missing: tuple[Position, ...]
    ask: tuple[Order, ...]  # ours, not final, and not resting: executed, cancelled or lost
    resting: tuple[Order, ...]  # the venue's view of ours that rest
    sweep: tuple[Order, ...]  # ours rest, but their position ended, or has another in their place
    vanished: tuple[Position, ...]
    changed: tuple[tuple[Position, Decimal], ...]  # and the venue's quantity
    given_up: tuple[Position, ...]  # meant to be, but no order is left that could open them
    foreign: dict[str, str]  # symbol to what was found there


def plan(account: Account, resting: Sequence[Order], ours: OurView) -> Plan:
    """Compare. Pure."""
    held = {position.symbol: position.quantity for position in account.positions}
    by_name = {order.client_order_id: order for order in resting}
    positions = [p for p in ours.positions if p.symbol not in ours.skipped]
    orders = [order for order in ours.orders if order.symbol not in ours.skipped]
    open_ids = {p.position_id for p in (*ours.positions, *ours.pending)}
    on_venue = [p for p in positions if held.get(p.symbol, ZERO) * p.position_side.sign > 0]
    working = {order.position_id for order in ours.orders if order.purpose is OrderPurpose.ENTRY}
    return Plan(
        stops_missing=tuple(p for p in on_venue if p.stop_order_id not in by_name),
        targets_missing=tuple(p for p in on_venue if p.target and p.target_order_id not in by_name),
        ask=tuple(order for order in orders if order.client_order_id not in by_name),
        resting=tuple(by_name[o.client_order_id] for o in orders if o.client_order_id in by_name),
        sweep=tuple(
            o
            for o in orders
            if o.client_order_id in by_name
            and (o.position_id not in open_ids or _surplus(o, ours.positions, by_name))
        ),
        vanished=tuple(p for p in positions if p not in on_venue),
        changed=tuple((p, abs(held[p.symbol])) for p in on_venue if abs(held[p.symbol]) != p.quantity),
        given_up=tuple(
            p for p in ours.pending if p.symbol not in ours.skipped and p.position_id not in working
        ),
        foreign=_foreign(held, resting, ours),
    )


def _surplus(order: Order, positions: Sequence[Position], by_name: Mapping[str, Order]) -> bool:
    """A stop (or target) of a position whose current one rests as well."""
    position = next((p for p in positions if p.position_id == order.position_id), None)
    if position is None or not order.type.conditional:
        return False
    current = position.stop_order_id if order.purpose is OrderPurpose.STOP else position.target_order_id
    return current != order.client_order_id and current in by_name


def _foreign(held: dict[str, Decimal], resting: Sequence[Order], ours: OurView) -> dict[str, str]:
    """What on the venue is not ours, skipped symbols excluded."""
    known = {p.symbol: p.position_side.sign for p in (*ours.positions, *ours.pending)}
    names = {order.client_order_id for order in ours.orders}
    found: dict[str, str] = {}
    for order in resting:
        if order.client_order_id not in names:
            whose = (
                "an order of perpd that is not in our books" if is_ours(order.client_order_id) else "order"
            )
            found[order.symbol] = f"foreign: {whose} {order.client_order_id}"
    for symbol, quantity in held.items():
        if known.get(symbol, 0) * quantity <= 0:
            found[symbol] = f"foreign: position {quantity}"
    return {symbol: what for symbol, what in found.items() if symbol not in ours.skipped}


class Reconciler:
    """Runs `plan` and acts on it. `check` is the newest comparison of equities made at a quiet moment."""

    def __init__(
        self,
        executor: Executor,
        exchange: Exchange,
        store: StateStore,
        archive: Archive,
        ledger: Ledger,
        clock: Clock,
        recorder: Recorder,
        *,
        interval_s: float,
    ) -> None:
        self._executor = executor
        self._exchange = exchange
        self._store = store
        self._archive = archive
        self._ledger = ledger
        self._clock = clock
        self._recorder = recorder
        self._interval_s = interval_s
        self._suspects: set[tuple[str, str, str]] = set()
        self.check: LedgerCheck | None = None
        self.last_ms = 0  # end of the newest complete pass, venue time

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Reconciler"]:
        """Reconcile until nothing contradicts our books, then in the background until the block ends.

        Raises VenueError: the venue cannot be read at the start; nothing may be traded then.
        """
        for _ in range(PASSES_AT_START):
            await self.reconcile()
            if not self._suspects:
                break
        async with asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(self._loop(), name="trading.reconcile")
            try:
                yield self
            finally:
                loop.cancel()

    async def _loop(self) -> None:
        while True:
            await self._wait()
            try:
                await self.reconcile()
            except (VenueError, DataDirectoryUnusable) as error:
                self._recorder.count("reconcile.failed")
                log.warning("reconciliation failed", error=str(error))
                self._executor.reconcile_wanted.set()

    async def _wait(self) -> None:
        """Until the interval is over or somebody asks, but never in quick succession."""
        await self._clock.sleep_s(LEAST_WALL_S * self._clock.speed)
        rest_s = self._interval_s / self._clock.speed - LEAST_WALL_S
        wanted = self._executor.reconcile_wanted
        if rest_s > 0:
            try:
                async with asyncio.timeout(rest_s):
                    await wanted.wait()
            except TimeoutError:
                pass  # the regular pass is due
        wanted.clear()

    async def reconcile(self) -> Plan:
        """One pass. Raises VenueError: the venue could not be read; nothing was concluded."""
        started_s = self._clock.monotonic_s()
        executor = self._executor
        await self._book_adjustments()
        await executor.events_applied()
        symbols = {p.symbol for p in (*executor.positions(), *executor.pending_positions())}
        symbols |= {order.symbol for order in executor.working_orders()}
        before = {symbol: executor.version(symbol) for symbol in symbols}
        busy = executor.busy_symbols()
        resting = await self._exchange.open_orders()
        account = await self._exchange.account()
        await executor.events_applied()
        ours = self._our_view(before, busy | executor.busy_symbols())
        found = plan(account, resting, ours)
        await self._act(found, account)
        quiet = not ours.skipped and self._current(before)
        if quiet and not (found.ask or found.vanished or found.changed):
            self._compare(account)
        self.last_ms = self._clock.now_ms()
        self._recorder.record("reconcile", self._clock.monotonic_s() - started_s)
        return found

    def _our_view(self, before: dict[str, int], busy: frozenset[str]) -> OurView:
        executor = self._executor
        positions, pending = executor.positions(), executor.pending_positions()
        orders = executor.working_orders()
        symbols = {p.symbol for p in (*positions, *pending)} | {order.symbol for order in orders}
        symbols |= before.keys()
        moved = {s for s in symbols if executor.version(s) != before.get(s, -1)}
        return OurView(positions=positions, pending=pending, orders=orders, skipped=frozenset(moved | busy))

    def _current(self, before: dict[str, int]) -> bool:
        return all(self._executor.version(symbol) == version for symbol, version in before.items())

    async def _act(self, found: Plan, account: Account) -> None:
        executor = self._executor
        for order in found.resting:
            executor.on_event(order)
        await executor.events_applied()
        stops = {position.stop_order_id for position in found.stops_missing}
        for order in sorted(found.ask, key=lambda order: order.client_order_id not in stops):
            await self._ask(order)
        for position in found.stops_missing:
            if self._still_without(position):
                executor.stop_missing(position.position_id)
                self._recorder.count("reconcile.stops_missing")
        executing = {
            o.client_order_id for o in executor.working_orders() if o.status is OrderStatus.TRIGGERED
        }
        for position in found.targets_missing:
            current = {p.position_id: p for p in executor.positions()}.get(position.position_id)
            if position.target_order_id in executing or current is None:
                continue
            if current.target_order_id == position.target_order_id:
                executor.target_missing(position.position_id)
        for order in found.sweep:
            self._recorder.count("reconcile.orphans")
            await executor.cancel(order)
        for position in found.given_up:
            await executor.give_up_entry(position.position_id)
        await self._confirm(found, account)
        executor.block_foreign(found.foreign)

    def _still_without(self, position: Position) -> bool:
        """The position is open and its stop neither rests nor is executing, now that it was asked for.

        A stop that was triggered is executing; only when it still is at the next pass is it given up.
        """
        current = {p.position_id: p for p in self._executor.positions()}.get(position.position_id)
        if current is None or current.stop_order_id != position.stop_order_id:
            return False
        statuses = {o.client_order_id: o.status for o in self._executor.working_orders()}
        if statuses.get(position.stop_order_id) is not OrderStatus.TRIGGERED:
            return True
        suspect = ("triggered", position.symbol, position.stop_order_id)
        if suspect in self._suspects:
            return True
        self._suspects.add(suspect)
        return False

    async def _ask(self, order: Order) -> None:
        """What became of an order of ours that does not rest."""
        known = {o.client_order_id: o for o in self._executor.working_orders()}.get(order.client_order_id)
        if known is not None and known.symbol not in self._executor.busy_symbols():
            await self._executor.ask(known)

    async def _confirm(self, found: Plan, account: Account) -> None:
        """Act on what contradicts our books only when it was there the last time as well."""
        still_open = {p.position_id: p for p in self._executor.positions()}
        statuses = {o.client_order_id: o.status for o in self._executor.working_orders()}
        seen: set[tuple[str, str, str]] = {
            suspect
            for suspect in self._suspects
            if suspect[0] == "triggered" and statuses.get(suspect[2]) is OrderStatus.TRIGGERED
        }
        for position in found.vanished:
            if still_open.get(position.position_id) != position:
                continue
            suspect = ("vanished", position.symbol, position.position_id)
            if suspect not in self._suspects:
                seen.add(suspect)
                continue
            reason = await self._why_vanished(position)
            await self._executor.end_position(position.position_id, reason)
            await self._correct(position.symbol, account, f"position closed on the venue: {reason}")
        for position, quantity in found.changed:
            if still_open.get(position.position_id) != position:
                continue
            suspect = ("changed", position.symbol, str(quantity))
            if suspect not in self._suspects:
                seen.add(suspect)
                continue
            await self._executor.correct_quantity(position.position_id, quantity)
            await self._correct(position.symbol, account, "quantity changed on the venue")
        self._suspects = seen
        if seen:
            self._executor.reconcile_wanted.set()

    async def _why_vanished(self, position: Position) -> CloseReason:
        """Liquidation shows in the wallet's history; anything else was done by hand."""
        changes = await self._exchange.adjustments(position.opened_ms)
        words = [f"{a.kind} {a.reason}".lower() for a in changes if a.symbol == position.symbol]
        liquidated = any("insurance" in word or "liquidat" in word for word in words)
        return CloseReason.LIQUIDATION if liquidated else CloseReason.MANUAL

    async def _correct(self, symbol: str, account: Account, why: str) -> None:
        """Take over what the venue holds of the symbol, and its wallet, as a recorded correction."""
        theirs = next((p for p in account.positions if p.symbol == symbol), None)
        holding = (
            Holding(quantity=theirs.quantity, cost=theirs.quantity * theirs.entry_price)
            if theirs
            else Holding()
        )
        correction = await self._executor.correct_books(
            symbol, holding, account.wallet_balance, why, account.at_ms
        )
        if correction is not None:
            self._recorder.count("reconcile.corrections")
            log.error("books corrected", symbol=symbol, amount=str(correction.amount), reason=why)
            await self._archive.put("adjustments", correction)

    async def _book_adjustments(self) -> None:
        """Funding and transfers that the stream may have missed."""
        seen = await self._store.get_value(ADJUSTMENTS_SEEN)
        since_ms = max(int(seen) if seen else 0, self._ledger.started_ms)
        for adjustment in await self._exchange.adjustments(since_ms):
            if await self._executor.book_adjustment(adjustment):
                self._recorder.count("reconcile.adjustments")
                since_ms = max(since_ms, adjustment.at_ms)
        now_ms = self._clock.now_ms()
        await self._store.set_value(ADJUSTMENTS_SEEN, str(max(since_ms, now_ms - OVERLAP_MS)))

    def _compare(self, account: Account) -> None:
        check = self._ledger.compare(account)
        self.check = check
        if abs(check.difference) > CENT:
            self._recorder.count("reconcile.equity_differs")
            log.error(
                "equity differs from the venue's",
                ours=str(check.ledger_equity),
                venue=str(check.venue_equity),
                difference=str(check.difference),
                symbols=check.mismatched,
            )
