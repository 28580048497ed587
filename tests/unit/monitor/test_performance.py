import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.clock import ManualClock
from service.monitor.performance import OTHER, PerformanceMonitor, Window, cache_use, percentile
from service.settings import MonitorSettings


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]))
def test_percentiles_are_those_of_numpy(values: list[float], fraction: float) -> None:
    expected = float(np.percentile(values, fraction * 100))
    assert percentile(sorted(values), fraction) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(0, 1e6), max_size=50), st.integers(1, 12))
def test_a_window_is_the_last_values_in_order(values: list[float], size: int) -> None:
    window = Window(size)
    for value in values:
        window.add(value)
    assert window.values() == values[-size:]
    assert len(window) == min(len(values), size)


def test_only_the_last_operations_are_kept_and_totals_for_ever() -> None:
    clock = ManualClock()
    monitor = PerformanceMonitor(MonitorSettings(operations=5, operations_per_kind=3), clock)
    for number in range(1, 11):
        monitor.record("cycle", float(number))
    clock.advance_to(2_000)

    percentiles = monitor.percentiles("cycle")
    assert percentiles is not None
    assert (percentiles.count, percentiles.p50, percentiles.last) == (3, 9.0, 10.0)
    assert monitor.recent() == [("cycle", float(number)) for number in range(6, 11)]
    total = monitor.totals()["cycle"]
    assert (total.count, total.seconds, total.longest_s, total.per_second) == (10, 55.0, 10.0, 5.0)
    assert total.mean_s == 5.5


def test_recent_operations_keep_their_kinds() -> None:
    monitor = PerformanceMonitor(MonitorSettings(), ManualClock())
    monitor.record("fetch", 1.0)
    monitor.record("analysis", 2.0)
    monitor.record("fetch", 3.0)
    assert monitor.recent() == [("fetch", 1.0), ("analysis", 2.0), ("fetch", 3.0)]


def test_a_kind_that_never_happened_has_no_percentiles() -> None:
    assert PerformanceMonitor(MonitorSettings(), ManualClock()).percentiles("cycle") is None


def test_an_operation_that_fails_is_timed_too() -> None:
    clock = ManualClock()
    monitor = PerformanceMonitor(MonitorSettings(), clock)

    def fail() -> None:
        with monitor.operation("fetch"):
            clock.advance_to(250)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert monitor.totals()["fetch"].seconds == 0.25


def test_counters_add_up() -> None:
    monitor = PerformanceMonitor(MonitorSettings(), ManualClock())
    monitor.count("stale")
    monitor.count("stale", 4)
    assert monitor.counters == {"stale": 5}


def test_names_made_of_data_do_not_make_it_grow() -> None:
    monitor = PerformanceMonitor(MonitorSettings(), ManualClock())
    for number in range(2_000):
        monitor.record(f"symbol {number}", 0.1)
        monitor.count(f"symbol {number}")
    assert len(monitor.totals()) <= 257
    assert len(monitor.counters) <= 257
    assert sum(total.count for total in monitor.totals().values()) == 2_000
    assert monitor.counters[OTHER] + len(monitor.counters) - 1 == 2_000
    assert len(monitor.recent()) == 500


def test_a_length_of_zero_keeps_every_operation() -> None:
    monitor = PerformanceMonitor(MonitorSettings(operations=10, operations_per_kind=0), ManualClock())
    for number in range(2_000):
        monitor.record("cycle", float(number))
    percentiles = monitor.percentiles("cycle")
    assert percentiles is not None
    assert (percentiles.count, percentiles.mean, percentiles.last) == (2_000, 999.5, 1_999.0)
    assert len(monitor.recent()) == 10


def test_caches_are_told_by_their_hits_and_misses() -> None:
    counters = {"features.memory_hits": 2, "features.tier_hits": 1, "features.misses": 1}
    counters |= {"analysis.reused": 4, "fills": 9, "empty.hits": 0}
    uses = cache_use(counters)
    assert {name: use.hit_fraction for name, use in uses.items()} == {
        "features": 0.75,
        "analysis results": 1.0,
    }


def test_the_slowest_of_the_last_operations_come_first() -> None:
    monitor = PerformanceMonitor(MonitorSettings(operations=3), ManualClock())
    for kind, seconds in (("forgotten", 9.0), ("fetch", 1.0), ("analysis", 3.0), ("fetch", 2.0)):
        monitor.record(kind, seconds)
    assert monitor.slowest(2) == [("analysis", 3.0), ("fetch", 2.0)]
    assert monitor.recent_count == 3
