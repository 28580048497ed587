"""Shows the shadow positions what happened: candles, settled funding, and 1m candles where 5m cannot tell.

A shadow moves only over candles whose funding is known. What the venue does not give now is asked for again
in the next cycle, so an outage delays an outcome and never loses it. Only where the venue answers that a
symbol has no candles since do its old shadows end.
"""

import asyncio

import structlog

from service.errors import RequestRejected, VenueError
from service.market.feed import CandleFeed
from service.market.funding import FundingHistory
from service.ports import CandleRow, MarketData, Recorder
from service.trading.outcomes import CANDLE_MS
from service.trading.shadow import ShadowBook

MINUTES = 5
READ_AGAIN_A_CYCLE = 50
"""5m candles read in 1m candles in one cycle, at weight 1 each; in a crash the rest waits for the next."""

log = structlog.get_logger("trading.shadow")


class ShadowFollower:
    """Moves the book's shadows on, once a cycle."""

    def __init__(
        self,
        shadows: ShadowBook,
        feed: CandleFeed,
        market: MarketData,
        funding: FundingHistory,
        recorder: Recorder,
    ) -> None:
        self._shadows = shadows
        self._feed = feed
        self._market = market
        self._funding = funding
        self._recorder = recorder
        self._ended: set[str] = set()  # the venue says of these, in this cycle, that no candle follows
        self._finer: dict[str, dict[int, list[CandleRow]]] = {}  # read for this cycle and the next update

    async def follow(self, now_ms: int) -> None:
        """Show each symbol's shadows the candles that closed since they were last looked at."""
        await self._know_funding(now_ms)
        self._ended.clear()
        for symbol in sorted(self._shadows.symbols()):
            await asyncio.sleep(0)  # a full book takes a while: others get their turn between two symbols
            await self._update(symbol, now_ms)
        for symbol in await self._read_again():
            await self._update(symbol, now_ms)
        self._shadows.expire(min(now_ms, self._funding.known_until_ms), sorted(self._ended))
        await self._shadows.flush()

    async def _know_funding(self, now_ms: int) -> None:
        try:
            if await self._funding.catch_up(lambda: self._shadows.oldest_ms() or now_ms):
                self._funding.forget_before(self._shadows.oldest_ms() or now_ms)
        except VenueError as error:
            self._recorder.count("shadows.without_funding")
            log.debug("funding not told, shadows wait", reason=str(error))

    async def _update(self, symbol: str, now_ms: int) -> None:
        since_ms = self._shadows.checked_ms(symbol)
        until_ms = min(now_ms, self._funding.known_until_ms)
        if since_ms + CANDLE_MS > until_ms:
            return  # nothing can have closed yet, or its funding is not known
        try:
            candles = await self._feed.candles_since(symbol, since_ms)
        except RequestRejected as error:
            log.debug("the venue has no candles of a shadow's symbol", symbol=symbol, reason=str(error))
            candles = []
        except VenueError as error:
            self._recorder.count("shadows.without_candles")
            log.debug("no candles for a shadow, trying again next cycle", symbol=symbol, reason=str(error))
            return
        if not candles:
            self._ended.add(symbol)
            self._finer.pop(symbol, None)
            return
        known = [candle for candle in candles if candle[0] + CANDLE_MS <= until_ms]
        self._shadows.update(
            symbol, known, funding=self._funding.of(symbol), finer=self._finer.pop(symbol, {})
        )

    async def _read_again(self) -> list[str]:
        """Fetch the 1m candles of 5m candles that touched both stop and target; returns their symbols."""
        for symbol, open_ms in self._shadows.take_undecided()[:READ_AGAIN_A_CYCLE]:
            try:
                minutes = await self._market.candles(symbol, "1m", limit=MINUTES, start_ms=open_ms)
            except RequestRejected:
                minutes = []  # the venue has none, and will have none: the stop counts
            except VenueError as error:
                log.debug("1m candles not told, asking again next cycle", symbol=symbol, reason=str(error))
                continue
            self._recorder.count("shadows.read_in_1m")
            within = [minute for minute in minutes if minute[0] < open_ms + CANDLE_MS]
            self._finer.setdefault(symbol, {})[open_ms] = within
        return sorted(self._finer)
