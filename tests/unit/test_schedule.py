"""Slots of cycles on a clock that moves only when told."""

import asyncio

import pytest

from service.clock import ManualClock
from service.errors import CycleStalled
from service.schedule import Schedule
from service.settings import CycleSettings
from service.stopping import StopRequest
from tests.recorder import Recorder

MINUTE_MS = 60_000


class Stop(StopRequest):
    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    async def wait(self, seconds: float | None = None) -> bool:
        self._clock.advance_to(self._clock.now_ms() + round((seconds or 0.0) * 1000))
        return bool(self)


def schedule(clock: ManualClock, stop: StopRequest, **changes: object) -> tuple[Schedule, Recorder]:
    recorder = Recorder()
    options = {"cycles": 0, "end_ms": 0, "awaits_close": lambda now_ms: False} | changes
    return Schedule(CycleSettings(interval_s=60.0), clock, stop, recorder, **options), recorder


async def times(made: Schedule, clock: ManualClock, took_ms: list[int]) -> list[int]:
    found = []
    async for _ in made.slots():
        found.append(clock.now_ms())
        clock.advance_to(clock.now_ms() + took_ms[len(found) - 1])
    return found


async def test_the_first_cycle_runs_at_once_and_the_others_on_the_clocks_grid():
    clock = ManualClock(30_000)
    stop = Stop(clock)
    made, _ = schedule(clock, stop, cycles=3)
    assert await times(made, clock, [100, 100, 100]) == [30_000, MINUTE_MS, 2 * MINUTE_MS]
    assert stop.reason == "cycles done"


async def test_slots_that_a_long_cycle_covered_are_counted_and_never_stacked():
    clock = ManualClock(0)
    made, recorder = schedule(clock, Stop(clock), cycles=2)
    assert await times(made, clock, [150_000, 0]) == [0, 150_000]  # in the slot that began at 120,000
    assert recorder.counts["cycles.missed"] == 1


async def test_it_ends_with_the_market():
    clock = ManualClock(0)
    stop = Stop(clock)
    made, _ = schedule(clock, stop, end_ms=2 * MINUTE_MS)
    assert await times(made, clock, [0] * 9) == [0, MINUTE_MS]
    assert stop.reason == "market ended"


async def test_a_stop_ends_it_before_the_next_slot():
    clock = ManualClock(0)
    stop = Stop(clock)
    made, _ = schedule(clock, stop)
    found = []
    async for number in made.slots():
        found.append(number)
        stop.set("asked")
    assert found == [1]


async def test_candles_that_just_closed_are_waited_for_within_a_limit(monkeypatch):
    clock = ManualClock(0)
    asked = []

    async def sleep(seconds: float) -> None:
        clock.advance_to(clock.now_ms() + round(seconds * 1000))

    monkeypatch.setattr(asyncio, "sleep", sleep)

    def awaits(now_ms: int) -> bool:
        asked.append(now_ms)
        return True

    made, _ = schedule(clock, Stop(clock), cycles=1, awaits_close=awaits)
    assert await times(made, clock, [0]) == [3_000]
    assert len(asked) == 300


async def test_cycles_that_stop_finishing_end_the_process():
    clock = ManualClock(0)
    made, _ = schedule(clock, Stop(clock))
    clock.advance_to(299_000)
    made.sign_of_life()
    clock.advance_to(600_000)
    with pytest.raises(CycleStalled, match="no cycle has finished for 301 s"):
        await made.stalled()
