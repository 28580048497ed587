"""The candle feed: keeps the store's series complete, by stream while it can and by REST where it must.

The 5m stream is the only one that is subscribed; its closed candles are appended and rolled up to 15m and
1h. What the stream leaves out (a missed close, a reconnect, a value that contradicts the store) goes to the
repair queue, and REST has the last word. A forming candle is never taken for a closed one.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager

import structlog

from service.errors import RequestRejected, VenueError, VenueMalformed, VenueUnavailable
from service.market.backfill import Backfill, Request
from service.market.candles import CandleStore, CandleStoreFull, candle_problem
from service.market.freshness import allowance_ms, is_fresh, newest_closed_ms
from service.market.rollup import (
    BASE_MS,
    BASE_TIMEFRAME,
    ROLLED_TIMEFRAMES,
    bucket_open_ms,
    completes,
    roll_up,
)
from service.ports import CandleRow, Clock, MarketData, Recorder
from service.records import TIMEFRAME_MS, CandleUpdate
from service.settings import MarketSettings

FALLEN_BEHIND_MS = 3_600_000  # without a candle for so long, the store is not asked alone
MAX_REQUEST_CANDLES = 1_500  # the venue's own limit
REPAIRERS = 4

log = structlog.get_logger("market.feed")

Series = tuple[str, str]  # symbol, timeframe


class RepairQueue:
    """Series to be repaired, each at most once, so never more than there are series.

    A series under repair that is asked for again waits until its repair is done.
    """

    def __init__(self) -> None:
        self._waiting: dict[Series, int] = {}
        self._in_work: set[Series] = set()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, symbol: str, timeframe: str, from_ms: int = 0) -> bool:
        """Ask for a repair, again from `from_ms` when it is set. True when it was not waiting yet."""
        series = (symbol, timeframe)
        known = self._waiting.get(series)
        asked = [ms for ms in (known, from_ms) if ms]
        self._waiting[series] = min(asked, default=0)
        self._idle.clear()
        self._changed.set()
        return known is None

    async def take(self) -> tuple[Series, int]:
        """The next series and from when; call `done` with it afterwards."""
        while True:
            for series, from_ms in self._waiting.items():
                if series not in self._in_work:
                    del self._waiting[series]
                    self._in_work.add(series)
                    return series, from_ms
            self._changed.clear()
            await self._changed.wait()

    def done(self, series: Series) -> None:
        self._in_work.discard(series)
        self._changed.set()
        if not self._waiting and not self._in_work:
            self._idle.set()

    def forget(self, symbols: Iterable[str]) -> None:
        gone = set(symbols)
        self._waiting = {s: ms for s, ms in self._waiting.items() if s[0] not in gone}
        if not self._waiting and not self._in_work:
            self._idle.set()

    async def settled(self) -> None:
        """Wait until nothing waits and nothing is in work."""
        await self._idle.wait()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_work)


class CandleFeed:
    """The market's candles, kept current. One stream, a few repairers; all of them live in `running`.

    `on_price(symbol, price, event_ms)` is called for every newer price, from the stream's callback:
    it must return at once.
    """

    def __init__(
        self,
        market: MarketData,
        store: CandleStore,
        clock: Clock,
        settings: MarketSettings,
        recorder: Recorder | None = None,
    ) -> None:
        self.on_price: Callable[[str, float, int], None] | None = None
        self._market = market
        self._store = store
        self._clock = clock
        self._settings = settings
        self._recorder = recorder
        self._counts: Counter[str] = Counter()
        self._backfill = Backfill(market, store, clock, self._counts, recorder)
        self._repairs = RepairQueue()
        self._rows: dict[str, int] = {}
        self._prices: dict[str, tuple[float, int]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._streamed: frozenset[str] = frozenset()
        self._stop_stream: asyncio.Event | None = None

    # -- which symbols

    async def bootstrap(
        self, symbols: Sequence[str], on_progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Follow these symbols and fetch what each of their series lacks; returns how many series failed.

        `on_progress(done, total)` counts series. A series that fails after its retries is left to the
        repairs and does not disturb the others. Raises VenueRestricted and VenueCredentials, in a group.
        """
        started = self._clock.monotonic_s()
        self._follow(symbols)
        failed = await self._fill([s for s in symbols if s in self._rows], on_progress)
        if self._recorder is not None:
            self._recorder.record("market.bootstrap", self._clock.monotonic_s() - started)
        return failed

    async def set_symbols(self, symbols: Sequence[str]) -> None:
        """Follow exactly these from now on: new ones are fetched and streamed, others leave the store.

        Rows of the store may change their symbol: call it between two cycles. Raises VenueUnavailable
        when the new stream cannot be opened; the old one then goes on, and the next call tries again.
        """
        added = self._follow(symbols)
        await self._fill(added, None)
        if self._tasks is not None and self._streamed != frozenset(self._rows):
            await self._switch_stream()
            self._queue_all(added)

    @asynccontextmanager
    async def running(self, symbols: Sequence[str]) -> AsyncIterator[None]:
        """Stream and repair while the block runs. Errors leave it in a group, as a TaskGroup has it."""
        self._follow(symbols)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            repairers = [
                tasks.create_task(self._repair_forever(), name=f"market.repair.{n}") for n in range(REPAIRERS)
            ]
            try:
                await self._switch_stream()
                self._queue_all(self._rows)  # what closed between the bootstrap and the stream's start
                yield
            finally:
                self._tasks = None
                self._streamed = frozenset()
                if self._stop_stream is not None:
                    self._stop_stream.set()
                    self._stop_stream = None
                for repairer in repairers:
                    repairer.cancel()

    def _follow(self, symbols: Sequence[str]) -> list[str]:
        """Give each symbol its row and free the rows of all others; returns the symbols that are new."""
        wanted = dict.fromkeys(symbols)
        gone = [symbol for _, symbol in self._store.symbols() if symbol not in wanted]
        for symbol in gone:
            self._store.remove_symbol(symbol)
            self._prices.pop(symbol, None)
        self._repairs.forget(gone)
        before, self._rows = self._rows, {}
        for symbol in wanted:
            try:
                self._rows[symbol] = self._store.add_symbol(symbol)
            except (CandleStoreFull, ValueError) as error:
                self._counts["without_row"] += 1
                log.warning("symbol cannot be followed", symbol=symbol, reason=str(error))
        return [symbol for symbol in self._rows if symbol not in before]

    async def _fill(self, symbols: Sequence[str], on_progress: Callable[[int, int], None] | None) -> int:
        """Bring every series of the symbols up to date; the shortest timeframe last, it ages fastest."""
        timeframes = sorted(self._store.timeframes, key=TIMEFRAME_MS.__getitem__, reverse=True)
        todo = [(symbol, timeframe) for timeframe in timeframes for symbol in symbols]
        progress = _Progress(len(todo), on_progress)
        series = iter(todo)
        async with asyncio.TaskGroup() as tasks:
            for number in range(min(self._settings.bootstrap_concurrency, len(todo))):
                tasks.create_task(self._fill_each(series, progress), name=f"market.fill.{number}")
        return progress.failed

    async def _fill_each(self, series: Iterator[Series], progress: "_Progress") -> None:
        for symbol, timeframe in series:  # shared with the other tasks: each series is taken once
            try:
                fetched = await self._backfill.fill(symbol, timeframe, whole=True)
                self._counts["fetched"] += fetched  # not in one statement: others count during the await
            except (VenueUnavailable, VenueMalformed, RequestRejected) as error:
                progress.failed += 1
                self._failed(symbol, timeframe, error)
            progress.step()

    # -- the stream

    async def _switch_stream(self) -> None:
        """Open a stream for the symbols followed now, then end the one before: nothing is missed."""
        assert self._tasks is not None
        symbols = tuple(self._rows)
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        stream = self._tasks.create_task(self._hold_stream(symbols, opened, stop), name="market.stream")
        try:
            await opened
        except asyncio.CancelledError:
            stream.cancel()  # nobody knows it yet, so nobody else would stop it
            raise
        if self._stop_stream is not None:
            self._stop_stream.set()
        self._stop_stream, self._streamed = stop, frozenset(symbols)

    async def _hold_stream(
        self, symbols: Sequence[str], opened: asyncio.Future[None], stop: asyncio.Event
    ) -> None:
        """A stream is entered and left in one task, so each has its own."""
        try:
            async with self._market.candle_stream(symbols, BASE_TIMEFRAME, self._on_candle, self._on_gap):
                if not opened.done():
                    opened.set_result(None)
                await stop.wait()
        except VenueError as error:
            if opened.done():
                raise
            opened.set_exception(error)

    def _on_gap(self, symbols: Sequence[str]) -> None:
        self._counts["gaps"] += len(symbols)
        self._queue_all(symbols)

    def _on_candle(self, update: CandleUpdate) -> None:
        self._counts["received"] += 1
        row = self._rows.get(update.symbol)
        if row is None or update.timeframe != BASE_TIMEFRAME:
            self._counts["ignored"] += 1
            return
        candle = (
            update.open_ms,
            update.open,
            update.high,
            update.low,
            update.close,
            update.volume,
        )
        if problem := candle_problem(candle, BASE_MS):
            self._on_malformed(update, problem)
            return
        if update.closed:
            self._on_closed(update.symbol, row, candle)
        elif not self._on_forming(update.symbol, row, candle):
            return
        self._on_newest_price(update)

    def _on_malformed(self, update: CandleUpdate, problem: str) -> None:
        self._counts["malformed"] += 1
        log.warning("malformed candle in the stream", symbol=update.symbol, reason=problem)
        if update.closed:
            self._repairs.put(update.symbol, BASE_TIMEFRAME)

    def _on_newest_price(self, update: CandleUpdate) -> None:
        known = self._prices.get(update.symbol)
        if known is not None and update.event_ms < known[1]:
            return
        self._prices[update.symbol] = (update.close, update.event_ms)
        if self.on_price is not None:
            self.on_price(update.symbol, update.close, update.event_ms)

    def _on_forming(self, symbol: str, row: int, candle: CandleRow) -> bool:
        """Keep a forming candle; False for one that is older than the newest closed candle."""
        last = self._store.last_open_ms(row, BASE_TIMEFRAME)
        if candle[0] <= last:
            self._counts["out_of_order"] += 1
            return False
        if candle[0] > last + BASE_MS and self._repairs.put(symbol, BASE_TIMEFRAME):
            self._counts["missed_closes"] += 1
        self._store.set_forming(row, BASE_TIMEFRAME, candle)
        return True

    def _on_closed(self, symbol: str, row: int, candle: CandleRow) -> None:
        open_ms = candle[0]
        last = self._store.last_open_ms(row, BASE_TIMEFRAME)
        if last and open_ms == last + BASE_MS:
            self._store.append(row, BASE_TIMEFRAME, [candle])
            self._counts["closed"] += 1
            self._roll(symbol, row, open_ms)
        elif open_ms > last:  # an empty series too: it needs its past, not one candle
            self._counts["gaps"] += 1
            self._repairs.put(symbol, BASE_TIMEFRAME)
        else:
            self._compare(symbol, row, candle)

    def _compare(self, symbol: str, row: int, candle: CandleRow) -> None:
        known = self._store.rows_since(row, BASE_TIMEFRAME, candle[0], 1)
        if not known or known[0][0] != candle[0]:
            self._counts["out_of_order"] += 1
        elif known[0] == candle:
            self._counts["duplicates"] += 1
        else:
            self._counts["conflicts"] += 1
            self._repairs.put(symbol, BASE_TIMEFRAME, candle[0])

    def _roll(self, symbol: str, row: int, open_ms: int) -> None:
        """Append the longer candles that the 5m candle at `open_ms` completes."""
        for timeframe in ROLLED_TIMEFRAMES:
            if not completes(open_ms, timeframe):
                continue
            bucket, step = bucket_open_ms(open_ms, timeframe), TIMEFRAME_MS[timeframe]
            last = self._store.last_open_ms(row, timeframe)
            if bucket <= last:
                continue
            parts = self._store.rows_since(row, BASE_TIMEFRAME, bucket, step // BASE_MS)
            rolled = roll_up(parts, timeframe)
            if rolled is None or not last or bucket != last + step:
                self._repairs.put(symbol, timeframe)
                continue
            self._store.append(row, timeframe, [rolled])
            self._counts["rolled_up"] += 1

    # -- repairs

    async def settled(self) -> None:
        """Wait until no repair waits or runs; only inside `running` does any run."""
        await self._repairs.settled()

    def _queue_all(self, symbols: Iterable[str]) -> None:
        for timeframe in (BASE_TIMEFRAME, *ROLLED_TIMEFRAMES):
            for symbol in symbols:
                if symbol in self._rows:
                    self._repairs.put(symbol, timeframe)

    async def _repair_forever(self) -> None:
        while True:
            series, from_ms = await self._repairs.take()
            try:
                await self._repair(*series, from_ms)
            except VenueError as error:  # stale until the next cycle asks again
                self._failed(*series, error)
            finally:
                self._repairs.done(series)

    async def _repair(self, symbol: str, timeframe: str, from_ms: int) -> None:
        row = self._rows.get(symbol)
        if row is None:
            return
        before = self._store.last_open_ms(row, timeframe)
        corrected = self._store.corrected
        added = await self._backfill.fill(symbol, timeframe, from_ms=from_ms)
        self._counts["repaired"] += added
        if timeframe != BASE_TIMEFRAME or self._rows.get(symbol) != row:
            return
        if from_ms and self._store.corrected != corrected:
            for longer in ROLLED_TIMEFRAMES:
                self._repairs.put(symbol, longer, bucket_open_ms(from_ms, longer))
        if before and added:
            for candle in self._store.rows_since(row, BASE_TIMEFRAME, before + 1):
                self._roll(symbol, row, candle[0])

    def _failed(self, symbol: str, timeframe: str, error: VenueError) -> None:
        self._counts["failed"] += 1
        log.warning("candles not fetched", symbol=symbol, timeframe=timeframe, reason=str(error))

    # -- what others read

    def fresh_symbols(self, now_ms: int) -> tuple[list[tuple[int, str]], list[str]]:
        """(row, symbol) of those whose series all end with the candle they should, and the stale others.

        How late a candle may be is told by `freshness.allowance_ms`. Stale series are counted and
        queued for repair, so each call also keeps the repairs going.
        """
        late = allowance_ms(self._settings.stale_after_s, self._clock.speed)
        fresh: list[tuple[int, str]] = []
        stale: list[str] = []
        for symbol, row in self._rows.items():
            behind = [
                timeframe
                for timeframe in self._store.timeframes
                if not is_fresh(
                    self._store.last_open_ms(row, timeframe), timeframe, now_ms=now_ms, allowance_ms=late
                )
            ]
            for timeframe in behind:
                self._repairs.put(symbol, timeframe)
            if behind:
                stale.append(symbol)
            else:
                fresh.append((row, symbol))
        self._counts["stale"] += len(stale)
        return fresh, stale

    def awaits_close(self, now_ms: int) -> bool:
        """Whether a series that was current lacks only the candle that closed last."""
        before = newest_closed_ms(now_ms, BASE_TIMEFRAME) - BASE_MS
        return any(self._store.last_open_ms(row, BASE_TIMEFRAME) == before for row in self._rows.values())

    def last_price(self, symbol: str) -> float | None:
        """The newest price the stream has told, of a forming candle too; None before the first."""
        known = self._prices.get(symbol)
        return known[0] if known is not None else None

    def closes(self, symbol: str, since_ms: int) -> list[CandleRow]:
        """Closed 5m candles in the store that open at `since_ms` or later, oldest first."""
        row = self._rows.get(symbol)
        return [] if row is None else self._store.rows_since(row, BASE_TIMEFRAME, since_ms)

    async def candles_since(self, symbol: str, since_ms: int) -> list[CandleRow]:
        """As `closes`, by REST where the store does not reach back that far, fell behind or lacks the symbol.

        At most the 1,500 oldest of them; a candle the venue lacks is left out. Raises VenueUnavailable,
        VenueMalformed and RequestRejected.
        """
        start = -(-since_ms // BASE_MS) * BASE_MS
        row = self._rows.get(symbol)
        if row is not None and 0 < self._store.first_open_ms(row, BASE_TIMEFRAME) <= start:
            kept = self._store.rows_since(row, BASE_TIMEFRAME, start)
            if kept or self._clock.now_ms() - start < FALLEN_BEHIND_MS:
                return kept
        wanted = (newest_closed_ms(self._clock.now_ms(), BASE_TIMEFRAME) - start) // BASE_MS + 1
        if wanted <= 0:
            return []
        request = Request(start, min(wanted, MAX_REQUEST_CANDLES))
        return await self._backfill.fetch(symbol, BASE_TIMEFRAME, request)

    def statistics(self) -> dict[str, int]:
        """Counts since the start, plus `symbols` and the repair queue's `depth` now."""
        names = ("received", "closed", "repaired", "gaps", "stale", "malformed", "requests", "failed")
        return {
            **dict.fromkeys(names, 0),
            **self._counts,
            "corrected": self._store.corrected,
            "symbols": len(self._rows),
            "depth": len(self._repairs),
        }


class _Progress:
    """Counts the series of one bootstrap."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.failed = 0
        self._done = 0
        self._total = total
        self._report = report

    def step(self) -> None:
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)
