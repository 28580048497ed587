"""Random faults, random interference and restarts against the in-memory venue; then the books must agree.

Assumptions: as `trading_desk`; a dropped event never comes again; a crash loses what was not in the store.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from service.clock import WallClock
from service.errors import (
    DataDirectoryUnusable,
    OrderOutcomeUnknown,
    OrderRejected,
    VenueError,
    VenueUnavailable,
)
from service.ports import UserEvent
from service.records import (
    Account,
    Adjustment,
    CloseReason,
    Fill,
    Order,
    OrderPurpose,
    OrderRequest,
    Side,
)
from tests.integration.trading_desk import ZERO, Desk, Venue, approved, desk_at, quiet, signal

SYMBOLS = ("AUSDT", "BUSDT", "CUSDT")
STEPS = 30


class Unreliable(Venue):
    """Loses, refuses, delays, repeats and drops with `rate`, while it is above 0."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.rate = 0.0
        self.time_ms = WallClock().now_ms()
        self.late: list[UserEvent] = []

    def hits(self, share: float = 1.0) -> bool:
        return self.chance.random() < self.rate * share

    def emit(self, event: UserEvent) -> None:
        if self.hits(0.5):
            return
        if self.hits():
            self.late.append(event)
            return
        super().emit(event)
        if self.hits():
            super().emit(event)

    def deliver_late(self) -> None:
        late, self.late = self.late, []
        self.chance.shuffle(late)
        for event in late:
            super().emit(event)

    def _fail_read(self) -> None:
        if self.hits(0.5):
            raise VenueUnavailable("read failed")

    async def place(self, request: OrderRequest) -> Order:
        await asyncio.sleep(0)
        if self.hits(0.3):
            raise VenueUnavailable("nothing was sent", code=-1008)
        if self.hits(0.3):
            raise OrderOutcomeUnknown("lost on the way")
        if self.hits(0.3):
            raise OrderRejected("no", code=self.chance.choice([-2010, -2019, -2021, -4131, -1111]))
        order = await super().place(request)
        if self.hits(0.5):
            raise OrderOutcomeUnknown("answer lost", code=-1007)
        return order

    async def cancel(self, order: Order) -> bool:
        self._fail_read()
        return await super().cancel(order)

    async def order(self, order: Order) -> tuple[Order, list[Fill]] | None:
        await asyncio.sleep(0)
        self._fail_read()
        if self.hits(0.3):
            return None  # not there yet, it says
        return await super().order(order)

    async def open_orders(self) -> list[Order]:
        await asyncio.sleep(0)
        self._fail_read()
        return await super().open_orders()

    async def account(self) -> Account:
        await asyncio.sleep(0)
        self._fail_read()
        return await super().account()

    async def executions(self, symbol: str, since_ms: int) -> list[Fill]:
        self._fail_read()
        return await super().executions(symbol, since_ms)

    async def adjustments(self, since_ms: int) -> list[Adjustment]:
        self._fail_read()
        return await super().adjustments(since_ms)


KINDS = ("open", "open", "trigger", "hand", "vanish", "reconcile", "late", "close", "price")


def fail_writes(desk: Desk, venue: Unreliable) -> None:
    """The disk is full now and then."""
    write = desk.store._write

    async def flaky(change: Callable[..., Any], **words: Any) -> Any:
        if venue.hits(0.5):
            raise DataDirectoryUnusable("full")
        return await write(change, **words)

    desk.store._write = flaky  # type: ignore[method-assign]


async def one_step(desk: Desk, venue: Unreliable, number: int, kinds: Sequence[str] = KINDS) -> None:
    chance, executor = venue.chance, desk.executor
    venue.mark = Decimal(chance.choice(["99.4", "100", "100.8"]))
    match chance.choice(kinds):
        case "open":
            symbol = chance.choice(SYMBOLS)
            await executor.open(signal(f"s{number}", symbol), approved())
        case "trigger":
            purpose = chance.choice([OrderPurpose.STOP, OrderPurpose.TARGET])
            if any(order.symbol in venue.held for order in venue.resting(purpose)[:1]):
                venue.trigger(purpose, "99" if purpose is OrderPurpose.STOP else "102")
        case "hand" if venue.held:
            symbol, (quantity, _) = chance.choice(sorted(venue.held.items()))
            part = abs(quantity) if chance.random() < 0.5 else abs(quantity) / 2
            side = Side.SELL if quantity > 0 else Side.BUY
            venue.trade(symbol, side, part, chance.choice(["web_1", "autoclose-1", "adl_autoclose"]))
            if symbol not in venue.held:
                for order in await Venue.open_orders(venue):
                    if order.symbol == symbol and chance.random() < 0.5:
                        venue.vanish(order.client_order_id)
        case "vanish":
            resting = await Venue.open_orders(venue)
            if resting:
                venue.vanish(chance.choice(resting).client_order_id)
        case "reconcile":
            with contextlib.suppress(VenueError, DataDirectoryUnusable):
                await desk.reconciler.reconcile()
        case "late":
            venue.deliver_late()
        case "close":
            for position in executor.positions()[:1]:
                await executor.close(position, CloseReason.EXIT)
        case "price":
            executor.on_price(chance.choice(SYMBOLS), float(venue.mark))


async def cut_short(desk: Desk, venue: Unreliable, number: int) -> None:
    """The process dies somewhere within a step."""
    kinds = ("open", "open", "close", "reconcile")
    dying = asyncio.create_task(one_step(desk, venue, number + 1_000, kinds))
    await asyncio.sleep(venue.chance.random() * 0.02)
    dying.cancel()
    await asyncio.wait({dying})


async def healed(desk: Desk, venue: Unreliable) -> None:
    venue.rate = 0.0
    venue.deliver_late()
    for _ in range(6):
        await quiet(desk)
        await desk.reconciler.reconcile()
    await quiet(desk)


async def agreed(desk: Desk, venue: Unreliable) -> None:
    """What must hold whatever happened before."""
    entries = Counter(r.position_id for r in venue.sent if r.purpose is OrderPurpose.ENTRY)
    executed = Counter(
        venue.orders[r.client_order_id].client_order_id[:-3]
        for r in venue.sent
        if r.purpose is OrderPurpose.ENTRY and r.client_order_id in venue.orders
    )
    assert max(executed.values(), default=0) <= 1, f"an entry was executed twice: {entries}"
    blocked = desk.executor.blocked_symbols()
    ours = {p.symbol: p.quantity * p.position_side.sign for p in desk.executor.positions()}
    held = {symbol: quantity for symbol, (quantity, _) in venue.held.items()}
    assert ours == held, f"positions {ours}, the venue holds {held}, blocked {blocked}"
    resting = Counter((o.symbol, o.purpose) for o in await Venue.open_orders(venue))
    assert all(resting[symbol, OrderPurpose.STOP] == 1 for symbol in held), resting
    assert {symbol for symbol, _ in resting} <= held.keys(), resting
    assert max(resting.values(), default=0) <= 1, resting
    assert desk.executor.unprotected() == []
    check = desk.ledger.compare(await Venue.account(venue))
    assert abs(check.difference) < Decimal("1e-6"), check
    assert check.mismatched == ()
    assert ZERO not in held.values()


async def lived_through(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    venue = Unreliable(chance)
    limits = {"answer_limit_s": 0.02, "unprotected_limit_s": 0.03, "trail_r": chance.choice([0.0, 1.0])}
    number = 0
    for _ in range(chance.choice([1, 2, 4])):
        async with desk_at(path, venue, **limits) as desk:
            await desk.reconciler.reconcile()
            fail_writes(desk, venue)
            venue.rate = chance.choice([0.1, 0.3, 0.6])
            for _ in range(STEPS):
                number += 1
                await one_step(desk, venue, number)
            venue.rate = 0.0
        venue.late.clear()  # what is on its way as the process dies is lost
    async with desk_at(path, venue, **limits) as desk:
        await healed(desk, venue)
        await agreed(desk, venue)


@pytest.mark.parametrize("seed", range(12))
async def test_after_random_faults_and_restarts_the_books_agree(tmp_path: Path, seed: int):
    async with asyncio.timeout(120):
        await lived_through(tmp_path, seed)
