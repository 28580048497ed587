"""The kill switch at work: kept in the store, looked at all the time, obeyed at once.

What it allows is asked in two places: before a signal is decided, and at the seam where an order leaves.
A store that cannot be written delays its latch and never its effect.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
import structlog

from service.errors import DataDirectoryUnusable
from service.ports import Clock, Recorder, StateStore
from service.records import CloseReason, Order, OrderPurpose, OrderStatus, Position
from service.settings import KillSettings, RiskSettings
from service.trading.bookkeeping import CONTRADICTIONS
from service.trading.equity import MARKS, EquityWatch
from service.trading.executor import Executor
from service.trading.foreign import is_guest
from service.trading.kill_request import REQUEST, with_request
from service.trading.killswitch import (
    Level,
    Readings,
    Rule,
    Switch,
    Trip,
    effect,
    looked,
    losses_in_a_row,
    resumed,
    standing,
    tripped,
)
from service.trading.ranking import Refused

log = structlog.get_logger("trading.killswitch")

KEY = "kill_switch"
LOOK_EVERY_S = 1.0
READ_EVERY_S = 5.0
NOTHING_TRIPPED = "nothing was tripped, so nothing was lifted and nothing changed"


class Values(Protocol):
    """What the switch is read from."""

    async def get_value(self, key: str) -> str | None: ...


class Surroundings(msgspec.Struct, frozen=True):
    """What the rules ask of parts outside trading; each answers at once."""

    stale_fraction: Callable[[], float] = lambda: 0.0
    clock_moved_ms: Callable[[], float] = lambda: 0.0
    memory_critical: Callable[[], bool] = lambda: False


class KillSwitch:
    """Tripped by hand or by rule, lifted by hand. `open` it before anything is sent."""

    def __init__(
        self,
        store: StateStore,
        equity: EquityWatch,
        clock: Clock,
        recorder: Recorder,
        kill: KillSettings,
        risk: RiskSettings,
        surroundings: Surroundings,
    ) -> None:
        self._store = store
        self._equity = equity
        self._clock = clock
        self._recorder = recorder
        self._kill = kill
        self._risk = risk
        self._surroundings = surroundings
        self._executor: Executor | None = None
        self._flat = False  # a flatten is in force and nothing of ours is left
        self._unsaved = False
        self._text = ""  # what the store has, as we know it
        self._read_at_s = clock.monotonic_s()
        self._stale_since_s: float | None = None
        self._losses = 0
        self._losses_of = (-1, -1)  # positions closed and time of the last resume when they were counted
        self._accepted_moved_ms = 0.0  # a measurement that a person has resumed after
        self._news = asyncio.Event()
        self.switch = Switch()

    async def open(self) -> None:
        """Take up the latch of earlier runs. One that cannot be read stays tripped: it may have been."""
        self._text = await self._store.get_value(KEY) or ""
        before = decoded(self._text, self._clock.now_ms())
        request = await self._store.get_value(REQUEST) or ""
        self.switch = with_request(before, request, self._clock.now_ms())
        self._unsaved = self.switch != before
        if self.switch.trips:
            log.error("kill switch is tripped since an earlier run", why=self.switch.words)

    @property
    def words(self) -> str:
        """Why nothing may be opened, or ''."""
        return self.switch.words

    @property
    def level(self) -> Level | None:
        return self.switch.level

    def refusal(self) -> Refused | None:
        """The answer to a signal while it is tripped."""
        return self.switch.refusal()

    @asynccontextmanager
    async def running(self, executor: Executor) -> AsyncIterator[None]:
        """Look and obey while the block runs; critical memory ends it sooner than the next look comes."""
        async with asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(self._run(executor), name="trading.killswitch")
            try:
                yield
                if self._surroundings.memory_critical():
                    await self.look(executor)
            finally:
                loop.cancel()

    async def _run(self, executor: Executor) -> None:
        while True:
            await self.look(executor)
            if self.level in (Level.REDUCE_ONLY, Level.FLATTEN):
                await self._cancel_entries(executor)
            if self.level is Level.FLATTEN:
                await self._flatten(executor)
            self._tell_flat(executor)
            self._news.clear()
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                pass  # time for the next look

    async def look(self, executor: Executor) -> None:
        """Read the values, trip what reached its limit, drop what is over, keep it all."""
        self._executor = executor
        await self._read_again()
        resumed_ms = self.switch.resumed_ms
        readings = await self._readings(executor)
        if self.switch.resumed_ms != resumed_ms:
            return  # a person resumed meanwhile: what was read is of before
        after = looked(self.switch, readings, self._kill, self._risk, self._clock.now_ms())
        if after != self.switch:
            await self._change(after)
        elif self._unsaved:
            await self._save()

    async def _read_again(self) -> None:
        """Take up what another process wrote; the command on another host of the same store does."""
        now_s = self._clock.monotonic_s()
        if self._unsaved or now_s < self._read_at_s + READ_EVERY_S:
            return
        self._read_at_s = now_s
        known = self._text
        try:
            text = await self._store.get_value(KEY)
            request = await self._store.get_value(REQUEST) or ""
        except DataDirectoryUnusable as error:
            log.debug("the kill switch could not be read again", error=str(error))
            return
        saved_meanwhile = self._unsaved or self._text != known
        if text and text != known and not saved_meanwhile:
            log.warning("kill switch changed in the store by another process")
            await self._change(decoded(text, self._clock.now_ms()))
        after = with_request(self.switch, request, self._clock.now_ms())
        if after != self.switch:
            log.warning("the kill switch is asked for by another process", request=request)
            await self._change(after)

    async def _readings(self, executor: Executor) -> Readings:
        losses = await self._losses_in_a_row(executor)  # first: all that follows is of one moment
        account, (errors, orders) = self._equity.account, executor.order_errors()
        stale_fraction = self._surroundings.stale_fraction()
        moved_ms = self._surroundings.clock_moved_ms()
        now_s = self._clock.monotonic_s()
        if stale_fraction <= self._kill.stale_fraction:
            self._stale_since_s = None
        elif self._stale_since_s is None:
            self._stale_since_s = now_s
        return Readings(
            equity=float(account.equity) if account else None,
            marks=self._equity.marks,
            losses_in_a_row=losses,
            orders=orders,
            order_errors=errors,
            stale_fraction=stale_fraction,
            stale_s=0.0 if self._stale_since_s is None else now_s - self._stale_since_s,
            unprotected_s=max((seconds for _, seconds in executor.unprotected()), default=0.0),
            clock_moved_ms=0.0 if moved_ms == self._accepted_moved_ms else moved_ms,
            memory_critical=self._surroundings.memory_critical(),
            unexplained=None if self._equity.unexplained is None else float(self._equity.unexplained),
        )

    async def _losses_in_a_row(self, executor: Executor) -> int:
        """Counted again when a position was closed or a person resumed."""
        counted = (executor.closed_count, self.switch.resumed_ms)
        if counted != self._losses_of:
            try:
                history = await self._store.closed_positions(max(self._kill.loss_streak, 1))
            except DataDirectoryUnusable:
                return self._losses
            self._losses = losses_in_a_row(history, counted[1])
            self._losses_of = counted
        return self._losses

    async def trip(self, level: Level, reason: str, by: str) -> dict[str, Any]:
        """By hand. Returns what `state` says, and what stays as it was because only a resume lowers it."""
        stays = standing(self.switch, level)
        if stays:
            log.warning("kill switch command finds it set", asked=level, by=by, reason=reason, stays=stays)
        after = tripped(self.switch, level, reason, by, self._clock.now_ms())
        if after != self.switch:
            await self._change(after)
        closing = self._closing() if self.level is Level.FLATTEN else ""
        return answered(self.state(), "; ".join(words for words in (stays, closing) if words))

    def _closing(self) -> str:
        """What a flatten finds to do, for who asked for it."""
        if self._executor is None:
            return "what is open is not known yet; all of it is closed at market as soon as it is"
        positions, orders = ours(self._executor)
        if not positions and not orders:
            return "flat: no position and no order of ours is open"
        symbols = ", ".join(sorted(position.symbol for position in positions)) or "none"
        return (
            f"of ours are open now: {len(positions)} positions ({symbols}), closed at market, and "
            f"{len(orders)} orders; the daemon logs 'flat' when none is left"
        )

    async def resume(self, reason: str, by: str) -> dict[str, Any]:
        """Lift it, all of it. What tripped it is measured from now on. Returns what `state` says.

        An equity that our books do not explain is booked; where that fails, its trip stays.
        """
        if not self.switch.trips:
            return answered(self.state(), NOTHING_TRIPPED)
        log.warning("kill switch lifted", by=by, reason=reason, was=self.switch.words)
        self._stale_since_s = None
        self._accepted_moved_ms = self._surroundings.clock_moved_ms()
        if self._executor is not None:
            self._executor.forget_order_errors()
        if any(trip.rule.about_loss for trip in self.switch.trips):
            await self._rebase()  # before it is lifted: a look in between would trip it again
        unexplained = any(trip.rule is Rule.UNEXPLAINED for trip in self.switch.trips)
        settled = unexplained and await self._equity.settle(reason, by)
        await self._change(resumed(self.switch, reason, by, self._clock.now_ms(), settled=settled))
        return self.state()

    async def _rebase(self) -> None:
        try:
            await self._equity.rebase()
        except DataDirectoryUnusable as error:
            log.error("the new start of losses could not be written", error=str(error))

    def state(self) -> dict[str, Any]:
        """For a person: the level, each trip with its value and limit, the last resume, and how many
        positions and orders of ours are open, once that is known."""
        if self._executor is None:
            return described(self.switch)
        positions, orders = ours(self._executor)
        return {**described(self.switch), "open": {"positions": len(positions), "orders": len(orders)}}

    async def _change(self, after: Switch) -> None:
        before, self.switch = self.switch, after
        self._news.set()
        positions = self._executor.positions() if self._executor else ()
        for trip in after.trips:
            if trip not in before.trips:
                self._recorder.count(f"kill.{trip.rule.value}")
                tell_trip(trip, positions)
        for trip in before.trips:
            if trip.rule not in {other.rule for other in after.trips}:
                log.warning("kill switch trip is over", rule=trip.rule, kill_level=trip.level, was=trip.words)
        await self._save()

    async def _save(self) -> None:
        text, self._unsaved = encoded(self.switch), True
        try:
            await self._store.set_value(KEY, text)
            self._text, self._unsaved = text, encoded(self.switch) != text
        except DataDirectoryUnusable as error:
            log.error("the kill switch could not be written down, it holds all the same", error=str(error))

    async def _cancel_entries(self, executor: Executor) -> None:
        """Nothing that adds to a position may rest."""
        for order in executor.working_orders():
            resting = order.status in (OrderStatus.OPEN, OrderStatus.PARTLY_FILLED)
            if order.purpose is OrderPurpose.ENTRY and resting:
                await executor.cancel(order)

    async def _flatten(self, executor: Executor) -> None:
        """Close every position of ours; what could not be closed is tried again at the next look."""
        positions, _ = ours(executor)
        if not positions:
            return
        log.error("flattening", symbols=[p.symbol for p in positions])
        async with asyncio.TaskGroup() as tasks:
            for position in positions:
                tasks.create_task(self._close(executor, position), name=f"flatten.{position.symbol}")

    def _tell_flat(self, executor: Executor) -> None:
        """Once, when a flatten has done its work."""
        flat = self.level is Level.FLATTEN and not any(ours(executor))
        if flat and not self._flat:
            log.warning("flat", detail="no position and no order of ours is left")
        self._flat = flat

    async def _close(self, executor: Executor, position: Position) -> None:
        try:
            closed = await executor.close(position, CloseReason.EXIT)
        except DataDirectoryUnusable as error:
            log.error("not closed yet", symbol=position.symbol, error=str(error))
            return
        except CONTRADICTIONS as error:
            executor.quarantine(position.symbol, error)
            return
        if not closed:
            log.error("not closed yet, trying again", symbol=position.symbol)


def ours(executor: Executor) -> tuple[list[Position], list[Order]]:
    """Open positions and orders, without guests, that are only protected, and their stops."""
    positions = [position for position in executor.positions() if not is_guest(position)]
    guests = {position.position_id for position in executor.positions() if is_guest(position)}
    return positions, [order for order in executor.working_orders() if order.position_id not in guests]


def tell_trip(trip: Trip, positions: tuple[Position, ...]) -> None:
    log.error(
        "kill switch tripped",
        rule=trip.rule,
        kill_level=trip.level,
        value=round(trip.value, 6),
        limit=trip.limit,
        why=trip.words,
        by=trip.by,
        effect=effect(trip.level, positions),
    )


def answered(state: dict[str, Any], words: str) -> dict[str, Any]:
    """A state with what a person is told besides, "" for nothing."""
    return {**state, "answer": words} if words else state


def described(switch: Switch) -> dict[str, Any]:
    """The switch as plain values."""
    return {
        "level": switch.level.value if switch.level else "free",
        "trips": msgspec.to_builtins(switch.trips),
        "resumed": {
            "at_ms": switch.resumed_ms,
            "by": switch.resumed_by,
            "reason": switch.resumed_reason,
        },
    }


def encoded(switch: Switch) -> str:
    return msgspec.json.encode(switch).decode()


def decoded(text: str, now_ms: int) -> Switch:
    """As the store has it, "" is not tripped; unreadable, it is tripped."""
    if not text:
        return Switch()
    try:
        return msgspec.json.decode(text, type=Switch)
    except msgspec.MsgspecError as error:
        return tripped(Switch(), Level.NO_ENTRIES, f"its record cannot be read: {error}", "store", now_ms)


async def read_switch(store: Values, now_ms: int) -> Switch:
    """With what was asked for and not taken up yet."""
    switch = decoded(await store.get_value(KEY) or "", now_ms)
    return with_request(switch, await store.get_value(REQUEST) or "", now_ms)


async def write_switch(store: StateStore, switch: Switch) -> None:
    await store.set_value(KEY, encoded(switch))


async def lift(store: StateStore, reason: str, by: str, now_ms: int) -> Switch:
    """Resume while no daemon runs: the next one measures losses anew. Changes nothing if none is tripped.

    An equity that our books do not explain stays: it is booked where the venue can be asked.
    """
    before = await read_switch(store, now_ms)
    if not before.trips:
        return before
    after = resumed(before, reason, by, now_ms)
    await write_switch(store, after)
    if any(trip.rule.about_loss for trip in before.trips):
        await store.set_value(MARKS, "")
    return after
