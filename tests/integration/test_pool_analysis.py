"""The whole analysis over a real candle store and real workers."""

import math
import os
import random
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.nursery import spawn_nursery
from service.analysis.pool import open_pool
from service.analysis.worker import forget
from service.errors import SettingsInvalid, StrategyInvalid
from service.learning.feature_cache import FeatureCache
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS, TIMEFRAMES, Load
from service.settings import AnalysisSettings, FeatureSettings, StrategySettings
from tests.recorder import Recorder

NOW_MS = 1_760_400_000_000 // 3_600_000 * 3_600_000
IDLE, BUSY = Load(0.1, 0.1), Load(0.9, 0.9)
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "breakout.py"
SYMBOLS = [*(f"S{i}USDT" for i in range(36)), "币安人生USDT"]

STRATEGY = '''
import asyncio, os, signal, time
from pathlib import Path
from service.records import PositionSide
from service.strategies.base import SignalDraft

HERE = Path(__file__).parent

class Mine:
    """Goes long everywhere, and does what the file named like the symbol says."""

    name = "mine"
    timeframes = ("5m",)
    candles = 2

    class Own(BaseException):
        pass

    def __init__(self, options):
        pass

    def analyse(self, view):
        order = HERE / view.symbol
        word = order.read_text() if order.exists() else ""
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "die once":
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "hang":
            time.sleep(3600)
        if word == "raise":
            raise ValueError("no such luck")
        if word == "raise a book":
            raise ValueError("no such luck, " * 1_000_000)
        if word == "raise half a pair":
            raise ValueError("\\ud800 is no text")
        if word == "exit":
            raise SystemExit("that is all")
        if word == "interrupt":
            raise KeyboardInterrupt("as Ctrl-C would")
        if word == "end a generator":
            raise GeneratorExit("no more")
        if word == "cancel":
            raise asyncio.CancelledError("nobody waits")
        if word == "raise its own":
            raise Mine.Own("of no family")
        if word == "many":
            return [1] * 1_000_000
        candles = view.candles("5m")
        close = float(candles.close[-1])
        if word == "write":
            candles.close[-1] = 1e9
        if word == "unlock":
            candles.close.flags.writeable = True
        if word == "nan":
            close = float("nan")
        if word == "shape":
            close = candles.close
        if word == "wide":
            return SignalDraft(position_side=PositionSide.LONG, entry=close, stop=close * 0.9,
                               target=close * 1.2, atr=1.0, confidence=0.5, scores={},
                               features=dict.fromkeys(map(str, range(1_000_000)), 0.0))
        if word == "list":
            return SignalDraft(position_side=PositionSide.LONG, entry=close, stop=close * 0.9,
                               target=close * 1.2, atr=1.0, confidence=0.5, scores={},
                               features=[0.0] * 1_000_000)
        if word == "long name":
            return SignalDraft(position_side=PositionSide.LONG, entry=close, stop=close * 0.9,
                               target=close * 1.2, atr=1.0, confidence=0.5, scores={},
                               features={"x" * 10_000_000: 0.0})
        return SignalDraft(position_side=PositionSide.LONG, entry=close, stop=close * 0.9, target=close * 1.2,
                           atr=1.0, confidence=0.5, scores={}, features={})
'''


def candles_of(rng, timeframe, count, until_ms=NOW_MS):
    step = TIMEFRAME_MS[timeframe]
    wide = 0.002 * math.sqrt(step / 300_000)
    close, drift, rows = 100.0, rng.gauss(0, wide / 4), []
    for back in range(count, 0, -1):
        before, close = close, close * math.exp(rng.gauss(drift, wide))
        high = max(before, close) * (1 + abs(rng.gauss(0, wide / 2)))
        low = min(before, close) * (1 - abs(rng.gauss(0, wide / 2)))
        rows.append((until_ms - back * step, before, high, low, close, rng.expovariate(0.01)))
    return rows


@pytest.fixture
def store(tmp_path):
    store = CandleStore.open(tmp_path / "candles.mmap", symbols_capacity=64, candles=200)
    rng = random.Random(5)
    for symbol in SYMBOLS:
        row = store.add_symbol(symbol)
        for timeframe in TIMEFRAMES:
            store.append(row, timeframe, candles_of(rng, timeframe, 200))
    yield store
    store.close()


@pytest.fixture
def strategy(tmp_path):
    (tmp_path / "mine.py").write_text(STRATEGY)
    return StrategySettings(name=f"{tmp_path / 'mine.py'}:Mine")


@asynccontextmanager
async def analysing(
    store, *, workers=2, strategy=None, limit_s=30.0, factors=(2.0, 1.5, 1.0), recorder=None, cache=None
):
    strategy = strategy or StrategySettings()
    settings = AnalysisSettings(workers=workers, batch_limit_s=limit_s, batch_factors=factors)
    async with open_pool(settings, spawn_nursery() if workers else None) as pool:
        analyzer = ParallelAnalyzer(pool, store.path, settings, strategy, recorder or Recorder(), cache)
        try:
            yield analyzer, pool
        finally:
            analyzer.close()


async def test_signals_are_the_same_bytes_for_any_workers_and_any_batch_size(store):
    answers = set()
    for workers in (0, 1, 2, 4):
        for factors in ((0.1, 0.1, 0.1), (2.0, 1.5, 1.0), (50.0, 50.0, 50.0)):
            async with analysing(store, workers=workers, factors=factors) as (analyzer, _):
                result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
                assert (result.failed, result.skipped, result.analysed) == ({}, {}, len(SYMBOLS))
                answers.add(msgspec.json.encode(result.signals))
    assert len(answers) == 1
    assert answers.pop().count(b"signal_id") > 5


async def test_signals_come_in_the_order_asked_for(store):
    async with analysing(store) as (analyzer, _):
        places = store.symbols()[::-1]
        result = await analyzer.analyse(places, NOW_MS, BUSY)
    order = [symbol for _, symbol in places]
    positions = [order.index(s.symbol) for s in result.signals]
    assert positions == sorted(positions)


async def test_only_changed_symbols_are_computed_again_and_the_result_is_that_of_a_fresh_analysis(store):
    places = store.symbols()
    recorder = Recorder()
    async with analysing(store, recorder=recorder, cache=FeatureCache(FeatureSettings(), recorder)) as (
        analyzer,
        _,
    ):
        first = await analyzer.analyse(places, NOW_MS, IDLE)
        again = await analyzer.analyse(places, NOW_MS, IDLE)
        assert (again.analysed, again.reused, again.batches) == (0, len(SYMBOLS), 0)
        assert again.signals == first.signals
        row, _ = places[3]
        close = store.rows_since(row, "5m", 0)[-1][4]
        store.append(row, "5m", [(NOW_MS, close, close * 1.2, close * 0.8, close * 1.1, 50.0)])
        changed = await analyzer.analyse(places, NOW_MS + 300_000, IDLE)
        assert (changed.analysed, changed.reused) == (1, len(SYMBOLS) - 1)
        assert recorder.counts["analysis.reused"] == 2 * len(SYMBOLS) - 1
    async with analysing(store) as (analyzer, _):
        fresh = await analyzer.analyse(places, NOW_MS, IDLE)
    assert msgspec.json.encode(fresh.signals) == msgspec.json.encode(changed.signals)


async def test_the_forming_candle_is_never_used(store):
    places = store.symbols()
    async with analysing(store) as (analyzer, _):
        before = await analyzer.analyse(places, NOW_MS, IDLE)
        for row, _ in places:
            store.set_forming(row, "5m", (NOW_MS, 1.0, 9_999.0, 0.5, 9_000.0, 1e9))
        after = await analyzer.analyse(places, NOW_MS, IDLE)
    assert after.signals == before.signals


async def test_symbols_without_enough_candles_or_with_another_row_are_skipped_with_the_reason(store):
    young = store.add_symbol("YOUNGUSDT")
    for timeframe in TIMEFRAMES:
        store.append(young, timeframe, candles_of(random.Random(1), timeframe, 50))
    async with analysing(store) as (analyzer, _):
        result = await analyzer.analyse(
            [(young, "YOUNGUSDT"), (0, "GONEUSDT"), (1, SYMBOLS[1])], NOW_MS, IDLE
        )
    assert "50 candles" in result.skipped["YOUNGUSDT"]
    assert "another symbol" in result.skipped["GONEUSDT"]
    assert (result.analysed, result.failed) == (1, {})


async def test_a_row_being_written_is_skipped_and_analysed_once_it_is_stable(store, monkeypatch):
    place = store.symbols()[0]
    async with analysing(store, workers=0) as (analyzer, _):
        monkeypatch.setattr(CandleStore, "state", lambda self, row: [7] * 10)
        result = await analyzer.analyse([place], NOW_MS, IDLE)
        assert "being written" in result.skipped[place[1]]
        monkeypatch.undo()
        assert (await analyzer.analyse([place], NOW_MS, IDLE)).analysed == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "ValueError: no such luck (mine.py:"),
        ("raise a book", "ValueError: no such luck, no such luck"),
        ("raise half a pair", "ValueError: ? is no text"),
        ("exit", "SystemExit: that is all"),
        ("interrupt", "KeyboardInterrupt: as Ctrl-C would (mine.py:"),
        ("end a generator", "GeneratorExit: no more (mine.py:"),
        ("cancel", "CancelledError: nobody waits (mine.py:"),
        ("raise its own", "Own: of no family (mine.py:"),
        ("many", "returned list"),
        ("nan", "entry is nan"),
        ("shape", "entry is ndarray"),
        ("wide", "1000000 entries"),
        ("list", "features is a list"),
        ("long name", "10000000 bytes"),
        ("write", "read-only"),
        ("unlock", "cannot set WRITEABLE"),
    ],
)
async def test_a_strategy_that_breaks_on_a_symbol_costs_that_symbol_only(
    store, strategy, tmp_path, word, reason, workers
):
    (tmp_path / "S7USDT").write_text(word)
    async with analysing(store, strategy=strategy, workers=workers) as (analyzer, _):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert reason in (found := result.failed.pop("S7USDT"))
    assert len(found) < 400
    assert result.failed == {}
    assert [s.symbol for s in result.signals] == [s for s in SYMBOLS if s != "S7USDT"]


async def test_a_symbol_that_kills_twice_is_put_in_quarantine_and_the_others_go_on(store, strategy, tmp_path):
    (tmp_path / "S7USDT").write_text("die")
    recorder = Recorder()
    async with analysing(store, strategy=strategy, recorder=recorder) as (analyzer, pool):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert list(result.failed) == ["S7USDT"]
        assert len(result.signals) == len(SYMBOLS) - 1
        assert pool.lost == 2
        for _ in range(10):
            after = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
            assert "quarantine" in after.skipped["S7USDT"]
        assert pool.lost == 2
        (tmp_path / "S7USDT").unlink()
        assert len((await analyzer.analyse(store.symbols(), NOW_MS, IDLE)).signals) == len(SYMBOLS)
    assert recorder.counts["analysis.quarantined"] == 1


async def test_a_worker_that_dies_once_costs_nothing_but_a_retry(store, strategy, tmp_path):
    (tmp_path / "S7USDT").write_text("die once")
    async with analysing(store, strategy=strategy) as (analyzer, pool):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert pool.lost == 1
    assert (result.failed, len(result.signals)) == ({}, len(SYMBOLS))


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_strategy_that_hangs_is_ended_at_its_limit_and_its_symbol_found(
    store, strategy, tmp_path, workers
):
    (tmp_path / "S7USDT").write_text("hang")
    async with analysing(store, strategy=strategy, workers=workers, limit_s=0.5) as (analyzer, _):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert "time limit" in result.failed.pop("S7USDT")
    assert (result.failed, len(result.signals)) == ({}, len(SYMBOLS) - 1)


async def test_workers_killed_between_cycles_change_no_result(store):
    async with analysing(store) as (analyzer, pool):
        first = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        for pid in list(pool.pids):
            os.kill(pid, signal.SIGKILL)
        second = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert second.failed == {}
    assert second.signals == first.signals


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("nobody", {}, StrategyInvalid),
        ("ict_smc", {"stop_atrs": 1.0}, SettingsInvalid),
    ],
)
async def test_a_strategy_that_cannot_be_loaded_is_a_typed_error_of_the_daemon(store, name, options, error):
    wrong = StrategySettings(name=name, options=options)
    async with analysing(store, strategy=wrong) as (analyzer, _):
        with pytest.raises(error):
            await analyzer.describe_strategy()
        with pytest.raises(error):
            await analyzer.analyse(store.symbols(), NOW_MS, IDLE)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_module", "No module named"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = (", "SyntaxError"),
        ("Mine.candles = property(lambda self: 1 / 0)", "it cannot say what it needs: ZeroDivisionError"),
        ("Mine.candles = 10.5", "candles must be a positive integer"),
        ("Mine.timeframes = [[]]", "timeframes must be a tuple"),
        ("Mine.timeframes = ('5m',) * 1_000_000", "timeframes must be a tuple"),
        ("Mine.name = 'x' * 1_000_000", "name must be 1 to 32"),
        ("Mine.analyse = None", "it has no method analyse"),
        ("Mine.__init__ = lambda self: None", "building it failed: TypeError"),
    ],
)
async def test_a_strategy_broken_in_itself_is_refused_in_one_line_and_the_workers_live_on(
    store, strategy, tmp_path, line, words
):
    (tmp_path / "mine.py").write_text(f"{STRATEGY}\n{line}\n")
    async with analysing(store, strategy=strategy, workers=1) as (analyzer, pool):
        with pytest.raises(StrategyInvalid, match=words) as caught:
            await analyzer.describe_strategy()
        assert len(str(caught.value)) < 600
        assert pool.lost == 0


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_strategy_edited_while_perpd_runs_is_refused_and_never_mixed_with_the_old(
    store, strategy, tmp_path, workers
):
    file = tmp_path / "mine.py"
    async with analysing(store, strategy=strategy, workers=workers) as (analyzer, pool):
        before = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        file.write_text(STRATEGY.replace("close * 1.2", "close * 1.3"))
        forget()  # as a new process, where there are no workers
        for pid in list(pool.pids):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(StrategyInvalid, match="its file changed since the start; restart perpd"):
            await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        file.write_text(STRATEGY)
        again = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert again.signals == before.signals


async def test_the_strategy_describes_itself_from_a_worker(store, strategy):
    async with analysing(store, strategy=strategy) as (analyzer, _):
        facts = await analyzer.describe_strategy()
    assert (facts.name, facts.timeframes, facts.candles) == ("mine", ("5m",), 2)


async def test_the_documented_example_runs(store):
    strategy = StrategySettings(name=f"{EXAMPLE}:Breakout", options={"candles": 10})
    async with analysing(store, strategy=strategy) as (analyzer, _):
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert result.failed == {}
    assert 0 < len(result.signals) < len(SYMBOLS)
