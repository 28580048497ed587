import pytest

from service.clock import ManualClock
from service.errors import VenueUnavailable
from service.market.funding import HOUR_MS, PUBLISHED_AFTER_MS, FundingHistory
from service.records import FundingRate


class Market:
    """Every symbol settles every hour; notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fails = False

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        if self.fails:
            raise VenueUnavailable("away")
        self.asked.append((start_ms, end_ms))
        first = -(-start_ms // HOUR_MS) * HOUR_MS
        return [
            FundingRate(symbol="AUSDT", at_ms=at_ms, rate=0.0001, mark_price=1.0)
            for at_ms in range(first, end_ms + 1, HOUR_MS)
        ]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(10 * HOUR_MS)


async def test_each_hour_is_asked_for_once(clock: ManualClock):
    market = Market()
    history = FundingHistory(market, clock)
    assert await history.catch_up(lambda: 7 * HOUR_MS + 5)
    assert market.asked == [(7 * HOUR_MS, 10 * HOUR_MS - PUBLISHED_AFTER_MS)]
    assert history.known_until_ms == 10 * HOUR_MS  # the settlement at 10:00 may not be listed yet
    assert not await history.catch_up(lambda: 0)
    clock.advance_to(10 * HOUR_MS + PUBLISHED_AFTER_MS)
    assert await history.catch_up(lambda: 0)
    assert history.known_until_ms == 11 * HOUR_MS
    assert sorted(history.of("AUSDT")) == [7 * HOUR_MS, 8 * HOUR_MS, 9 * HOUR_MS, 10 * HOUR_MS]


async def test_without_an_answer_nothing_more_is_known(clock: ManualClock):
    market = Market()
    history = FundingHistory(market, clock)
    await history.catch_up(lambda: 9 * HOUR_MS)
    known_ms = history.known_until_ms
    clock.advance_to(14 * HOUR_MS)
    market.fails = True
    with pytest.raises(VenueUnavailable):
        await history.catch_up(lambda: 0)
    assert history.known_until_ms == known_ms
    market.fails = False
    await history.catch_up(lambda: 0)
    assert sorted(history.of("AUSDT"))[-1] == 13 * HOUR_MS


async def test_what_nobody_needs_is_forgotten(clock: ManualClock):
    history = FundingHistory(Market(), clock)
    await history.catch_up(lambda: 5 * HOUR_MS)
    history.forget_before(8 * HOUR_MS)
    assert sorted(history.of("AUSDT")) == [8 * HOUR_MS, 9 * HOUR_MS]
    history.forget_before(100 * HOUR_MS)
    assert history.of("AUSDT") == {}
