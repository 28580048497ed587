"""Closed candles by REST: what a series lacks, cleaned, put into the store."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import structlog

from service.errors import VenueMalformed, VenueThrottled, VenueUnavailable
from service.market.candles import CandleStore, candle_problem
from service.market.freshness import newest_closed_ms
from service.ports import CandleRow, Clock, MarketData, Recorder
from service.records import TIMEFRAME_MS

ATTEMPTS = 3
FIRST_PAUSE_S = 1.0  # wall time; doubles with each attempt

log = structlog.get_logger("market.backfill")


class Request(NamedTuple):
    """Which candles to ask for."""

    start_ms: int
    limit: int


def missing(last_ms: int, *, newest_ms: int, step_ms: int, keep: int, from_ms: int = 0) -> Request | None:
    """What a series that ends at `last_ms` (0: is empty) lacks up to `newest_ms`; None for nothing.

    Never more than the `keep` newest. `from_ms` asks again for candles that are there already.
    """
    oldest = newest_ms - (keep - 1) * step_ms
    start = last_ms + step_ms if last_ms else oldest
    if from_ms:
        start = min(start, from_ms)
    start = max(start, oldest)
    limit = (newest_ms - start) // step_ms + 1
    return Request(start, limit) if limit > 0 else None


def cleaned(rows: Iterable[CandleRow], *, step_ms: int, newest_ms: int) -> tuple[list[CandleRow], int]:
    """Closed candles by time, each once (the later one of two counts), and how many were malformed."""
    sound: dict[int, CandleRow] = {}
    malformed = 0
    for row in rows:
        if candle_problem(row, step_ms):
            malformed += 1
        elif row[0] <= newest_ms:
            sound[row[0]] = row
    return [sound[open_ms] for open_ms in sorted(sound)], malformed


def newest_run(rows: Sequence[CandleRow], step_ms: int) -> Sequence[CandleRow]:
    """The newest candles that follow each other without a hole."""
    start = 0
    for index, (before, after) in enumerate(pairwise(rows), start=1):
        if after[0] - before[0] != step_ms:
            start = index
    return rows[start:]


class Backfill:
    """Brings one series at a time up to date; counts into the feed's counters."""

    def __init__(
        self,
        market: MarketData,
        store: CandleStore,
        clock: Clock,
        counts: Counter[str],
        recorder: Recorder | None,
    ) -> None:
        self._market = market
        self._store = store
        self._clock = clock
        self._counts = counts
        self._recorder = recorder

    async def fill(self, symbol: str, timeframe: str, *, from_ms: int = 0, whole: bool = False) -> int:
        """Fetch what the series lacks; no request when it lacks nothing. Returns how many were new.

        `from_ms` asks again from there; `whole` asks for the whole window when the series is short of it.
        An answer with a hole, or an unusable one, is asked for again, a few times with growing pauses;
        when the hole stays, the series starts again behind it.
        Raises: VenueUnavailable, VenueMalformed: no usable answer after the last attempt;
        RequestRejected, VenueRestricted, VenueCredentials: at once.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                added = await self._fill_once(
                    symbol, timeframe, from_ms, whole=whole, final=attempt == ATTEMPTS
                )
            except VenueThrottled as error:
                if attempt == ATTEMPTS:
                    raise
                await self._clock.sleep_until(error.retry_at_ms)
                continue
            except (VenueUnavailable, VenueMalformed):
                if attempt == ATTEMPTS:
                    raise
                added = None
            if added is not None:
                return added
            self._counts["retries"] += 1
            await self._clock.sleep_s(FIRST_PAUSE_S * 2 ** (attempt - 1) * self._clock.speed)
        raise AssertionError("the last attempt returns or raises")

    async def fetch(self, symbol: str, timeframe: str, request: Request) -> list[CandleRow]:
        """The candles of one request, cleaned. Raises what the market data raises."""
        started = self._clock.monotonic_s()
        self._counts["requests"] += 1
        answer = await self._market.candles(symbol, timeframe, limit=request.limit, start_ms=request.start_ms)
        if self._recorder is not None:
            self._recorder.record("market.fetch", self._clock.monotonic_s() - started)
        rows, malformed = cleaned(
            answer,
            step_ms=TIMEFRAME_MS[timeframe],
            newest_ms=newest_closed_ms(self._clock.now_ms(), timeframe),
        )
        if malformed:
            self._counts["malformed"] += malformed
            log.warning(
                "malformed candles from the venue", symbol=symbol, timeframe=timeframe, count=malformed
            )
        return rows

    async def _fill_once(
        self, symbol: str, timeframe: str, from_ms: int, *, whole: bool, final: bool
    ) -> int | None:
        """How many candles were new; None when the answer has a hole and may be asked for again."""
        request = self._request(symbol, timeframe, from_ms, whole=whole)
        if request is None:
            return 0
        rows = await self.fetch(symbol, timeframe, request)
        row = self._store.row_of(symbol)  # the symbol may have left the universe meanwhile
        if row is None or not rows:
            return 0
        step = TIMEFRAME_MS[timeframe]
        run = newest_run(rows, step)
        last = self._store.last_open_ms(row, timeframe)
        connects = not last or run[0][0] <= last + step
        beyond_reach = request.limit >= self._store.candles and run[0][0] == request.start_ms
        if not final and (len(run) < len(rows) or not (connects or beyond_reach)):
            return None
        return self._put(row, symbol, timeframe, run, connects=connects)

    def _request(self, symbol: str, timeframe: str, from_ms: int, *, whole: bool) -> Request | None:
        row = self._store.row_of(symbol)
        if row is None:
            return None
        step, keep = TIMEFRAME_MS[timeframe], self._store.candles
        newest = newest_closed_ms(self._clock.now_ms(), timeframe)
        if whole and self._store.count(row, timeframe) < keep:
            from_ms = newest - (keep - 1) * step
        last = self._store.last_open_ms(row, timeframe)
        return missing(last, newest_ms=newest, step_ms=step, keep=keep, from_ms=from_ms)

    def _put(self, row: int, symbol: str, timeframe: str, run: Sequence[CandleRow], *, connects: bool) -> int:
        store = self._store
        held, first, last = (
            store.count(row, timeframe),
            store.first_open_ms(row, timeframe),
            store.last_open_ms(row, timeframe),
        )
        reaches_further_back = bool(held) and run[0][0] < first and run[-1][0] >= last
        if connects and not reaches_further_back:
            return store.append(row, timeframe, run)
        if not connects and self._store.candles > len(run):
            self._counts["restarted"] += 1
            log.warning(
                "series starts again behind a hole", symbol=symbol, timeframe=timeframe, held=len(run)
            )
        return max(store.replace(row, timeframe, run) - (held if connects else 0), 0)
