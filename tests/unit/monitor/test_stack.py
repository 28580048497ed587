"""The stack that held the loop is noted while it is held."""

import asyncio
import threading
import time

from service.monitor.lag import LoopLag
from service.monitor.stack import HeldStack, frames


def block_the_loop(until: threading.Event) -> None:
    assert until.wait(20)


async def test_what_held_the_loop_is_named_once(monkeypatch) -> None:
    alarms: list[list[str]] = []
    lag = LoopLag(interval_s=0.005, alarm_ms=30.0, on_alarm=lambda lag_ms: alarms.append(held.take()))
    held = HeldStack(lag, alarm_ms=30.0)
    noted = threading.Event()
    monkeypatch.setattr("service.monitor.stack.frames", lambda frame: (frames(frame), noted.set())[0])
    sampling = asyncio.create_task(lag.run())
    with held.watching():
        async with asyncio.timeout(20):
            while not lag.statistics().samples:  # noqa: ASYNC110 - the sampler has no event for it
                await asyncio.sleep(0.001)
            noted.clear()
            block_the_loop(noted)
            time.sleep(0.05)  # noqa: ASYNC251 - beyond the alarm, whenever it was noted
            while not any(alarms):  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.001)
    sampling.cancel()
    await asyncio.wait({sampling})
    (stack,) = filter(None, alarms[:1])
    assert any("test_stack.py" in line and line.endswith(" block_the_loop") for line in stack), stack
    assert held.take() == []


async def test_the_thread_ends_with_the_block() -> None:
    held = HeldStack(LoopLag(), alarm_ms=100.0)
    with held.watching():
        assert "loop-stack" in {thread.name for thread in threading.enumerate()}
    assert "loop-stack" not in {thread.name for thread in threading.enumerate()}


async def test_no_beat_is_missed_while_nobody_samples() -> None:
    lag = LoopLag()
    assert lag.beat_s == 0.0
    sampling = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    assert lag.beat_s > 0.0
    sampling.cancel()
    await asyncio.wait({sampling})
    assert lag.beat_s == 0.0


def test_only_the_innermost_frames_are_kept() -> None:
    import sys

    def deep(depth: int) -> list[str]:
        return deep(depth - 1) if depth else frames(sys._getframe())

    found = deep(40)
    assert len(found) == 12
    assert found[-1].endswith("deep")
