"""Reuse of unchanged series in real workers: the signals are those of a computation from nothing."""

import asyncio
import os
import random
import signal
from concurrent.futures import Future
from contextlib import asynccontextmanager

import msgspec
import pytest

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.executor import AnalysisExecutor
from service.analysis.nursery import spawn_nursery
from service.analysis.pool import open_pool
from service.analysis.row_view import RowView
from service.analysis.worker import BatchAnswer, Outcome
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS, TIMEFRAMES, Load
from service.settings import AnalysisSettings, StrategySettings
from service.strategies.base import checked_signal
from service.strategies.ict_smc import IctSmc
from tests.recorder import Recorder

NOW_MS = 1_760_400_000_000 // 3_600_000 * 3_600_000
SYMBOLS = [f"S{i:02}USDT" for i in range(24)]
KEPT = 120
IDLE = Load(0.1, 0.1)


class Market:
    """Candles that close as the clock says."""

    def __init__(self, path, seed):
        self.rng = random.Random(seed)
        self.store = CandleStore.open(path, symbols_capacity=32, candles=KEPT)
        self.now_ms = NOW_MS
        for symbol in SYMBOLS:
            self.fill(self.store.add_symbol(symbol))

    def fill(self, row):
        for timeframe in TIMEFRAMES:
            step = TIMEFRAME_MS[timeframe]
            until_ms = self.now_ms // step * step
            candles, close = [], 128.0
            for back in range(KEPT, 0, -1):
                candles.append(self.candle(until_ms - back * step, close))
                close = candles[-1][4]
            self.store.replace(row, timeframe, candles)

    def candle(self, open_ms, before):
        close = before * (1 + self.rng.gauss(0.0004, 0.003))
        high = max(before, close) * (1 + self.rng.random() / 1_000)
        low = min(before, close) * (1 - self.rng.random() / 1_000)
        return open_ms, before, high, low, close, float(self.rng.randint(1, 1_000))

    def close_5m(self):
        """A candle of 5m of every symbol closes, and whatever longer one it ends."""
        self.now_ms += TIMEFRAME_MS["5m"]
        for timeframe in TIMEFRAMES:
            step = TIMEFRAME_MS[timeframe]
            if self.now_ms % step:
                continue
            for row, _ in self.store.symbols():
                before = self.store.rows_since(row, timeframe, self.store.last_open_ms(row, timeframe))[0]
                self.store.append(row, timeframe, [self.candle(self.now_ms - step, before[4])])

    def correct(self, row, timeframe):
        at, open_, high, low, close, volume = self.rng.choice(self.store.rows_since(row, timeframe, 0))
        self.store.append(row, timeframe, [(at, open_, high + 1.0, low - 0.5, close + 0.25, volume + 1.0)])

    def signals(self):
        """Of a strategy that remembers nothing, in this process."""
        strategy = IctSmc({})
        views = [RowView(self.store, row, symbol) for row, symbol in self.store.symbols()]
        found = [checked_signal("ict_smc", view, strategy.analyse(view)) for view in views]
        return [one for one in found if one is not None]


@pytest.fixture
def market(tmp_path):
    market = Market(tmp_path / "candles.mmap", seed=11)
    yield market
    market.store.close()


@asynccontextmanager
async def analysing(store, *, workers, factors=(2.0, 1.5, 1.0), recorder=None):
    settings = AnalysisSettings(workers=workers, batch_factors=factors)
    async with open_pool(settings, spawn_nursery() if workers else None) as pool:
        analyzer = ParallelAnalyzer(pool, store.path, settings, StrategySettings(), recorder or Recorder())
        try:
            yield analyzer, pool
        finally:
            analyzer.close()


async def killed(pool):
    """Every worker is gone, and the pool has seen it."""
    pids = set(pool.pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while pids & set(pool.pids):  # noqa: ASYNC110 - the pool has no event for it
        await asyncio.sleep(0.01)


async def cycle(analyzer, market):
    """One analysis, held against a computation from nothing."""
    result = await analyzer.analyse(market.store.symbols(), market.now_ms, IDLE)
    assert (result.failed, result.skipped, result.analysed) == ({}, {}, len(SYMBOLS))
    assert msgspec.json.encode(result.signals) == msgspec.json.encode(market.signals())
    return result


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("factors", [(0.1, 0.1, 0.1), (2.0, 1.5, 1.0), (50.0, 50.0, 50.0)])
async def test_signals_are_those_of_a_computation_from_nothing_whatever_happens_to_the_candles(
    market, workers, factors
):
    store, rng, found = market.store, random.Random(3), 0
    async with analysing(store, workers=workers, factors=factors) as (analyzer, pool):
        for number in range(16):
            found += len((await cycle(analyzer, market)).signals)
            market.close_5m()
            for row in rng.sample(range(len(SYMBOLS)), 3):
                market.correct(row, rng.choice(TIMEFRAMES))
            if number % 4 == 1:
                market.fill(rng.randrange(len(SYMBOLS)))  # fetched anew after a gap
            if number % 4 == 2:
                symbol = rng.choice(SYMBOLS)
                store.remove_symbol(symbol)
                market.fill(store.add_symbol(symbol))
            if number % 5 == 3:
                await killed(pool)
    assert found > 30


async def test_two_of_three_5m_closes_compute_nothing_of_15m_and_1h(market):
    recorder = Recorder()
    async with analysing(market.store, workers=1, recorder=recorder) as (analyzer, _):
        computed = []
        for _ in range(13):  # an hour, its end included
            result = await cycle(analyzer, market)
            computed.append(result.series_computed)
            market.close_5m()
    assert computed[0] > len(SYMBOLS)
    quarters = [computed[n] for n in (3, 6, 9)]
    between = [computed[n] for n in range(1, 12) if n % 3]
    assert min(quarters) >= len(SYMBOLS) // 2
    # a direction that 5m decides may ask for what nobody asked for before
    assert max(between) <= len(SYMBOLS) // 4
    assert computed[12] >= 2 * len(SYMBOLS) - 4
    assert recorder.counts["series.misses"] == sum(computed)
    assert recorder.counts["series.hits"] > 13 * len(SYMBOLS)


async def test_a_batch_meets_the_worker_that_remembers_it(market):
    async with analysing(market.store, workers=2) as (analyzer, _):
        await cycle(analyzer, market)
        computed = 0
        for _ in range(20):
            for row in range(len(SYMBOLS)):
                market.store.append(row, "5m", [])  # a new sequence number: every symbol is due again
            computed += (await cycle(analyzer, market)).series_computed
    everything_twice = 2 * 3 * len(SYMBOLS)
    assert computed <= everything_twice, "both workers learn everything at most once more"


class Workers(AnalysisExecutor):
    """Answers at once that no symbol has a signal; those that are stuck keep what they were given."""

    def __init__(self, stuck):
        self.stuck = stuck
        self.given = []
        self.held = []

    def submit_to(self, number, fn, /, *args):
        future = Future()
        future.set_running_or_notify_cancel()
        self.given.append(number)
        answer = msgspec.msgpack.encode(BatchAnswer([Outcome(-1)] * len(args[0]), 0, 0))
        asyncio.get_running_loop().call_soon(self.answer, number, future, answer)
        return future

    def answer(self, number, future, answer):
        if number in self.stuck:
            self.held.append((future, answer))
        else:
            future.set_result(answer)

    def free(self):
        self.stuck = ()
        for future, answer in self.held:
            future.set_result(answer)


@pytest.mark.parametrize(("patience_s", "helped"), [(30.0, len(SYMBOLS) - 2 - 4), (0.0, len(SYMBOLS) - 2)])
async def test_the_last_batches_are_left_to_their_worker_for_a_moment_only(
    market, monkeypatch, patience_s, helped
):
    monkeypatch.setattr("service.analysis.analyzer._PATIENCE_S", patience_s)
    workers = Workers(stuck=(1,))
    settings = AnalysisSettings(workers=2, batch_factors=(0.25,) * 3)
    analyzer = ParallelAnalyzer(workers, market.store.path, settings, StrategySettings(), Recorder())
    cycle = asyncio.create_task(analyzer.analyse(market.store.symbols(), market.now_ms, IDLE))
    for _ in range(20 * len(SYMBOLS)):
        await asyncio.sleep(0)
    assert (workers.given.count(1), workers.given.count(0)) == (2, helped)
    workers.free()
    assert (await cycle).batches == len(SYMBOLS)
    assert workers.given[2 + helped :] == [1] * (len(SYMBOLS) - 2 - helped)
    analyzer.close()


async def test_a_strategy_that_remembers_nothing_works_as_before(market, request):
    example = request.config.rootpath / "docs" / "examples" / "breakout.py"
    settings = AnalysisSettings(workers=1)
    recorder = Recorder()
    async with open_pool(settings, spawn_nursery()) as pool:
        strategy = StrategySettings(name=f"{example}:Breakout", options={"candles": 10})
        analyzer = ParallelAnalyzer(pool, market.store.path, settings, strategy, recorder)
        result = await analyzer.analyse(market.store.symbols(), market.now_ms, IDLE)
        analyzer.close()
    assert (result.failed, result.series_reused, result.series_computed) == ({}, 0, 0)
    assert not [name for name in recorder.counts if name.startswith("series")]
