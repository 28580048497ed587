"""What a cycle measures."""

from types import SimpleNamespace
from typing import cast

import pytest

from service.clock import ManualClock
from service.cycle import CLOSE_TO_SIGNAL, Parts, time_to_signal
from service.gauges import delay_gauges
from service.monitor.performance import PerformanceMonitor
from service.settings import MonitorSettings
from tests.samples import signal


def test_the_delay_to_a_signal_is_one_sample_a_cycle_however_many_signals_it_has() -> None:
    clock = ManualClock()
    monitor = PerformanceMonitor(MonitorSettings(operations_per_kind=100), clock)
    parts = cast(Parts, SimpleNamespace(clock=clock, monitor=monitor, first_ms=1))
    for delay_ms in (4_000, 1_000, 2_000):
        close_ms = clock.now_ms() + 10_000
        clock.advance_to(close_ms + delay_ms)
        new = [signal(f"S{n}", close_ms=close_ms) for n in range(105)]
        new.append(signal("later", close_ms=close_ms + 500))
        assert time_to_signal(parts, [*new, signal("before the first cycle")]) == delay_ms / 1000
    assert time_to_signal(parts, []) is None

    found = monitor.percentiles(CLOSE_TO_SIGNAL)
    assert found is not None
    assert (found.count, found.p50, found.last) == (3, 2.0, 2.0)
    assert found.p95 == pytest.approx(3.8)
    assert monitor.slowest(2) == [(CLOSE_TO_SIGNAL, 4.0), (CLOSE_TO_SIGNAL, 2.0)]
    gauges = delay_gauges(monitor)
    assert gauges["perpd_close_to_signal_max_seconds"][1] == 4.0
    assert all("per cycle" in words for words, _ in gauges.values())
