"""The weight budget under a clock that moves only when told."""

import asyncio

import pytest

from service.clock import ManualClock
from service.errors import VenueThrottled
from service.exchange.binance.codec import RateLimit
from service.exchange.binance.limits import WINDOW_MARGIN_MS, WeightBudget

MINUTE_MS = 60_000


async def waits(work: asyncio.Task[None]) -> bool:
    """Whether it still waits after everything that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not work.done()


def budget(clock: ManualClock, limit: int = 100, reserve: float = 0.25) -> WeightBudget:
    made = WeightBudget(clock, reserve)
    made.set_limits([RateLimit(kind="REQUEST_WEIGHT", interval="MINUTE", interval_count=1, limit=limit)])
    return made


async def test_reads_leave_the_reserve_and_wait_for_the_next_window():
    clock = ManualClock(10 * MINUTE_MS)
    made = budget(clock)
    await made.take(75)
    read = asyncio.create_task(made.take(1))
    assert await waits(read)
    await made.take(25, priority=True)
    clock.advance_to(11 * MINUTE_MS + WINDOW_MARGIN_MS)
    await read
    assert made.used == 1


async def test_many_waiting_reads_do_not_burst_beyond_the_next_window():
    clock = ManualClock(0)
    made = budget(clock)
    reads = [asyncio.create_task(made.take(40)) for _ in range(4)]
    assert await waits(reads[2])
    done = [read.done() for read in reads]
    clock.advance_to(MINUTE_MS + WINDOW_MARGIN_MS)
    assert await waits(reads[3])
    assert (done, made.used) == ([True, False, False, False], 40)
    for minute in (2, 3):
        clock.advance_to(minute * MINUTE_MS + WINDOW_MARGIN_MS)
        await waits(reads[3])
    assert all(read.done() for read in reads)


async def test_the_venues_own_count_wins_when_it_is_higher():
    made = budget(ManualClock(0))
    await made.take(1)
    made.observe(80, asked_ms=0)
    assert made.used == 80
    made.observe(3, asked_ms=0)
    assert made.used == 80


async def test_a_count_of_a_window_that_has_passed_is_ignored():
    clock = ManualClock(0)
    made = budget(clock)
    clock.advance_to(MINUTE_MS + 5)
    made.observe(99, asked_ms=MINUTE_MS - 1)
    assert made.used == 0


async def test_a_request_heavier_than_its_share_passes_in_an_empty_window():
    made = budget(ManualClock(0), limit=40, reserve=0.5)
    await made.take(30)
    assert made.used == 30


def order_budget(clock: ManualClock, limit: int = 4) -> WeightBudget:
    made = WeightBudget(clock, 0.25)
    made.set_limits([RateLimit(kind="ORDERS", interval="SECOND", interval_count=10, limit=limit)])
    return made


async def test_entries_leave_the_reserve_of_the_order_counts_to_exits():
    clock = ManualClock(9_000)
    made = order_budget(clock)
    for _ in range(3):
        await made.take_order()
    entry = asyncio.create_task(made.take_order())
    assert await waits(entry)
    await made.take_order(urgent=True)
    exit_ = asyncio.create_task(made.take_order(urgent=True))
    assert await waits(exit_)
    clock.advance_to(10_000 + WINDOW_MARGIN_MS)
    await entry
    await exit_


async def test_an_entry_that_would_wait_too_long_is_not_sent_and_an_exit_waits():
    clock = ManualClock(0)
    made = order_budget(clock)
    for _ in range(3):
        await made.take_order()
    with pytest.raises(VenueThrottled) as raised:
        await made.take_order()
    assert raised.value.retry_at_ms == 10_000 + WINDOW_MARGIN_MS


async def test_the_venues_own_order_counts_win_when_they_are_higher():
    made = order_budget(ManualClock(0))
    made.observe_orders({10_000: 4, 60_000: 4}, asked_ms=0)
    with pytest.raises(VenueThrottled):
        await made.take_order()


async def test_what_takes_risk_away_is_sent_during_a_silence_but_not_during_a_ban():
    made = order_budget(ManualClock(0))
    made.silence_until(30_000, banned=False)
    with pytest.raises(VenueThrottled):
        await made.take_order()
    await made.take_order(urgent=True)
    await made.take(0, priority=True, urgent=True)
    made.silence_until(40_000, banned=True)
    with pytest.raises(VenueThrottled):
        await made.take_order(urgent=True)


async def test_a_short_silence_is_waited_out_by_reads_and_refuses_orders_at_once():
    clock = ManualClock(0)
    made = budget(clock)
    made.silence_until(30_000)
    read = asyncio.create_task(made.take(1))
    assert await waits(read)
    with pytest.raises(VenueThrottled) as raised:
        await made.take_order()
    assert raised.value.retry_at_ms == 30_000
    clock.advance_to(30_000)
    await read


async def test_a_long_ban_is_told_instead_of_waited_out():
    made = budget(ManualClock(0))
    made.silence_until(3_600_000)
    with pytest.raises(VenueThrottled):
        await made.take(1)
