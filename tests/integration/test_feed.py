"""The candle feed over an in-memory venue: bootstrap, stream, gaps, repairs, restarts, bad answers."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from service.clock import ManualClock
from service.errors import (
    RequestRejected,
    VenueMalformed,
    VenueRestricted,
    VenueThrottled,
    VenueUnavailable,
)
from service.market.candles import CandleStore
from service.market.feed import CandleFeed, RepairQueue
from service.market.rollup import roll_up
from service.records import TIMEFRAME_MS, CandleUpdate
from service.settings import MarketSettings

STEP = TIMEFRAME_MS["5m"]
HOUR = TIMEFRAME_MS["1h"]
NOON = 20_371 * 86_400_000 + 12 * HOUR
KEPT = 120
SYMBOLS = ["BTCUSDT", "ETHUSDT", "币安人生USDT"]


class SkippingClock(ManualClock):
    """Sleeping moves time on at once; `slept` tells how often and until when."""

    def __init__(self, now_ms: int) -> None:
        super().__init__(now_ms)
        self.slept: list[int] = []

    async def sleep_until(self, at_ms: int) -> None:
        self.slept.append(at_ms)
        self.advance_to(at_ms)
        await asyncio.sleep(0)


def five_minutes(symbol: str, open_ms: int):
    """The venue's candle: any number will do, as long as each is its own."""
    number = open_ms // STEP
    base = 100.0 + len(symbol) + number % 50
    return (open_ms, base, base + 2.0, base - 1.0, base + 1.0, 0.1 + number % 7)


class InMemoryMarket:
    """Public data of a venue that lists everything since `listed_ms`; faults are put in by the tests."""

    def __init__(self, clock: ManualClock, listed_ms: int = 0) -> None:
        self.clock = clock
        self.listed_ms = listed_ms
        self.requests: list[tuple[str, str, int, int]] = []
        self.faults: list[Exception] = []  # raised by the next reads, one each
        self.broken: dict[str, Exception] = {}  # by symbol, raised by every read
        self.distort = lambda symbol, timeframe, rows: rows
        self.streams: list[tuple[str, ...]] = []
        self.stream_ended = asyncio.Event()
        self.stream_fault: Exception | None = None
        self._callbacks = []
        self.in_flight = 0
        self.most_in_flight = 0

    def candle(self, symbol: str, timeframe: str, open_ms: int):
        parts = range(open_ms, open_ms + TIMEFRAME_MS[timeframe], STEP)
        rows = [five_minutes(symbol, part) for part in parts]
        return rows[0] if timeframe == "5m" else roll_up(rows, timeframe)

    async def candles(self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None):
        self.requests.append((symbol, timeframe, limit, start_ms))
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        if self.faults:
            raise self.faults.pop(0)
        if symbol in self.broken:
            raise self.broken[symbol]
        step = TIMEFRAME_MS[timeframe]
        closed = self.clock.now_ms() - self.clock.now_ms() % step
        first = max(start_ms, -(-self.listed_ms // step) * step)
        opens = range(first, min(first + limit * step, closed), step)
        return self.distort(symbol, timeframe, [self.candle(symbol, timeframe, ms) for ms in opens])

    @asynccontextmanager
    async def candle_stream(self, symbols, timeframe, on_candle, on_gap):
        if self.stream_fault is not None:
            raise self.stream_fault
        assert timeframe == "5m"
        self.streams.append(tuple(symbols))
        self._callbacks.append((set(symbols), on_candle, on_gap))
        try:
            yield
        finally:
            self.streams.remove(tuple(symbols))
            self.stream_ended.set()
            self._callbacks = [c for c in self._callbacks if c[0] != set(symbols)]

    def send(self, symbol: str, row, *, closed: bool, event_ms: int | None = None, timeframe: str = "5m"):
        open_ms, open_, high, low, close, volume = row
        update = CandleUpdate(
            symbol=symbol,
            timeframe=timeframe,
            open_ms=open_ms,
            open=open_,
            high=high,
            low=low,
            close=close,
            volume=volume,
            closed=closed,
            event_ms=event_ms if event_ms is not None else self.clock.now_ms(),
        )
        for symbols, on_candle, _ in self._callbacks:
            if symbol in symbols:
                on_candle(update)

    def lose_connection(self) -> None:
        for symbols, _, on_gap in self._callbacks:
            on_gap(sorted(symbols))

    def close_candle(self, symbol: str, open_ms: int) -> None:
        self.clock.advance_to(open_ms + STEP)
        self.send(symbol, five_minutes(symbol, open_ms), closed=True)


class InMemoryRecorder:
    def __init__(self) -> None:
        self.operations: list[str] = []

    def record(self, operation: str, seconds: float) -> None:
        self.operations.append(operation)

    def count(self, name: str, amount: int = 1) -> None: ...


@pytest.fixture
def clock():
    return SkippingClock(NOON + 1_000)


@pytest.fixture
def market(clock):
    return InMemoryMarket(clock)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "candles.mmap"


@pytest.fixture
def store(path):
    opened = CandleStore.open(path, symbols_capacity=5, candles=KEPT)
    yield opened
    opened.close()


@pytest.fixture
def feed(market, store, clock):
    return CandleFeed(market, store, clock, MarketSettings(candles=KEPT, bootstrap_concurrency=4))


def assert_equals_the_venue(store, market, symbol, *, kept=KEPT):
    row = store.row_of(symbol)
    for timeframe in store.timeframes:
        step = TIMEFRAME_MS[timeframe]
        newest = market.clock.now_ms() // step * step - step
        expected = [market.candle(symbol, timeframe, newest - n * step) for n in range(kept - 1, -1, -1)]
        assert store.rows_since(row, timeframe, 0) == expected, timeframe


async def test_a_bootstrap_fetches_each_series_once_and_closed_candles_only(feed, market, store):
    progress = []
    assert await feed.bootstrap(SYMBOLS, lambda done, total: progress.append((done, total))) == 0
    for symbol in SYMBOLS:
        assert_equals_the_venue(store, market, symbol)
    assert len(market.requests) == 9
    assert {request[2] for request in market.requests} == {KEPT}
    assert progress == [(n, 9) for n in range(1, 10)]
    assert market.most_in_flight <= 4


async def test_a_restart_fetches_only_what_is_missing(feed, market, store, path, clock):
    await feed.bootstrap(SYMBOLS)
    store.close()
    market.requests.clear()
    clock.advance_to(NOON + 20 * 60_000)

    again = CandleStore.open(path, symbols_capacity=5, candles=KEPT)
    await CandleFeed(market, again, clock, MarketSettings(candles=KEPT)).bootstrap(SYMBOLS)
    assert sorted((r[1], r[2]) for r in market.requests) == [("15m", 1)] * 3 + [("5m", 4)] * 3
    for symbol in SYMBOLS:
        assert_equals_the_venue(again, market, symbol)
    market.requests.clear()
    await CandleFeed(market, again, clock, MarketSettings(candles=KEPT)).bootstrap(SYMBOLS)
    assert market.requests == []
    again.close()


async def test_a_restart_after_days_fetches_a_window_and_no_more(feed, market, store, clock):
    await feed.bootstrap(["BTCUSDT"])
    clock.advance_to(NOON + 30 * 86_400_000)
    market.requests.clear()
    await feed.bootstrap(["BTCUSDT"])
    assert [r[2] for r in market.requests] == [KEPT] * 3
    assert_equals_the_venue(store, market, "BTCUSDT")
    assert feed.statistics().get("restarted", 0) == 0


async def test_a_bootstrap_frees_the_rows_of_symbols_that_left(feed, store):
    await feed.bootstrap(["A", "B", "C", "D", "E"])
    await feed.bootstrap(["F", "G", "A"])
    assert {symbol for _, symbol in store.symbols()} == {"A", "F", "G"}
    assert feed.statistics()["symbols"] == 3


async def test_a_symbol_without_a_row_is_left_out_and_counted(feed):
    await feed.bootstrap([*"ABCDE", "ONE-TOO-MANY", "X" * 60])
    assert feed.statistics()["without_row"] == 2
    assert feed.statistics()["symbols"] == 5


async def test_a_young_symbol_has_the_candles_there_are(feed, market, store):
    market.listed_ms = NOON - 3 * HOUR
    assert await feed.bootstrap(["BTCUSDT"]) == 0
    row = store.row_of("BTCUSDT")
    assert [store.count(row, t) for t in ("5m", "15m", "1h")] == [36, 12, 3]
    assert feed.fresh_symbols(NOON + 1_000) == ([(row, "BTCUSDT")], [])


async def test_closed_candles_are_appended_and_rolled_up_as_the_venue_does(feed, market, store):
    await feed.bootstrap(SYMBOLS)
    market.requests.clear()
    async with feed.running(SYMBOLS):
        await feed.settled()
        for open_ms in range(NOON, NOON + 2 * HOUR, STEP):
            for symbol in SYMBOLS:
                market.close_candle(symbol, open_ms)
        for symbol in SYMBOLS:
            assert_equals_the_venue(store, market, symbol)
    assert market.requests == []
    assert feed.statistics()["closed"] == 24 * 3
    assert feed.statistics()["rolled_up"] == (8 + 2) * 3


async def test_what_closed_between_bootstrap_and_stream_is_fetched(feed, market, store, clock):
    await feed.bootstrap(SYMBOLS)
    clock.advance_to(NOON + HOUR)
    async with feed.running(SYMBOLS):
        await feed.settled()
        for symbol in SYMBOLS:
            assert_equals_the_venue(store, market, symbol)


@pytest.mark.parametrize("tells", ["next close", "next forming", "reconnect", "stale check"])
async def test_a_missed_close_is_repaired_however_it_is_noticed(feed, market, store, clock, tells):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        clock.advance_to(NOON + 4 * STEP)  # none of the three closes arrives
        if tells == "next close":
            market.send("BTCUSDT", five_minutes("BTCUSDT", NOON + 3 * STEP), closed=True)
        elif tells == "next forming":
            clock.advance_to(NOON + 4 * STEP + 500)
            market.send("BTCUSDT", five_minutes("BTCUSDT", NOON + 4 * STEP), closed=False)
        elif tells == "reconnect":
            market.lose_connection()
        else:
            clock.advance_to(NOON + 4 * STEP + 61_000)
            assert feed.fresh_symbols(clock.now_ms()) == ([], ["BTCUSDT"])
        await feed.settled()
        assert_equals_the_venue(store, market, "BTCUSDT")
        assert len(feed.fresh_symbols(clock.now_ms())[0]) == 1
    assert feed.statistics()["repaired"] >= 4


async def test_a_forming_candle_is_never_taken_for_a_closed_one(feed, market, store, clock):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        half_done = (NOON, 1.0, 1.0, 1.0, 1.0, 0.5)
        market.send("BTCUSDT", half_done, closed=False)
        assert store.forming(store.row_of("BTCUSDT"), "5m") == half_done
        clock.advance_to(NOON + STEP + 250)
        market.send("BTCUSDT", five_minutes("BTCUSDT", NOON + STEP), closed=False)
        await feed.settled()
        assert feed.closes("BTCUSDT", NOON) == [five_minutes("BTCUSDT", NOON)]
    assert feed.statistics()["missed_closes"] == 1


async def test_repeated_and_late_candles_change_nothing(feed, market, store):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        market.requests.clear()
        market.close_candle("BTCUSDT", NOON)
        market.send("BTCUSDT", five_minutes("BTCUSDT", NOON), closed=True)
        market.send("BTCUSDT", (NOON, 1.0, 1.0, 1.0, 1.0, 1.0), closed=False)
        ancient = NOON - (KEPT + 50) * STEP
        market.send("BTCUSDT", five_minutes("BTCUSDT", ancient), closed=True)
        market.send("BTCUSDT", (NOON, 1.0, 1.0, 1.0, 1.0, 1.0), closed=True, timeframe="1m")
        market.send("UNKNOWN", five_minutes("UNKNOWN", NOON), closed=True)
        await feed.settled()
        assert_equals_the_venue(store, market, "BTCUSDT")
    statistics = feed.statistics()
    assert (statistics["duplicates"], statistics["out_of_order"], statistics["ignored"]) == (1, 2, 1)
    assert market.requests == []


async def test_a_contradicting_close_is_settled_by_rest(feed, market, store):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        market.clock.advance_to(NOON + STEP)
        wrong = (NOON, 1.0, 2.0, 0.5, 1.5, 3.0)
        market.send("BTCUSDT", wrong, closed=True)
        assert feed.closes("BTCUSDT", NOON) == [wrong]
        for open_ms in (NOON + STEP, NOON + 2 * STEP):
            market.close_candle("BTCUSDT", open_ms)
        market.send("BTCUSDT", five_minutes("BTCUSDT", NOON), closed=True)
        await feed.settled()
        assert_equals_the_venue(store, market, "BTCUSDT")
    assert feed.statistics()["conflicts"] == 1
    assert feed.statistics()["corrected"] == 2  # the 5m candle and the 15m one made of it


@pytest.mark.parametrize(
    "bad",
    [
        (NOON, float("nan"), 2.0, 0.5, 1.0, 1.0),
        (NOON, 1.0, 0.5, 2.0, 1.0, 1.0),
        (NOON + 7, 1.0, 2.0, 0.5, 1.0, 1.0),
        (NOON, 1.0, 2.0, 0.5, 1.0, -1.0),
    ],
)
async def test_a_malformed_close_in_the_stream_is_fetched_instead(feed, market, store, clock, bad):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        clock.advance_to(NOON + STEP)
        market.send("BTCUSDT", bad, closed=True)
        await feed.settled()
        assert_equals_the_venue(store, market, "BTCUSDT")
    assert feed.statistics()["malformed"] == 1
    assert feed.last_price("BTCUSDT") is None


async def test_a_disordered_answer_is_put_in_order(feed, market, store):
    def distort(symbol, timeframe, rows):
        return [*rows[50:], *rows[:60], (rows[3][0] + 1, 1.0, 1.0, 1.0, 1.0, 1.0)]

    market.distort = distort
    assert await feed.bootstrap(["BTCUSDT"]) == 0
    assert_equals_the_venue(store, market, "BTCUSDT")
    assert feed.statistics()["malformed"] == 3


async def test_a_hole_that_closes_on_the_second_answer_leaves_no_trace(feed, market, store, clock):
    answers = []

    def distort(symbol, timeframe, rows):
        answers.append(timeframe)
        return [*rows[:70], *rows[71:]] if len(answers) == 1 else rows

    market.distort = distort
    assert await feed.bootstrap(["BTCUSDT"]) == 0
    assert_equals_the_venue(store, market, "BTCUSDT")
    assert len(clock.slept) == 1


async def test_behind_a_hole_that_stays_the_series_starts_again(feed, market, store):
    def distort(symbol, timeframe, rows):
        return [row for row in rows if not (timeframe == "5m" and row[0] == NOON - 10 * STEP)]

    market.distort = distort
    assert await feed.bootstrap(["BTCUSDT"]) == 0
    row = store.row_of("BTCUSDT")
    assert [store.count(row, t) for t in ("5m", "15m", "1h")] == [9, KEPT, KEPT]
    market.distort = lambda symbol, timeframe, rows: rows
    await feed.bootstrap(["BTCUSDT"])
    assert_equals_the_venue(store, market, "BTCUSDT")  # the next start asks for the whole window again


async def test_a_failing_symbol_is_retried_counted_and_does_not_disturb_the_others(feed, market, store):
    market.broken["ETHUSDT"] = VenueUnavailable("no answer")
    assert await feed.bootstrap(SYMBOLS) == 3
    assert len([r for r in market.requests if r[0] == "ETHUSDT"]) == 9
    fresh, stale = feed.fresh_symbols(NOON + 1_000)
    assert [symbol for _, symbol in fresh] == ["BTCUSDT", "币安人生USDT"]
    assert stale == ["ETHUSDT"]
    assert feed.statistics()["stale"] == 1

    market.broken.clear()
    async with feed.running(SYMBOLS):
        await feed.settled()
        assert_equals_the_venue(store, market, "ETHUSDT")


async def test_a_rejected_symbol_is_not_asked_for_again(feed, market):
    market.broken["ETHUSDT"] = RequestRejected("invalid symbol", code=-1121)
    assert await feed.bootstrap(["ETHUSDT"]) == 3
    assert len(market.requests) == 3


async def test_unusable_answers_are_asked_for_again(feed, market, store, clock):
    market.faults = [
        VenueMalformed("not JSON"),
        VenueUnavailable("reset"),
        VenueThrottled("slow down", retry_at_ms=NOON + 30_000),
    ]
    assert await feed.bootstrap(SYMBOLS) == 0
    assert NOON + 30_000 in clock.slept
    for symbol in SYMBOLS:
        assert_equals_the_venue(store, market, symbol)


async def test_a_venue_that_does_not_serve_this_place_ends_the_bootstrap(feed, market):
    market.faults = [VenueRestricted("451")]
    with pytest.raises(ExceptionGroup) as raised:
        await feed.bootstrap(SYMBOLS)
    assert raised.value.subgroup(VenueRestricted)


async def test_a_failing_repair_is_counted_and_tried_again_when_asked(feed, market, store, clock):
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        market.broken["BTCUSDT"] = VenueUnavailable("down")
        clock.advance_to(NOON + 2 * STEP)
        market.lose_connection()
        await feed.settled()
        assert feed.statistics()["failed"] == 1
        market.broken.clear()
        clock.advance_to(NOON + 3 * STEP + 60_001)
        feed.fresh_symbols(clock.now_ms())
        await feed.settled()
        assert_equals_the_venue(store, market, "BTCUSDT")


async def test_a_changed_universe_is_fetched_and_streamed_without_a_pause(feed, market, store):
    await feed.bootstrap(SYMBOLS)
    async with feed.running(SYMBOLS):
        await feed.settled()
        assert market.streams == [tuple(SYMBOLS)]
        market.requests.clear()
        await feed.set_symbols(["BTCUSDT", "SOLUSDT"])
        await feed.settled()
        assert {r[0] for r in market.requests} == {"SOLUSDT"}
        assert market.streams == [("BTCUSDT", "SOLUSDT")]
        for symbol in ("BTCUSDT", "SOLUSDT"):
            market.close_candle(symbol, NOON)
            assert_equals_the_venue(store, market, symbol)
        assert store.row_of("ETHUSDT") is None
        await feed.set_symbols(["SOLUSDT", "BTCUSDT"])
        assert market.streams == [("BTCUSDT", "SOLUSDT")]
    assert market.streams == []


async def test_a_new_stream_that_cannot_open_leaves_the_old_one_and_is_tried_again(feed, market):
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        market.stream_fault = VenueUnavailable("refused")
        with pytest.raises(VenueUnavailable):
            await feed.set_symbols(["BTCUSDT", "ETHUSDT"])
        assert market.streams == [("BTCUSDT",)]
        market.stream_fault = None
        await feed.set_symbols(["BTCUSDT", "ETHUSDT"])
        assert market.streams[-1] == ("BTCUSDT", "ETHUSDT")
        await asyncio.wait_for(market.stream_ended.wait(), 5)  # the old one is left by its own task
        assert len(market.streams) == 1


async def test_a_stream_that_cannot_open_at_the_start_is_an_error(feed, market):
    market.stream_fault = VenueUnavailable("refused")
    with pytest.raises(ExceptionGroup) as raised:
        async with feed.running(["BTCUSDT"]):
            pytest.fail("the block must not run")
    assert raised.value.subgroup(VenueUnavailable)


async def test_the_newest_price_comes_from_the_newest_update(feed, market):
    seen = []
    feed.on_price = lambda symbol, price, event_ms: seen.append((symbol, price, event_ms))
    await feed.bootstrap(["BTCUSDT"])
    async with feed.running(["BTCUSDT"]):
        await feed.settled()
        assert feed.last_price("BTCUSDT") is None
        market.send("BTCUSDT", (NOON, 5.0, 5.0, 5.0, 5.0, 1.0), closed=False, event_ms=NOON + 9)
        market.send("BTCUSDT", (NOON, 5.0, 6.0, 5.0, 6.0, 1.0), closed=False, event_ms=NOON + 8)
        assert feed.last_price("BTCUSDT") == 5.0
        market.send("BTCUSDT", (NOON, 5.0, 7.0, 5.0, 7.0, 1.0), closed=False, event_ms=NOON + 10)
        assert feed.last_price("BTCUSDT") == 7.0
        assert seen == [("BTCUSDT", 5.0, NOON + 9), ("BTCUSDT", 7.0, NOON + 10)]
        await feed.set_symbols(["ETHUSDT"])
        assert feed.last_price("BTCUSDT") is None


async def test_candles_since_come_from_the_store_while_it_reaches_back_and_else_by_rest(feed, market):
    await feed.bootstrap(["BTCUSDT"])
    market.requests.clear()
    near = NOON - 10 * STEP
    assert await feed.candles_since("BTCUSDT", near) == feed.closes("BTCUSDT", near)
    assert len(feed.closes("BTCUSDT", near + 1)) == 9
    assert market.requests == []

    far = NOON - 300 * STEP
    rows = await feed.candles_since("BTCUSDT", far + 1)
    assert [row[0] for row in rows] == list(range(far + STEP, NOON, STEP))
    assert len(await feed.candles_since("GONEUSDT", near)) == 10
    assert len(await feed.candles_since("BTCUSDT", NOON - 5_000 * STEP)) == 1_500
    assert await feed.candles_since("GONEUSDT", NOON) == []


async def test_a_store_that_fell_behind_is_not_taken_for_a_symbol_without_candles(feed, market, clock):
    await feed.bootstrap(["BTCUSDT"])
    clock.advance_to(NOON + 30 * 60_000)
    market.requests.clear()
    assert await feed.candles_since("BTCUSDT", NOON) == []
    assert market.requests == []  # late, and still on their way
    clock.advance_to(NOON + 98 * 3_600_000)
    assert (await feed.candles_since("BTCUSDT", NOON))[0][0] == NOON
    market.broken["BTCUSDT"] = VenueUnavailable("away")
    with pytest.raises(VenueUnavailable):
        await feed.candles_since("BTCUSDT", NOON)


async def test_the_repair_queue_holds_each_series_once_and_keeps_the_earliest_wish():
    queue = RepairQueue()
    assert queue.put("A", "5m")
    assert not queue.put("A", "5m", 700)
    assert not queue.put("A", "5m", 500)
    assert not queue.put("A", "5m")
    assert len(queue) == 1
    series, from_ms = await queue.take()
    assert (series, from_ms) == (("A", "5m"), 500)
    queue.put("A", "5m")
    queue.put("B", "5m")
    assert (await queue.take())[0] == ("B", "5m")  # A is in work, so its second wish waits
    queue.done(series)
    assert (await queue.take())[0] == ("A", "5m")
    queue.done(("A", "5m"))
    queue.done(("B", "5m"))
    await queue.settled()


async def test_requests_and_the_bootstrap_are_timed(market, store, clock):
    recorder = InMemoryRecorder()
    feed = CandleFeed(market, store, clock, MarketSettings(candles=KEPT), recorder)
    await feed.bootstrap(["BTCUSDT"])
    assert sorted(recorder.operations) == ["market.bootstrap", *["market.fetch"] * 3]
