"""What a part holds is counted, what others hold is not."""

import sys
from array import array

import pytest

from service.clock import WallClock
from service.monitor.performance import PerformanceMonitor
from service.monitor.sizes import held_bytes
from service.settings import MonitorSettings


def test_containers_count_with_what_is_in_them() -> None:
    text = "x" * 1_000
    assert held_bytes([text]) == sys.getsizeof([text]) + sys.getsizeof(text)


def test_what_is_shared_counts_once() -> None:
    text = "x" * 1_000
    assert held_bytes([text, text]) - held_bytes([text]) < 100


def test_a_cycle_ends() -> None:
    holder: list[object] = []
    holder.append(holder)
    assert held_bytes(holder) == sys.getsizeof(holder)


def test_a_long_container_is_counted_by_its_beginning() -> None:
    values = [bytes([index % 256]) * 500 for index in range(10_000)]
    exact = sys.getsizeof(values) + sum(map(sys.getsizeof, values))
    assert held_bytes(values) == pytest.approx(exact, rel=0.01)


def test_helpers_of_the_same_module_belong_to_the_part_and_others_do_not() -> None:
    settings = MonitorSettings(operations=500, operations_per_kind=100)
    monitor = PerformanceMonitor(settings, WallClock())
    empty = held_bytes(monitor)
    for number in range(1_000):
        monitor.record(f"kind {number % 10}", 0.1)
    grown = held_bytes(monitor) - empty
    assert grown > 10 * 100 * 8 + 2 * 500 * 8
    assert held_bytes([monitor]) < 200, "a list does not own a part"


def test_numbers_in_an_array_count() -> None:
    assert held_bytes(array("d", [0.0] * 1_000)) > 8_000
