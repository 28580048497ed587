"""Settled funding rates, known up to the present hour and kept as long as somebody needs them.

Funding is settled on whole hours (every 8, 4 or 1, by symbol and changing over time), so one request an
hour tells all symbols' settlements.
"""

from collections.abc import Callable, Mapping

from service.market.rollup import BASE_MS
from service.ports import Clock, MarketData
from service.records import FundingRate

HOUR_MS = 3_600_000
PUBLISHED_AFTER_MS = 60_000
"""The venue lists a settlement some seconds after the hour."""

_NONE: Mapping[int, FundingRate] = {}


class FundingHistory:
    """What was settled since the oldest time asked for. `catch_up` asks, the rest only looks."""

    def __init__(self, market: MarketData, clock: Clock) -> None:
        self._market = market
        self._clock = clock
        self._rates: dict[str, dict[int, FundingRate]] = {}
        self.known_until_ms = 0
        """Every settlement before this time is known; 0 before the first `catch_up`."""

    async def catch_up(self, since_ms: Callable[[], int]) -> bool:
        """Ask for what was settled since the last time, or at first since `since_ms()`.

        False when no hour has passed, so that nothing can have been settled.

        Raises VenueUnavailable, VenueMalformed and the like: nothing is known beyond `known_until_ms` then.
        """
        start_ms = self.known_until_ms or since_ms() // HOUR_MS * HOUR_MS
        published_ms = self._clock.now_ms() - PUBLISHED_AFTER_MS
        if published_ms < start_ms:
            self.known_until_ms = start_ms
            return False
        for rate in await self._market.funding_rates(start_ms, published_ms):
            self._rates.setdefault(rate.symbol, {})[rate.at_ms - rate.at_ms % BASE_MS] = rate
        self.known_until_ms = published_ms - published_ms % HOUR_MS + HOUR_MS
        return True

    def of(self, symbol: str) -> Mapping[int, FundingRate]:
        """Settlements of a symbol by the open time of the 5m candle they fall into."""
        return self._rates.get(symbol, _NONE)

    def forget_before(self, at_ms: int) -> None:
        """Drop what nobody needs any more."""
        for symbol, rates in list(self._rates.items()):
            for settled_ms in [ms for ms in rates if ms < at_ms]:
                del rates[settled_ms]
            if not rates:
                del self._rates[symbol]
