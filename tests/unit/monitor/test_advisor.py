"""Advice is told when it changes, of the last minutes only, and seldom."""

from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from service.clock import ManualClock
from service.monitor.advisor import Advisor
from service.monitor.lag import LoopLag
from service.monitor.performance import PerformanceMonitor
from service.monitor.performance_command import lines
from service.settings import MonitorSettings


class Daemon:
    """An advisor with what it asks, looked at once a minute."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.monitor = PerformanceMonitor(MonitorSettings(), ManualClock())
        self.pool = SimpleNamespace(workers=2, replaced=0, lost=0)
        self.advisor = Advisor(
            self.monitor,
            LoopLag(),
            self.pool,
            interval_s=60.0,
            speed=1.0,
            lag_alarm_ms=100.0,
            cores=2.0,
            monotonic_s=lambda: self.now_s,
        )

    def minute(self, *, missed: int = 0) -> list[str]:
        """One cycle and one look; what was logged."""
        self.now_s += 60.0
        self.monitor.record("cycle", 0.1)
        if missed:
            self.monitor.count("cycles.missed", missed)
        with capture_logs() as logs:
            self.advisor.look()
        return [f"{entry['event']}: {entry['about']}" for entry in logs]


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


def test_advice_is_told_when_it_begins_and_when_it_no_longer_holds(daemon: Daemon) -> None:
    assert daemon.minute() == []
    assert daemon.minute(missed=3) == ["performance advice: cycle.overruns"]
    told = [daemon.minute() for _ in range(12)]
    assert [lines for lines in told if lines] == [["performance advice no longer holds: cycle.overruns"]]
    assert told[8] or told[9] or told[10], "ten minutes later it is forgotten"


def test_advice_that_comes_back_is_told_once_an_hour(daemon: Daemon) -> None:
    begun = 0
    for minute in range(180):
        lines = daemon.minute(missed=3 if minute % 20 == 0 else 0)
        begun += lines == ["performance advice: cycle.overruns"]
    assert begun == 3


def test_replaced_and_lost_workers_count(daemon: Daemon) -> None:
    daemon.pool.replaced = 2
    daemon.pool.lost = 1
    assert daemon.minute() == ["performance advice: workers.replaced"]


async def test_the_answer_has_operations_caches_shares_and_advice(daemon: Daemon) -> None:
    daemon.monitor.record("analysis", 0.062)
    daemon.monitor.count("analysis.reused", 150)
    daemon.monitor.count("analysis.analysed", 50)
    daemon.minute(missed=3)
    daemon.advisor.held = ["trading/shadow.py:70 update"]
    answer = await daemon.advisor.answer({})
    assert answer["operations"]["cycle"]["p95_s"] == 0.1
    assert answer["cycle_shares"] == {"analysis": pytest.approx(0.62)}
    assert answer["caches"]["analysis results"] == {"hits": 150, "misses": 50, "hit_fraction": 0.75}
    assert answer["advice"][0]["about"] == "cycle.overruns"
    assert answer["loop_held_at"] == ["trading/shadow.py:70 update"]


async def test_the_slowest_of_the_last_operations_are_shown_one_by_one(daemon: Daemon) -> None:
    for number in range(1, 13):
        daemon.monitor.record("archive.flush", number / 1000)
    answer = await daemon.advisor.answer({})
    assert [one["seconds"] for one in answer["slowest_recent"]] == [n / 1000 for n in range(12, 2, -1)]
    shown = list(lines(answer))
    start = shown.index("slowest of the last 12 operations, ms")
    assert [line.split() for line in shown[start + 1 : start + 3]] == [
        ["archive.flush", "12.00"],
        ["archive.flush", "11.00"],
    ]
