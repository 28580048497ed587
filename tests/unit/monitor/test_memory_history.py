"""A month of memory in bounded space: minutes for an hour, hours for 31 days."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.monitor.memory_history import HOURS, MINUTES, MemoryHistory
from service.monitor.sizes import held_bytes


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_a_minute_keeps_its_lowest_mean_and_highest(hand: Hand) -> None:
    history = MemoryHistory(hand)
    for value in (80.0, 90.0, 70.0):
        history.add(value)
        hand.now_s += 5
    hand.now_s += 60
    history.add(100.0)
    assert history.minutes() == [(15.0, 70.0, 80.0, 90.0), (0.0, 100.0, 100.0, 100.0)]
    assert history.hours() == [(0.0, 70.0, 85.0, 100.0)]


def test_a_minute_without_a_sample_has_no_point(hand: Hand) -> None:
    history = MemoryHistory(hand)
    history.add(80.0)
    hand.now_s += 600
    history.add(81.0)
    assert [point.mean for point in history.minutes()] == [80.0, 81.0]
    hand.now_s += 58 * 60
    history.add(82.0)
    assert [point.mean for point in history.minutes()] == [81.0, 82.0], "what is older than an hour is gone"


def test_nothing_is_known_before_the_first_sample(hand: Hand) -> None:
    assert (MemoryHistory(hand).minutes(), MemoryHistory(hand).hours()) == ([], [])


def test_two_months_fill_an_hour_of_minutes_and_a_month_of_hours_in_the_same_space(hand: Hand) -> None:
    history = MemoryHistory(hand)
    history.add(70.0)
    empty = held_bytes(history)
    for _ in range(62 * 24 * 60):
        history.add(80.0)
        hand.now_s += 60
    assert (len(history.minutes()), len(history.hours())) == (MINUTES, HOURS)
    assert history.hours()[0].age_s == pytest.approx((HOURS - 1) * 3_600, abs=3_600)
    assert held_bytes(history) <= empty + 200
    assert held_bytes(history) < 12_000


@given(st.lists(st.tuples(st.floats(1, 1e4, width=32), st.floats(0, 5_000)), min_size=1, max_size=60))
def test_lowest_mean_and_highest_are_ordered_whatever_comes(samples: list[tuple[float, float]]) -> None:
    hand = Hand()
    history = MemoryHistory(hand)
    for value, wait_s in samples:
        hand.now_s += wait_s
        history.add(value)
    for point in (*history.minutes(), *history.hours()):
        assert point.low <= point.mean * 1.001
        assert point.mean <= point.high * 1.001
    assert history.minutes()[-1].low <= samples[-1][0] <= history.minutes()[-1].high
