"""The time limit of a cycle's analysis: who comes first, who is shed, and that nothing is late or lost."""

import asyncio
import math
from contextlib import asynccontextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.nursery import spawn_nursery
from service.analysis.pool import open_pool
from service.market.candles import CandleStore
from service.records import Load
from service.settings import AnalysisSettings, StrategySettings
from tests.recorder import Recorder

NOW_MS = 1_760_400_000_000
SYMBOLS = [f"S{i:02}USDT" for i in range(16)]
IDLE = Load(0.1, 0.1)

STRATEGY = '''
import time
from pathlib import Path
from service.records import PositionSide
from service.strategies.base import SignalDraft

HERE = Path(__file__).parent

class Slow:
    """Goes long everywhere, as slowly as the file `seconds` says; hangs where a file bears the symbol."""

    name = "slow"
    timeframes = ("5m",)
    candles = 2

    def __init__(self, options):
        pass

    def analyse(self, view):
        with (HERE / "order").open("a") as log:
            log.write(view.symbol + "\\n")
        time.sleep(3600 if (HERE / view.symbol).exists() else float((HERE / "seconds").read_text()))
        close = float(view.candles("5m").close[-1])
        return SignalDraft(position_side=PositionSide.LONG, entry=close, stop=close * 0.9, target=close * 1.2,
                           atr=1.0, confidence=0.5, scores={}, features={})
'''


class Desk:
    """The strategy's files."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "slow.py").write_text(STRATEGY)
        self.strategy = StrategySettings(name=f"{directory / 'slow.py'}:Slow")

    def takes(self, seconds):
        (self.directory / "seconds").write_text(str(seconds))

    def hangs_on(self, symbol):
        (self.directory / symbol).touch()

    def begun(self):
        """Symbols in the order of their analysis since the last call."""
        path = self.directory / "order"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def store(tmp_path):
    store = CandleStore.open(tmp_path / "candles.mmap", symbols_capacity=16, candles=120)
    for symbol in SYMBOLS:
        row = store.add_symbol(symbol)
        store.append(row, "5m", [(NOW_MS - (9 - i) * 300_000, 1.0, 2.0, 0.5, 1.5, 1.0) for i in range(9)])
    yield store
    store.close()


@asynccontextmanager
async def analysing(store, desk, *, workers=1, batch=2.0, limit_s=30.0, recorder=None):
    """Batches of `batch` symbols (for one worker)."""
    factors = (batch / 2 / max(workers, 1),) * 3
    settings = AnalysisSettings(workers=workers, batch_limit_s=limit_s, batch_factors=factors)
    async with open_pool(settings, spawn_nursery() if workers else None) as pool:
        analyzer = ParallelAnalyzer(pool, store.path, settings, desk.strategy, recorder or Recorder())
        await analyzer.describe_strategy()
        try:
            yield analyzer, pool
        finally:
            analyzer.close()


async def idle(pool):
    """Until the workers have finished what was abandoned."""
    while pool.depth:  # noqa: ASYNC110 - the pool has no event for it
        await asyncio.sleep(0.02)
    await asyncio.sleep(0)


@pytest.mark.parametrize("workers", [0, 1, 2])
async def test_what_cannot_be_reached_in_time_is_shed_in_order_and_told_once(store, desk, workers):
    desk.takes(0.15)
    recorder = Recorder()
    async with analysing(store, desk, workers=workers, recorder=recorder) as (analyzer, _):
        with capture_logs() as lines:
            result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=0.5)
            begun = len(desk.begun())
    assert result.shed
    assert result.analysed + len(result.shed) == len(SYMBOLS)
    assert [signal.symbol for signal in result.signals] == [s for s in SYMBOLS if s not in result.shed]
    assert result.shed[-1] == SYMBOLS[-1]
    assert begun <= result.analysed + 4 * max(workers, 1), "more was begun than was in flight at the limit"
    told = [line for line in lines if "shed" in line]
    assert [(line["shed"], line["first"]) for line in told] == [(len(result.shed), result.shed[0])]
    assert recorder.counts["analysis.shed"] == len(result.shed)


async def test_symbols_with_open_positions_come_first(store, desk):
    desk.takes(0.1)
    held = frozenset({"S13USDT", "S15USDT"})
    async with analysing(store, desk) as (analyzer, _):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, first=held, limit_s=1.0)
    assert desk.begun()[:4] == ["S13USDT", "S15USDT", "S00USDT", "S01USDT"]
    assert not held & set(result.shed)
    order = [signal.symbol for signal in result.signals]
    assert order == sorted(order), "the order of the signals is not that of the analysis"


async def test_what_abandoned_batches_find_serves_the_next_cycle(store, desk):
    desk.takes(0.3)
    async with analysing(store, desk) as (analyzer, pool):
        first = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=0.15)
        assert first.shed == SYMBOLS
        await idle(pool)
        late = desk.begun()
        assert late == SYMBOLS[:4], "the batches a worker had in hand are finished, no others"
        desk.takes(0.0)
        second = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert (second.reused, second.analysed, second.shed) == (4, 12, [])
        assert sorted(desk.begun()) == SYMBOLS[4:]
        fresh = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert msgspec.json.encode(second.signals) == msgspec.json.encode(fresh.signals)


async def test_late_results_on_candles_that_changed_are_not_used(store, desk):
    desk.takes(0.3)
    async with analysing(store, desk) as (analyzer, pool):
        await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=0.15)
        await idle(pool)
        store.append(0, "5m", [(NOW_MS, 1.0, 3.0, 0.5, 2.5, 1.0)])
        desk.takes(0.0)
        second = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert second.reused == 3
    assert second.signals[0].entry == 2.5


async def test_nobody_is_shed_for_ever(store, desk):
    desk.takes(0.02)
    never = set(SYMBOLS)
    async with analysing(store, desk, workers=0) as (analyzer, _):
        for _ in range(8):
            result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=0.1)
            assert result.shed
            never &= set(result.shed)
    assert never == set()


async def test_a_symbol_that_hangs_beyond_the_deadline_is_found_and_put_in_quarantine(store, desk):
    desk.takes(0.0)
    desk.hangs_on("S05USDT")
    recorder = Recorder()
    async with analysing(store, desk, limit_s=1.0, recorder=recorder) as (analyzer, pool):
        for _ in range(4):
            result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=0.5)
            await idle(pool)
            if result.skipped:
                break
    assert "quarantine" in result.skipped["S05USDT"]
    assert recorder.counts["analysis.quarantined"] == 1
    assert (result.shed, len(result.signals)) == ([], len(SYMBOLS) - 1)


async def test_without_a_limit_nothing_is_shed(store, desk):
    desk.takes(0.01)
    async with analysing(store, desk, workers=2) as (analyzer, _):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE, limit_s=math.inf)
    assert (result.analysed, result.shed) == (len(SYMBOLS), [])
