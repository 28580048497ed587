"""Which closed candle should exist, and how late it may be."""

import pytest

from service.market.freshness import allowance_ms, is_fresh, newest_closed_ms

FIVE = 300_000
NOON = 1_760_000_400_000 - 1_760_000_400_000 % 86_400_000 + 43_200_000


def test_the_newest_closed_candle_is_the_one_that_ended_last():
    assert newest_closed_ms(NOON, "5m") == NOON - FIVE
    assert newest_closed_ms(NOON - 1, "5m") == NOON - 2 * FIVE
    assert newest_closed_ms(NOON + FIVE - 1, "5m") == NOON - FIVE
    assert newest_closed_ms(NOON + 1, "1h") == NOON - 3_600_000


@pytest.mark.parametrize(
    ("last", "now", "fresh"),
    [
        (NOON - FIVE, NOON, True),
        (NOON - 2 * FIVE, NOON + 59_999, True),  # its successor may still be on its way
        (NOON - 2 * FIVE, NOON + 60_000, False),
        (NOON - 3 * FIVE, NOON, False),
        (0, NOON, False),
    ],
)
def test_a_series_is_stale_once_its_successor_is_overdue(last, now, fresh):
    assert is_fresh(last, "5m", now_ms=now, allowance_ms=allowance_ms(60.0, 1.0)) is fresh


def test_an_accelerated_market_allows_two_wall_seconds():
    assert allowance_ms(60.0, 1.0) == 60_000
    assert allowance_ms(60.0, 60.0) == 120_000
    assert allowance_ms(60.0, 600.0) == 1_200_000
