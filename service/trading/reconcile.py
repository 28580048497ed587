"""Comparing our books with the venue: at start, after a gap in the private stream, and regularly.

The venue is the truth for quantity, our ledger for intent. `plan` is pure: two views in, findings out.
`Reconciler` fetches positions, plain and conditional orders, then executions and funding, while events go
on being booked; it leaves alone what moved meanwhile, and acts: missing stops first. For a position that
was restored nothing is sent before what was executed since on its symbol is booked, where its stop does
not rest, and the venue holds it as we do: the books may be those of an older backup. What no execution
explains (a position vanished or changed) must be seen twice, since a snapshot may be older than the
events already booked. Only what the pass before did not see asks for the next one at once.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.ports import Clock, Exchange, Recorder, StateStore
from service.records import (
    Account,
    CloseReason,
    Order,
    OrderPurpose,
    OrderStatus,
    Position,
    VenuePosition,
)
from service.settings import TradingSettings
from service.trading.bookkeeping import CONTRADICTIONS
from service.trading.executor import Executor
from service.trading.foreign import guarded_elsewhere, is_foreign, taken_over
from service.trading.ledger import Holding, Ledger, LedgerCheck
from service.trading.orders import is_ours
from service.trading.positions import beyond, is_open
from service.trading.protecting import InstrumentOf

log = structlog.get_logger("trading.reconcile")

ZERO = Decimal(0)
ADJUSTMENTS_SEEN = "reconcile.adjustments_ms"
OVERLAP_MS = 600_000  # the income history may lag behind the event it reports
LEAST_WALL_S = 1.0  # between two passes, however fast market time runs
CENT = Decimal("0.01")
PASSES_AT_START = 3
EVENTS_LIMIT_S = 5.0  # wall seconds for the events taken so far to be booked: longer, the disk is full
CORRECTION_ATTEMPTS = 3


Suspect = tuple[str, str, str]
"""Kind, symbol and detail of what must be seen by two passes before anything is done about it."""


class OurView(msgspec.Struct, frozen=True, kw_only=True):
    """What we believe. `skipped` symbols moved since the venue's snapshot and are left alone."""

    positions: tuple[Position, ...]
    pending: tuple[Position, ...]
    orders: tuple[Order, ...]  # not final
    skipped: frozenset[str]
    shared: dict[str, Decimal] = {}  # by symbol: what is held in our position's direction and not of it


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
    unwritten: tuple[Order, ...]  # of perpd, not in our books, on symbols where we hold a position
    orphans: tuple[Order, ...]  # conditional, of perpd, not in our books, on symbols without a position
    strangers: tuple[VenuePosition, ...]  # held, and nothing of ours is there
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
        changed=tuple(
            (p, abs(held[p.symbol]))
            for p in on_venue
            if abs(held[p.symbol]) != p.quantity + ours.shared.get(p.symbol, ZERO)
        ),
        given_up=tuple(
            p for p in ours.pending if p.symbol not in ours.skipped and p.position_id not in working
        ),
        unwritten=_unwritten(resting, positions, ours),
        orphans=_orphans(held, resting, ours),
        strangers=_strangers(account, ours),
        foreign=_foreign(held, resting, ours),
    )


def _unwritten(resting: Sequence[Order], positions: Sequence[Position], ours: OurView) -> tuple[Order, ...]:
    known = {order.client_order_id for order in ours.orders}
    symbols = {position.symbol for position in positions}
    return tuple(
        order
        for order in resting
        if order.symbol in symbols and is_ours(order.client_order_id) and order.client_order_id not in known
    )


def _orphans(held: Mapping[str, Decimal], resting: Sequence[Order], ours: OurView) -> tuple[Order, ...]:
    known = {order.client_order_id for order in ours.orders}
    busy = {p.symbol for p in (*ours.positions, *ours.pending)} | ours.skipped | held.keys()
    return tuple(
        order
        for order in resting
        if order.type.conditional
        and is_ours(order.client_order_id)
        and order.client_order_id not in known
        and order.symbol not in busy
    )


def _strangers(account: Account, ours: OurView) -> tuple[VenuePosition, ...]:
    busy = {p.symbol for p in (*ours.positions, *ours.pending)} | ours.skipped
    return tuple(p for p in account.positions if p.symbol not in busy)


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
                "an order of perpd that is not in our books:"
                if is_ours(order.client_order_id)
                else "foreign: order"
            )
            found[order.symbol] = f"{whose} {order.client_order_id}"
    for symbol, quantity in held.items():
        if known.get(symbol, 0) * quantity <= 0:
            found[symbol] = f"foreign: position {quantity}"
        elif symbol in ours.shared:
            found[symbol] = f"foreign: {ours.shared[symbol]} held there beside our position"
    return {symbol: what for symbol, what in found.items() if symbol not in ours.skipped}


class Reconciler:
    """Runs `plan` and acts on it. `check` is the newest comparison of equities made at a quiet moment.

    Args: instrument_of: the venue's rules of a symbol as last read.
    """

    def __init__(
        self,
        executor: Executor,
        exchange: Exchange,
        store: StateStore,
        ledger: Ledger,
        clock: Clock,
        recorder: Recorder,
        settings: TradingSettings,
        *,
        instrument_of: InstrumentOf = lambda symbol: None,
    ) -> None:
        self._executor = executor
        self._exchange = exchange
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._recorder = recorder
        self._settings = settings
        self._instrument_of = instrument_of
        self._suspects: set[Suspect] = set()
        self._seen: set[Suspect] = set()
        self.check: LedgerCheck | None = None
        self.last_ms = 0  # end of the newest complete pass, venue time
        self.held: frozenset[str] = frozenset()  # symbols that the venue held at the newest pass

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Reconciler"]:
        """Reconcile until nothing contradicts our books, then in the background until the block ends.

        Raises VenueError: the venue cannot be read at the start; nothing may be traded then.
        """
        for _ in range(PASSES_AT_START):
            await self.reconcile()
            if not (self._suspects or self._executor.unconfirmed_positions()):
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
            except CONTRADICTIONS as error:  # of no symbol in particular: looked at again, never the end
                self._recorder.count("reconcile.failed")
                log.error("reconciliation failed on what it read", exc_info=error)

    async def _wait(self) -> None:
        """Until the interval is over or somebody asks, but never in quick succession."""
        await self._clock.sleep_s(LEAST_WALL_S * self._clock.speed)
        rest_s = self._settings.reconcile_s / self._clock.speed - LEAST_WALL_S
        wanted = self._executor.reconcile_wanted
        if rest_s > 0:
            try:
                async with asyncio.timeout(rest_s):
                    await wanted.wait()
            except TimeoutError:
                pass  # the regular pass is due
        wanted.clear()

    async def reconcile(self) -> Plan:
        """One pass. Raises VenueError: the venue could not be read; nothing was concluded.

        While state cannot be written, events wait for the disk and our books with them: then only missing
        stops are seen to.
        """
        started_s = self._clock.monotonic_s()
        executor = self._executor
        gap = executor.gap
        booked = await executor.events_applied(EVENTS_LIMIT_S)
        symbols = {p.symbol for p in (*executor.positions(), *executor.pending_positions())}
        symbols |= {order.symbol for order in executor.working_orders()} | executor.blocked_symbols().keys()
        before = {symbol: executor.version(symbol) for symbol in symbols}
        busy = executor.busy_symbols()
        account = await self._exchange.account()
        resting = await self._exchange.open_orders()
        self.held = frozenset(p.symbol for p in account.positions)
        booked = booked and await executor.events_applied(EVENTS_LIMIT_S)
        ours = self._our_view(before, busy | executor.busy_symbols())
        found = plan(account, resting, ours)
        if not booked:
            self._recorder.count("reconcile.stops_only")
            log.error("books wait for the disk: only missing stops are seen to")
            self._confirm(account, ours)
            self._place_missing_stops(found)
            executor.reconcile_wanted.set()
            return found
        await self._act(found, account, resting, ours)
        newest_ms = await self._book_adjustments()
        quiet = not ours.skipped and self._current(before) and newest_ms <= account.at_ms
        if quiet and not (found.ask or found.vanished or found.changed):
            self._compare(account)
        self.last_ms = self._clock.now_ms()
        executor.reconciled(gap)
        self._recorder.record("reconcile", self._clock.monotonic_s() - started_s)
        return found

    def _our_view(self, before: dict[str, int], busy: frozenset[str]) -> OurView:
        executor = self._executor
        positions, pending = executor.positions(), executor.pending_positions()
        orders = executor.working_orders()
        symbols = {p.symbol for p in (*positions, *pending)} | {order.symbol for order in orders}
        symbols |= before.keys() | executor.blocked_symbols().keys()
        moved = {s for s in symbols if executor.version(s) != before.get(s, -1)}
        return OurView(
            positions=positions,
            pending=pending,
            orders=orders,
            skipped=frozenset(moved | busy),
            shared=self._shared(positions),
        )

    def _shared(self, positions: Sequence[Position]) -> dict[str, Decimal]:
        """What our books say somebody else added to positions of ours; with `adopt` it is ours."""
        if self._settings.foreign == "adopt":
            return {}
        found = {
            p.symbol: beyond(p, self._ledger.holding(p.symbol).quantity)
            for p in positions
            if not is_foreign(p)
        }
        return {symbol: quantity for symbol, quantity in found.items() if quantity}

    def _current(self, before: dict[str, int]) -> bool:
        return all(self._executor.version(symbol) == version for symbol, version in before.items())

    async def _act(self, found: Plan, account: Account, resting: Sequence[Order], ours: OurView) -> None:
        executor = self._executor
        self._seen = self._still_triggered()
        for order in found.resting:
            executor.on_event(order)
        nobodys = []
        for order in found.unwritten:  # its name may tell whose it is, and is looked at once
            if self._seen_before("unwritten", order.symbol, order.client_order_id):
                nobodys.append(order)
            else:
                executor.on_event(order)
        await executor.events_applied()
        self._count_as_unprotected(found)
        stops = {position.stop_order_id for position in found.stops_missing}
        await self._ask_all([order for order in found.ask if order.client_order_id in stops])
        self._place_missing_stops(found)
        await self._ask_all([order for order in found.ask if order.client_order_id not in stops])
        self._place_missing_targets(found)
        for order in found.sweep:
            if executor.is_leftover(order):  # what was learned above may have made it the stop that counts
                self._recorder.count("reconcile.orphans")
                await executor.cancel(order)
        for position in found.given_up:
            await executor.give_up_entry(position.position_id)
        unheard = (*found.vanished, *(p for p, _ in found.changed), *self._in_question(found))
        for position in dict.fromkeys(unheard):
            await self._apart(position.symbol, self._book_missed(position.symbol, position.opened_ms))
        self._confirm(account, ours)
        for position in found.vanished:
            await self._apart(position.symbol, self._end_vanished(position))
        for position, quantity in found.changed:
            await self._apart(position.symbol, self._take_quantity(position, quantity))
        await self._agree_on_the_rest(account, ours)
        await self._clear_orphans(found)
        await self._clear_legs(nobodys, resting, ours)
        executor.block_foreign(found.foreign, keep=ours.skipped)
        for stranger in found.strangers:
            await self._apart(stranger.symbol, self._meet(stranger, resting))
        news = self._seen - self._suspects
        self._suspects = self._seen
        if news:  # what stays as it is, is looked at by the regular passes
            executor.reconcile_wanted.set()

    async def _apart(self, symbol: str, work: Coroutine[object, object, None]) -> None:
        """What cannot be booked quarantines its symbol and leaves the others alone."""
        try:
            await work
        except CONTRADICTIONS as error:
            self._executor.quarantine(symbol, error)

    def _seen_before(self, *suspect: str) -> bool:
        """Whether the pass before saw the same; it is noted for the next one."""
        kind, symbol, detail = suspect
        self._seen.add((kind, symbol, detail))
        return (kind, symbol, detail) in self._suspects

    # -- restored positions

    def _in_question(self, found: Plan) -> list[Position]:
        """Restored positions whose own stop does not rest: another may be held in their place."""
        unconfirmed = {p.position_id for p in self._executor.unconfirmed_positions()}
        return [p for p in found.stops_missing if p.position_id in unconfirmed]

    def _confirm(self, account: Account, ours: OurView) -> None:
        """Let restored positions be looked after that the venue holds as we do, or in the same direction at
        two passes: what nothing explains then still needs its stop.
        """
        held = {p.symbol: p.quantity for p in account.positions}
        for position in self._executor.unconfirmed_positions():
            if position.symbol in ours.skipped:
                version = self._executor.version(position.symbol)
                self._seen_before("moved", position.symbol, str(version))  # news: the next pass comes at once
                continue
            quantity = held.get(position.symbol, ZERO) * position.position_side.sign
            agrees = quantity == position.quantity + ours.shared.get(position.symbol, ZERO)
            if not is_open(position) or quantity <= 0:
                continue
            if agrees or self._seen_before("unconfirmed", position.symbol, position.position_id):
                self._executor.confirmed(position.position_id)

    # -- protection

    def _count_as_unprotected(self, found: Plan) -> None:
        """Asking takes seconds, in which perpd watches the price itself. A triggered stop is executing."""
        statuses = {o.client_order_id: o.status for o in self._executor.working_orders()}
        for position in found.stops_missing:
            triggered = statuses.get(position.stop_order_id) is OrderStatus.TRIGGERED
            current = self._open_now(position)
            if current is not None and current.stop_order_id == position.stop_order_id and not triggered:
                self._executor.stop_in_doubt(position.position_id)

    def _place_missing_stops(self, found: Plan) -> None:
        for position in found.stops_missing:
            if self._still_without(position):
                self._executor.stop_missing(position.position_id)
                self._recorder.count("reconcile.stops_missing")

    def _place_missing_targets(self, found: Plan) -> None:
        executing = {
            o.client_order_id for o in self._executor.working_orders() if o.status is OrderStatus.TRIGGERED
        }
        for position in found.targets_missing:
            current = self._open_now(position)
            if position.target_order_id in executing or current is None:
                continue
            if current.target_order_id == position.target_order_id:
                self._executor.target_missing(position.position_id)

    def _still_without(self, position: Position) -> bool:
        """The position is open and its stop neither rests nor is executing, now that it was asked for.

        A stop that was triggered is executing; only when it still is at the next pass is it given up.
        """
        current = self._open_now(position)
        if current is None or current.stop_order_id != position.stop_order_id:
            return False
        statuses = {o.client_order_id: o.status for o in self._executor.working_orders()}
        if statuses.get(position.stop_order_id) is not OrderStatus.TRIGGERED:
            return True
        return self._seen_before("triggered", position.symbol, position.stop_order_id)

    def _still_triggered(self) -> set[Suspect]:
        statuses = {o.client_order_id: o.status for o in self._executor.working_orders()}
        return {
            suspect
            for suspect in self._suspects
            if suspect[0] == "triggered" and statuses.get(suspect[2]) is OrderStatus.TRIGGERED
        }

    def _open_now(self, position: Position) -> Position | None:
        return next((p for p in self._executor.positions() if p.position_id == position.position_id), None)

    async def _ask_all(self, orders: Sequence[Order]) -> None:
        """At the same time: each may take seconds. The first error is raised as it is."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for order in orders:
                    tasks.create_task(self._ask(order), name=f"reconcile.ask.{order.client_order_id}")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask(self, order: Order) -> None:
        """What became of an order of ours that does not rest."""
        known = {o.client_order_id: o for o in self._executor.working_orders()}.get(order.client_order_id)
        if known is not None and known.symbol not in self._executor.busy_symbols():
            await self._executor.ask(known)

    # -- what contradicts our books

    async def _book_missed(self, symbol: str, since_ms: int) -> None:
        """Book the executions of a symbol that never reached us, under the reasons their names give."""
        for fill in await self._exchange.executions(symbol, since_ms):
            if await self._executor.book_missed(fill):
                self._recorder.count("reconcile.fills")
                log.warning(
                    "execution missed by the stream is booked",
                    symbol=symbol,
                    trade_id=fill.trade_id,
                    client_order_id=fill.client_order_id,
                )

    async def _agree_on_the_rest(self, account: Account, ours: OurView) -> None:
        """Holdings that are no position of ours, and changed without our hearing of it."""
        held = {p.symbol: p.quantity for p in account.positions}
        known = {p.symbol for p in (*ours.positions, *ours.pending)} | ours.skipped
        known |= {order.symbol for order in ours.orders}
        for symbol in self._disagreeing(account):
            if symbol not in known:
                await self._apart(symbol, self._agree_on(symbol, held.get(symbol, ZERO)))

    async def _agree_on(self, symbol: str, quantity: Decimal) -> None:
        await self._book_missed(
            symbol, max(await self._seen_until_ms() - OVERLAP_MS, self._ledger.started_ms)
        )
        if self._ledger.holding(symbol).quantity == quantity:
            return
        if self._seen_before("holding", symbol, str(quantity)):
            await self._correct(symbol, "holding changed on the venue")

    async def _end_vanished(self, position: Position) -> None:
        """A position that the venue no longer holds, though no execution says why, seen twice."""
        if self._open_now(position) != position:
            return
        if not self._seen_before("vanished", position.symbol, position.position_id):
            return
        reason = await self._why_vanished(position)
        if await self._correct(position.symbol, f"position closed on the venue: {reason}"):
            await self._executor.end_position(position.position_id, reason)

    async def _take_quantity(self, position: Position, quantity: Decimal) -> None:
        if self._open_now(position) != position:
            return
        if not self._seen_before("changed", position.symbol, str(quantity)):
            return
        if not await self._correct(position.symbol, "quantity changed on the venue"):
            return
        theirs = quantity > position.quantity and not is_foreign(position)
        if theirs and self._settings.foreign != "adopt":
            return  # what is more is not ours to close
        await self._executor.correct_quantity(position.position_id, quantity)

    async def _why_vanished(self, position: Position) -> CloseReason:
        """Liquidation shows in the wallet's history; anything else was done by hand."""
        changes = await self._exchange.adjustments(position.opened_ms)
        words = [f"{a.kind} {a.reason}".lower() for a in changes if a.symbol == position.symbol]
        liquidated = any("insurance" in word or "liquidat" in word for word in words)
        return CloseReason.LIQUIDATION if liquidated else CloseReason.MANUAL

    async def _correct(self, symbol: str, why: str) -> bool:
        """Take over what the venue holds of the symbol, and its wallet, as a recorded correction.

        The wallet is everybody's: a snapshot counts only when what was executed on other symbols is booked,
        and nothing was booked on any since. False when there was no such moment; the next pass tries again.
        """
        executor = self._executor
        for _ in range(CORRECTION_ATTEMPTS):
            await executor.events_applied()
            revision = executor.revision
            account = await self._exchange.account()
            await executor.events_applied()
            for other in self._disagreeing(account):
                if other != symbol:
                    since_ms = await self._unheard_since_ms(other)
                    await self._apart(other, self._book_missed(other, since_ms))
            theirs = next((p for p in account.positions if p.symbol == symbol), None)
            holding = (
                Holding(quantity=theirs.quantity, cost=theirs.quantity * theirs.entry_price)
                if theirs
                else Holding()
            )
            correction = await executor.correct_books(
                symbol, holding, account.wallet_balance, why, account.at_ms, revision=revision
            )
            if correction is not None:
                self._recorder.count("reconcile.corrections")
                log.error("books corrected", symbol=symbol, amount=str(correction.amount), reason=why)
                return True
        executor.reconcile_wanted.set()
        return False

    def _disagreeing(self, account: Account) -> list[str]:
        """Symbols of which the venue holds another quantity than our ledger."""
        held = {p.symbol: p.quantity for p in account.positions}
        return sorted(
            symbol
            for symbol in held.keys() | self._ledger.held_symbols()
            if self._ledger.holding(symbol).quantity != held.get(symbol, ZERO)
        )

    async def _unheard_since_ms(self, symbol: str) -> int:
        """When what we have not heard of a symbol can have begun."""
        opened = [p.opened_ms for p in self._executor.positions() if p.symbol == symbol]
        before_ms = max(await self._seen_until_ms() - OVERLAP_MS, self._ledger.started_ms)
        return min([before_ms, *opened])

    async def _clear_orphans(self, found: Plan) -> None:
        """Cancel conditional orders of perpd that nobody knows of, where nothing is held, seen twice."""
        for order in found.orphans:
            if not self._seen_before("orphan", order.symbol, order.client_order_id):
                continue
            await self._cancel_unknown(order)

    async def _clear_legs(self, nobodys: Sequence[Order], resting: Sequence[Order], ours: OurView) -> None:
        """Cancel closing orders of perpd that nobody knows of, once the position's own stop rests as well."""
        names = {order.client_order_id for order in resting}
        guarded = {p.symbol: p for p in ours.positions if p.stop_order_id in names}
        for order in nobodys:
            position = guarded.get(order.symbol)
            if position and order.type.conditional and order.side is position.position_side.exit_side:
                await self._cancel_unknown(order)

    async def _cancel_unknown(self, order: Order) -> None:
        self._recorder.count("reconcile.orphans")
        log.warning("orphan order cancelled", symbol=order.symbol, client_order_id=order.client_order_id)
        try:
            await self._exchange.cancel(order)
        except VenueError as error:
            log.warning("cancel failed", symbol=order.symbol, error=str(error))

    async def _meet(self, stranger: VenuePosition, resting: Sequence[Order]) -> None:
        """A position that is not ours, as `trading.foreign` says; what moved lately is seen twice first."""
        policy = self._settings.foreign
        if policy == "ignore" or (policy == "protect" and guarded_elsewhere(stranger, resting)):
            return
        if not self._seen_before("stranger", stranger.symbol, str(stranger.quantity)):
            return
        position = taken_over(
            stranger,
            policy,
            self._settings.foreign_stop_fraction,
            self._instrument_of(stranger.symbol),
            self._clock.now_ms(),
        )
        self._recorder.count("reconcile.taken_over")
        log.warning(
            "foreign position taken over",
            symbol=position.symbol,
            policy=policy,
            quantity=str(stranger.quantity),
            stop=str(position.stop),
        )
        await self._executor.take_over(position)
        self._executor.reconcile_wanted.set()  # what else rests there is looked at as the position's

    # -- money

    async def _book_adjustments(self) -> int:
        """Funding and transfers that the stream may have missed; returns when the newest was made."""
        since_ms = await self._seen_until_ms()
        newest_ms = 0
        for adjustment in await self._exchange.adjustments(since_ms):
            if await self._executor.book_adjustment(adjustment):
                self._recorder.count("reconcile.adjustments")
                newest_ms = max(newest_ms, adjustment.at_ms)
        kept_ms = max(since_ms, newest_ms, self._clock.now_ms() - OVERLAP_MS)
        await self._store.set_value(ADJUSTMENTS_SEEN, str(kept_ms))
        return newest_ms

    async def _seen_until_ms(self) -> int:
        seen = await self._store.get_value(ADJUSTMENTS_SEEN)
        return max(int(seen) if seen else 0, self._ledger.started_ms)

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
