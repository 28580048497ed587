"""Performing protection's ladder: each open position has its stop and target, each ended one nothing.

Stop and target are kept at the same time, each by a task of its own: neither waits for the other's answer.
"""

import asyncio
from collections.abc import Callable, Coroutine
from decimal import Decimal

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.ports import Clock, Exchange, Recorder
from service.reactions import Reaction
from service.records import (
    CloseReason,
    Instrument,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
    Position,
)
from service.settings import TradingSettings
from service.trading.bookkeeping import Bookkeeper
from service.trading.books import Books
from service.trading.closing import Closer
from service.trading.foreign import is_guest
from service.trading.orders import RESTING, new_order
from service.trading.positions import is_open, without_protection
from service.trading.protection import (
    NOTHING_HELD,
    PLACING,
    Failure,
    Step,
    next_stop_step,
    next_target_step,
    other_working_type,
    stop_breached,
)
from service.trading.sending import Rules, Sender, pause
from service.trading.sizing import fitted_trigger
from service.trading.trailing import trailed_stop

log = structlog.get_logger("trading.protecting")

LONGEST_RETRY_S = 60.0
TRAIL_PAUSE_S = 5.0  # between two moves of one stop: each costs two requests

InstrumentOf = Callable[[str], Instrument | None]
"""The venue's rules of a symbol as last read."""


class Protector:
    """Owns the tasks that protect and sweep, within the group that `start` is given.

    Args: retry_s: wall seconds between attempts while the venue is out of reach.
    """

    def __init__(
        self,
        exchange: Exchange,
        books: Books,
        bookkeeper: Bookkeeper,
        sender: Sender,
        closer: Closer,
        clock: Clock,
        settings: TradingSettings,
        recorder: Recorder,
        *,
        retry_s: float,
        rules: Rules,
        instrument_of: InstrumentOf,
    ) -> None:
        self._exchange = exchange
        self._books = books
        self._bookkeeper = bookkeeper
        self._sender = sender
        self._closer = closer
        self._clock = clock
        self._settings = settings
        self._recorder = recorder
        self._retry_s = retry_s
        self._rules = rules
        self._instrument_of = instrument_of
        self._trail_after_s: dict[str, float] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self.background: set[asyncio.Task[None]] = set()
        self._stopping: set[str] = set()  # positions that the software stop is closing
        self._legs: dict[tuple[str, OrderPurpose], asyncio.Task[None]] = {}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin: until then what shall be protected or swept is left to reconciliation."""
        self._tasks = tasks

    def stop(self) -> None:
        """Begin nothing more."""
        self._tasks = None

    def cancel(self) -> None:
        """Cancel what is under way; the group awaits it."""
        for task in list(self.background):
            task.cancel()

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None] | None:
        if self._tasks is None:
            work.close()
            return None
        task = self._tasks.create_task(work, name=name)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    def at_work(self) -> set[str]:
        """Ids of the positions whose stop or target is being placed."""
        return {name for name, _ in self._legs}

    async def placed(self, name: str, limit_s: float) -> None:
        """Returns once nothing is being placed for the position, or after `limit_s` wall seconds."""
        legs = {task for (position_id, _), task in self._legs.items() if position_id == name}
        if legs:
            await asyncio.wait(legs, timeout=limit_s)

    def protect(self, name: str) -> None:
        """See to it that the position has its stop and its target.

        A leg that is at work already goes on; the other is begun, even while that one waits. A position that
        was not compared with the venue yet waits for it: `confirmed` begins.
        """
        if name not in self._books.positions or name in self._books.unconfirmed:
            return
        for purpose in (OrderPurpose.STOP, OrderPurpose.TARGET):
            if (name, purpose) not in self._legs:
                task = self._spawn(self._keep(name, purpose), f"trading.{purpose}.{name}")
                if task is not None:
                    self._legs[name, purpose] = task

    def confirmed(self, position_id: str) -> None:
        """The venue holds a restored position as our books have it: it is looked after from now on."""
        if position_id in self._books.unconfirmed:
            self._books.unconfirmed.discard(position_id)
            position = self._books.positions.get(position_id)
            if position is not None and is_open(position):
                self.protect(position_id)

    def stop_missing(self, position_id: str) -> None:
        """The venue does not hold the stop that we believed in."""
        if position_id not in self._books.positions:
            return
        self._forget_protection(position_id, OrderPurpose.STOP)
        self._books.unprotected_now(position_id)
        self.protect(position_id)

    def target_missing(self, position_id: str) -> None:
        """The venue does not hold the target that we believed in."""
        self._forget_protection(position_id, OrderPurpose.TARGET)
        self.protect(position_id)

    def _forget_protection(self, position_id: str, purpose: OrderPurpose) -> None:
        position = self._books.positions.get(position_id)
        if position is not None:
            self._books.positions[position_id] = without_protection(position, purpose)

    async def _keep(self, name: str, purpose: OrderPurpose) -> None:
        """A store that cannot be read delays a leg and never ends it."""
        keep = self._keep_stop if purpose is OrderPurpose.STOP else self._keep_target
        try:
            while True:
                try:
                    await keep(name)
                    return
                except DataDirectoryUnusable as error:
                    self._books.note_store(error)
                    await pause(self._clock, self._retry_s)
        finally:
            self._legs.pop((name, purpose), None)

    async def _keep_stop(self, name: str) -> None:
        """Climb the ladder, each step told, until the stop rests or the position is closed."""
        failures: list[Failure] = []
        rounds = 0
        while (position := self._books.positions.get(name)) is not None and not position.protected_ms:
            since_s = self._books.unprotected_since.get(name, self._clock.monotonic_s())
            unprotected_s = self._clock.monotonic_s() - since_s
            step = next_stop_step(
                failures, unprotected_s=unprotected_s, limit_s=self._settings.unprotected_limit_s
            )
            if step is Step.CLOSE and is_guest(position):
                step = Step.WATCH  # a guest is given a stop; closing it is its owner's business
            self._tell(position, step, failures, unprotected_s)
            if step is Step.CLOSE:
                breached = failures[-1].reaction is Reaction.CLOSE_NOW
                if await self._closer.close(position, CloseReason.STOP if breached else CloseReason.EXIT):
                    return
                if await self._look_for_stop(position) is NOTHING_HELD:
                    return  # reconciliation decides what became of it
                failures.clear()
                await pause(self._clock, min(self._retry_s * 2**rounds, LONGEST_RETRY_S))
                rounds += 1
                continue
            failure = await self._unknown_stop(position)
            if failure is None and self._books.positions.get(name) is position:
                if step is Step.WATCH:
                    waits_s = self._retry_s * (2 ** min(rounds, 10) if is_guest(position) else 1)
                    await pause(self._clock, min(waits_s, LONGEST_RETRY_S))
                    rounds += 1
                failure = await self._stop_step(position, step, failures)
            if failure is NOTHING_HELD:
                return
            if failure is not None:
                failures.append(failure)
                del failures[: -len(PLACING)]  # a guest may be watched for days

    async def _unknown_stop(self, position: Position) -> Failure | None:
        """Before another stop is placed, the fate of an earlier one must be known."""
        for order in self._books.orders_of(position.position_id):
            lost = order.status in (OrderStatus.INTENDED, OrderStatus.SENT, OrderStatus.UNKNOWN)
            if order.purpose is OrderPurpose.STOP and lost and not await self._sender.ask(order):
                return Failure(code=0, detail=f"the fate of stop {order.client_order_id} is not known yet")
        return None

    def _tell(self, position: Position, step: Step, failures: list[Failure], unprotected_s: float) -> None:
        """The alarm line of a position without its stop: how long, why, and what is done about it."""
        if not failures:
            return
        self._recorder.count("trading.stop_failures")
        # Beyond its stop already: the ladder closes it at once, as the stop would have.
        tell = log.warning if failures[-1].reaction is Reaction.CLOSE_NOW else log.error
        tell(
            "position without a stop",
            symbol=position.symbol,
            unprotected_s=round(unprotected_s, 3),
            limit_s=self._settings.unprotected_limit_s,
            step=step,
            detail=failures[-1].detail,
        )

    async def _stop_step(self, position: Position, step: Step, failures: list[Failure]) -> Failure | None:
        if failures and failures[-1].reaction is Reaction.MAKE_ROOM:
            await self._make_room()
        if failures and failures[-1].reaction is Reaction.REFRESH_RULES:
            position = await self._on_their_grid(position)
        if step is Step.ASK:
            return await self._look_for_stop(position)
        other = step in (Step.PLACE_OTHER_WORKING_TYPE, Step.PLACE_REDUCE_ONLY)
        configured: str = self._settings.stop_working_type
        return await self._place_protective(
            position,
            OrderPurpose.STOP,
            other_working_type(configured) if other else configured,
            reduce_only=step is Step.PLACE_REDUCE_ONLY,
        )

    async def _make_room(self) -> None:
        """Too many orders rest: those of ended positions go first."""
        for order in self._books.working_orders():
            if self._books.is_leftover(order):
                await self._sender.cancel(order)

    async def _on_their_grid(self, position: Position) -> Position:
        """The position with stop and target on the ticks that the venue has now."""
        try:
            instrument = await self._rules(position.symbol)
        except VenueError as error:
            log.warning("the venue's rules cannot be read", symbol=position.symbol, error=str(error))
            return position
        if instrument is None:
            return position
        side = position.position_side
        return msgspec.structs.replace(
            position,
            stop=fitted_trigger(position.stop, side, OrderPurpose.STOP, instrument),
            target=fitted_trigger(position.target, side, OrderPurpose.TARGET, instrument),
        )

    def on_price(self, position: Position, price: float) -> None:
        """See what a price means for a position. Called for each of its prices, on the loop; never blocks."""
        if self._tasks is None or position.position_id in self._books.unconfirmed:
            return
        if position.position_id in self._books.unprotected_since:
            self._watch(position, price)
        elif self._settings.trail_r:
            self._trail(position, price)

    def _watch(self, position: Position, price: float) -> None:
        """The software stop: a position whose stop does not rest is closed when the price gets there.

        A guest is not: perpd sends nothing for it but the stop.
        """
        name = position.position_id
        if name in self._stopping or is_guest(position):
            return
        if stop_breached(float(position.stop), price, position.position_side.sign):
            self._stopping.add(name)
            self._recorder.count("trading.software_stops")
            log.error("software stop reached", symbol=position.symbol, price=price, stop=str(position.stop))
            self._spawn(self._software_stop(position), f"trading.software_stop.{name}")

    def _trail(self, position: Position, price: float) -> None:
        name = position.position_id
        instrument = self._instrument_of(position.symbol)
        busy = (name, OrderPurpose.STOP) in self._legs or name in self._closer.exiting
        if (
            busy
            or is_guest(position)
            or instrument is None
            or self._clock.monotonic_s() < self._trail_after_s.get(name, 0.0)
        ):
            return
        stop = trailed_stop(position, price, self._settings.trail_r, instrument.tick_size)
        if stop is None:
            return
        if len(self._trail_after_s) > len(self._books.positions):
            self._trail_after_s = {
                known: at_s for known, at_s in self._trail_after_s.items() if known in self._books.positions
            }
        self._trail_after_s[name] = self._clock.monotonic_s() + TRAIL_PAUSE_S
        task = self._spawn(self._move_stop(position, stop), f"trading.trail.{name}")
        if task is not None:
            self._legs[name, OrderPurpose.STOP] = task

    async def _move_stop(self, position: Position, stop: Decimal) -> None:
        """Place the better stop; once it rests, the books take it for the stop and the old one is swept.

        The venue lets one order for the whole position rest in a direction: the two forms take turns.
        """
        name = position.position_id
        try:
            current = self._books.orders.get(position.stop_order_id)
            failure = await self._unknown_stop(position) or await self._place_protective(
                msgspec.structs.replace(position, stop=stop),
                OrderPurpose.STOP,
                self._settings.stop_working_type,
                reduce_only=current is None or not current.quantity,
            )
            if failure is None:
                self._recorder.count("trading.stops_moved")
                log.info("stop moved", symbol=position.symbol, stop=str(stop), before=str(position.stop))
            else:
                log.warning(
                    "stop not moved, the old one rests", symbol=position.symbol, detail=failure.detail
                )
        except DataDirectoryUnusable as error:
            self._books.note_store(error)
        finally:
            self._legs.pop((name, OrderPurpose.STOP), None)
            if name in self._books.unprotected_since:
                self.protect(name)  # the old one ended meanwhile, and nobody could see to it

    async def _software_stop(self, position: Position) -> None:
        try:
            await self._closer.close(position, CloseReason.STOP)
        finally:
            self._stopping.discard(position.position_id)

    async def _keep_target(self, name: str) -> None:
        failures: list[Failure] = []
        while (position := self._books.positions.get(name)) is not None and not position.target_order_id:
            if not position.target:
                return  # taken over from elsewhere: it has a stop only
            step = next_target_step(failures)
            if failures:
                log.warning(
                    "target not placed", symbol=position.symbol, step=step, detail=failures[-1].detail
                )
            if step is Step.GIVE_UP:
                return  # the stop protects; reconciliation tries again
            if step is Step.CLOSE:
                await self._closer.close(position, CloseReason.TARGET)
                return
            if failures and failures[-1].reaction is Reaction.REFRESH_RULES:
                position = await self._on_their_grid(position)
            working_type = self._settings.stop_working_type
            failure = await self._place_protective(position, OrderPurpose.TARGET, working_type)
            if failure is not None:
                failures.append(failure)

    async def _place_protective(
        self, position: Position, purpose: OrderPurpose, working_type: str, *, reduce_only: bool = False
    ) -> Failure | None:
        """One conditional order that closes the position. None when it rests, or nothing is left.

        Args: reduce_only: for the quantity held now, where an order for the whole position is refused.
        """
        stop = purpose is OrderPurpose.STOP
        name = await self._books.next_id(position.position_id, purpose.value)
        request = OrderRequest(
            client_order_id=name,
            symbol=position.symbol,
            side=position.position_side.exit_side,
            type=OrderType.STOP_MARKET if stop else OrderType.TAKE_PROFIT_MARKET,
            purpose=purpose,
            position_id=position.position_id,
            trigger_price=position.stop if stop else position.target,
            quantity=position.quantity if reduce_only else None,
            reduce_only=reduce_only,
            close_position=not reduce_only,
            working_type=working_type,
        )
        failure = await self._sender.send(request, new_order(request, self._clock.now_ms()))
        self._books.changed.pop(name, None)
        if failure is not None:
            return failure
        order = await self._books.known(name)
        if order is None or order.status in RESTING or order.status is OrderStatus.FILLED:
            return None
        if position.position_id not in self._books.positions:
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
        others = []
        for order in resting:
            if order.symbol != position.symbol or not order.type.conditional:
                continue
            known = await self._books.known(order.client_order_id) or self._books.recognised(order)
            if known is not None and known.position_id == position.position_id:
                await self._bookkeeper.learn(order)
            elif known is not None:
                await self._sender.cancel(known)
            elif order.type is OrderType.STOP_MARKET and order.side is position.position_side.exit_side:
                others.append(order.client_order_id)
        if all(held.symbol != position.symbol for held in account.positions):
            self._books.reconcile_wanted.set()
            return NOTHING_HELD
        current = self._books.positions.get(position.position_id)
        if current is None or current.protected_ms:
            return None
        found = (
            f"a stop that is not in our books rests there: {', '.join(others)}" if others else "none rests"
        )
        return Failure(code=0, detail=f"the venue was asked for this position's stop: {found}")

    def sweep(self, name: str) -> None:
        """See to it that no conditional order rests that protects nothing, or is one too many."""
        if any(self._books.is_leftover(order) for order in self._books.orders_of(name)):
            self._spawn(self._cancel_leftovers(name), f"trading.sweep.{name}")

    async def _cancel_leftovers(self, name: str) -> None:
        for order in self._books.orders_of(name):
            if self._books.is_leftover(order):
                await self._sender.cancel(order)
