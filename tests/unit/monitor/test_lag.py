import asyncio
import time

import pytest

from service.monitor.lag import LoopLag


def test_before_the_first_sample_all_is_zero() -> None:
    lag = LoopLag().statistics()
    assert (lag.samples, lag.p50_ms, lag.p99_ms, lag.longest_ms) == (0, 0.0, 0.0, 0.0)


def test_the_longest_lag_outlives_the_window_and_early_timers_are_no_lag() -> None:
    lag = LoopLag(samples=3)
    for value in (90.0, 1.0, -0.5, 3.0):
        lag.add(value)
    statistics = lag.statistics()
    assert (statistics.samples, statistics.p50_ms, statistics.longest_ms) == (3, 1.0, 90.0)


def test_each_sample_beyond_the_alarm_is_told() -> None:
    alarms: list[float] = []
    lag = LoopLag(alarm_ms=100.0, on_alarm=alarms.append)
    for value in (99.0, 100.0, 101.0):
        lag.add(value)
    assert alarms == [101.0]


async def test_a_blocked_loop_shows_as_lag() -> None:
    blocked = asyncio.Event()
    lag = LoopLag(interval_s=0.001, alarm_ms=50.0, on_alarm=lambda lag_ms: blocked.set())
    sampling = asyncio.create_task(lag.run())
    async with asyncio.timeout(10):
        while lag.statistics().samples == 0:  # noqa: ASYNC110 - the sampler has no event for it
            await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251 - blocking the loop is what is measured
        await blocked.wait()
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert lag.statistics().longest_ms >= 50
