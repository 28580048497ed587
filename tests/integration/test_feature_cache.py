"""The FeatureCache over a real candle store, real workers' code and real files."""

import asyncio
import errno
import math
import os
import random
import subprocess
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
from structlog.testing import capture_logs

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.pool import open_pool
from service.errors import CacheUnavailable
from service.learning import slot_file
from service.learning.breaker import Breaker
from service.learning.feature_cache import FeatureCache
from service.learning.slot_file import FILE_NAME, SlotFile
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS, TIMEFRAMES, Load
from service.settings import AnalysisSettings, FeatureSettings, StrategySettings
from tests.recorder import Recorder

NOW_MS = 1_760_400_000_000 // 3_600_000 * 3_600_000
FIVE_MS = TIMEFRAME_MS["5m"]
IDLE = Load(0.1, 0.1)
SYMBOLS = [f"S{i}USDT" for i in range(24)]
ROWS = 32
SLOT_BYTES = 2_048


def candles_of(rng, timeframe, count=200):
    step = TIMEFRAME_MS[timeframe]
    wide = 0.002 * math.sqrt(step / FIVE_MS)
    close, drift, rows = 100.0, rng.gauss(0, wide / 4), []
    for back in range(count, 0, -1):
        before, close = close, close * math.exp(rng.gauss(drift, wide))
        high = max(before, close) * (1 + abs(rng.gauss(0, wide / 2)))
        low = min(before, close) * (1 - abs(rng.gauss(0, wide / 2)))
        rows.append((NOW_MS - back * step, before, high, low, close, rng.expovariate(0.01)))
    return rows


def filled(path, seed=5):
    store = CandleStore.open(path, symbols_capacity=ROWS, candles=200)
    rng = random.Random(seed)
    for symbol in SYMBOLS:
        row = store.add_symbol(symbol)
        for timeframe in TIMEFRAMES:
            store.append(row, timeframe, candles_of(rng, timeframe))
    return store


@pytest.fixture
def store(tmp_path):
    store = filled(tmp_path / "candles.mmap")
    yield store
    store.close()


def slots(directory):
    return SlotFile(directory / FILE_NAME, ROWS, SLOT_BYTES)


@asynccontextmanager
async def analysing(store, cache, strategy=None):
    """An analyser in this process; the cache is closed with it, as in the daemon."""
    settings = AnalysisSettings(workers=0)
    async with open_pool(settings, None) as pool:
        analyzer = ParallelAnalyzer(
            pool, store.path, settings, strategy or StrategySettings(), Recorder(), cache
        )
        try:
            yield analyzer
        finally:
            if cache is not None:
                await cache.close()
            analyzer.close()


async def signals_of(store, cache=None, *, now_ms=NOW_MS, strategy=None):
    """The signals of one analysis in a process of its own, as bytes, and how many symbols were reused."""
    async with analysing(store, cache, strategy) as analyzer:
        result = await analyzer.analyse(store.symbols(), now_ms, IDLE)
    assert (result.failed, result.skipped, result.shed) == ({}, {}, [])
    return msgspec.json.encode(result.signals), result.reused


def cache_of(tier=None, *, max_entries=100, ttl_s=1_800.0):
    return FeatureCache(FeatureSettings(max_entries=max_entries, ttl_s=ttl_s), Recorder(), tier)


def close_a_candle(store, row, factor=1.01, at_ms=NOW_MS):
    close = store.rows_since(row, "5m", at_ms - FIVE_MS)[0][4]
    price = close * factor
    store.append(
        row, "5m", [(at_ms, close, max(close, price) * 1.001, min(close, price) * 0.999, price, 9.0)]
    )


@pytest.mark.parametrize("max_entries", [1, 5, 100, 0])
@pytest.mark.parametrize("on_disk", [True, False])
async def test_signals_are_the_same_bytes_with_any_cache_cold_and_warm(store, tmp_path, max_entries, on_disk):
    cache = cache_of(slots(tmp_path) if on_disk else None, max_entries=max_entries)
    rng = random.Random(3)
    async with analysing(store, cache) as analyzer:
        for cycle in range(6):
            now_ms = NOW_MS + cycle * 60_000
            result = await analyzer.analyse(store.symbols(), now_ms, IDLE)
            fresh, _ = await signals_of(store, now_ms=now_ms)
            assert msgspec.json.encode(result.signals) == fresh
            await cache.settled()
            for row in rng.sample(range(len(SYMBOLS)), 3):  # the venue corrects some candle of the past
                open_ms, *_, close, volume = store.rows_since(row, "15m", 0)[-rng.randint(1, 50)]
                changed = (open_ms, close, close * 1.02, close * 0.98, close * 1.01, volume)
                store.append(row, "15m", [changed])
            assert cache.statistics().entries <= (max_entries or 10_000)
    statistics = cache.statistics()
    assert statistics.memory_hits + statistics.tier_hits + statistics.misses == 6 * len(SYMBOLS)
    room = len(SYMBOLS) if on_disk or max_entries == 0 else min(max_entries, len(SYMBOLS))
    assert statistics.memory_hits + statistics.tier_hits >= 5 * (room - 3)


async def test_a_restart_is_served_from_the_file(store, tmp_path):
    first, reused = await signals_of(store, cache_of(slots(tmp_path)))
    assert reused == 0
    again, reused = await signals_of(store, cache_of(slots(tmp_path)), now_ms=NOW_MS + 60_000)
    assert (again, reused) == (first, len(SYMBOLS))


async def test_another_candle_file_with_the_same_sequence_numbers_gets_nothing_stale(store, tmp_path):
    await signals_of(store, cache_of(slots(tmp_path)))
    (tmp_path / "other").mkdir()
    other = filled(tmp_path / "other" / "candles.mmap", seed=6)
    try:
        assert [other.sequence(r) for r in range(24)] == [store.sequence(r) for r in range(24)]
        found, reused = await signals_of(other, cache_of(slots(tmp_path)))
        fresh, _ = await signals_of(other)
    finally:
        other.close()
    assert (found, reused) == (fresh, 0)


async def test_a_corrected_candle_is_computed_anew_at_once_and_after_a_restart(store, tmp_path):
    async with analysing(store, cache_of(slots(tmp_path))) as analyzer:
        await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        open_ms, open_, high, low, close, volume = store.rows_since(7, "5m", 0)[-1]
        store.append(7, "5m", [(open_ms, open_, high, low, close, volume + 1.0)])
        result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert (result.analysed, result.reused) == (1, len(SYMBOLS) - 1)
    store.append(7, "5m", [(open_ms, open_, high, low, close, volume)])
    assert (await signals_of(store, cache_of(slots(tmp_path))))[1] == len(SYMBOLS) - 1


@pytest.mark.parametrize(
    "other",
    [
        StrategySettings(options={"stop_atr": 2.5}),
        StrategySettings(name="docs/examples/breakout.py:Breakout"),
    ],
)
async def test_nothing_of_another_strategy_is_served(store, tmp_path, other, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    await signals_of(store, cache_of(slots(tmp_path)))
    found, reused = await signals_of(store, cache_of(slots(tmp_path)), strategy=other)
    assert reused == 0
    assert found == (await signals_of(store, strategy=other))[0]


async def test_one_cache_tells_two_strategies_apart_in_memory_too(store):
    cache = cache_of(max_entries=0)
    answers = []
    settings = AnalysisSettings(workers=0)
    async with open_pool(settings, None) as pool:
        for options in ({}, {"stop_atr": 2.5}, {}):
            strategy = StrategySettings(options=options)
            analyzer = ParallelAnalyzer(pool, store.path, settings, strategy, Recorder(), cache)
            result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
            analyzer.close()
            assert result.reused == 0
            answers.append(msgspec.json.encode(result.signals))
    assert answers[0] == answers[2] != answers[1]


async def test_a_slot_with_one_wrong_bit_is_no_entry(tmp_path):
    tier, token = SlotFile(tmp_path / FILE_NAME, 2, 256), b"t" * 16
    for at in range(len(b"body") * 8):
        await tier.put_many([1], [token], [b"body"], 0, 1_000)
        with (tmp_path / FILE_NAME).open("r+b") as file:
            place = 32 + 256 + 32 + at // 8
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << at % 8]))
        assert await tier.get_many([1], [token], 0, 1_000) == [None]
    await tier.close()


async def test_a_torn_slot_costs_its_symbol_only(store, tmp_path):
    first, _ = await signals_of(store, cache_of(slots(tmp_path)))
    file = tmp_path / FILE_NAME
    content = bytearray(file.read_bytes())
    for at in (40, 32 + 3 * SLOT_BYTES + 33):  # a slot's length, another one's body
        content[at] ^= 0xFF
    file.write_bytes(content)
    assert await signals_of(store, cache_of(slots(tmp_path))) == (first, len(SYMBOLS) - 2)


@pytest.mark.parametrize("damage", [b"", b"nonsense" * 100, None])
async def test_a_file_of_another_form_is_made_anew(store, tmp_path, damage):
    first, _ = await signals_of(store, cache_of(slots(tmp_path)))
    file = tmp_path / FILE_NAME
    if damage is None:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(damage)
    assert await signals_of(store, cache_of(slots(tmp_path))) == (first, 0)
    assert (await signals_of(store, cache_of(slots(tmp_path))))[1] == len(SYMBOLS)
    assert file.stat().st_size == 32 + ROWS * SLOT_BYTES


async def test_entries_end_with_their_time_in_both_tiers(store, tmp_path):
    await signals_of(store, cache_of(slots(tmp_path)))
    for later_s, reused in ((1_799, len(SYMBOLS)), (1_800, 0)):
        now_ms = NOW_MS + later_s * 1000
        assert (await signals_of(store, cache_of(slots(tmp_path)), now_ms=now_ms))[1] == reused


async def test_a_clock_that_steps_back_an_hour_gives_misses_and_the_same_signals(store, tmp_path):
    cache = cache_of(slots(tmp_path), max_entries=5)
    async with analysing(store, cache) as analyzer:
        first = await analyzer.analyse(store.symbols(), NOW_MS + 3_600_000, IDLE)
        await cache.settled()
        back = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert (back.reused, back.signals) == (0, first.signals)
        await cache.settled()
        assert (await analyzer.analyse(store.symbols(), NOW_MS, IDLE)).reused == len(SYMBOLS)


async def test_the_file_keeps_its_size_over_many_candles(store, tmp_path):
    cache = cache_of(slots(tmp_path), max_entries=5)
    async with analysing(store, cache) as analyzer:
        for number in range(8):
            await analyzer.analyse(store.symbols(), NOW_MS + number * FIVE_MS, IDLE)
            await cache.settled()
            for row in range(len(SYMBOLS)):
                close_a_candle(store, row, at_ms=NOW_MS + number * FIVE_MS)
        assert cache.statistics().entries == 5
    assert [path.name for path in tmp_path.iterdir() if "features" in path.name] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).stat().st_size == 32 + ROWS * SLOT_BYTES


async def test_a_result_larger_than_a_slot_is_computed_each_time(store, tmp_path):
    small = SlotFile(tmp_path / FILE_NAME, ROWS, 256)
    cache = FeatureCache(FeatureSettings(max_entries=1, slot_bytes=256), Recorder(), small)
    async with analysing(store, cache) as analyzer:
        first = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        with capture_logs() as lines:
            await cache.settled()
        assert small.too_large == len(first.signals) > 5
        assert [line["advice"] for line in lines] == ["raise features.slot_bytes"]
        again = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
    assert again.signals == first.signals
    assert again.reused >= len(SYMBOLS) - len(first.signals)


def faulty(**calls):
    """The operating system's calls with some that fail: for the slot file only."""
    return SimpleNamespace(**{**vars(os), **calls})


@pytest.fixture(params=["tmpfs", "fault layer"])
def full(request, tmp_path, monkeypatch):
    """A directory without room: a real file system of 16 KB, and writes that fail as on one."""
    directory = tmp_path / "full"
    directory.mkdir()
    if request.param == "fault layer":

        def no_room(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(slot_file, "os", faulty(posix_fallocate=no_room, pwrite=no_room))
        yield directory
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "perpd-test", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here; the fault layer stands for it")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


async def test_a_full_directory_makes_it_slower_never_wrong_with_one_warning(store, full):
    fresh, _ = await signals_of(store)
    now = [0.0]
    cache = FeatureCache(
        FeatureSettings(max_entries=5), Recorder(), slots(full), Breaker("SlotFile", lambda: now[0])
    )
    with capture_logs() as lines:
        async with analysing(store, cache) as analyzer:
            for _ in range(5):
                now[0] += 1_000.0  # each cycle tries again
                result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
                assert msgspec.json.encode(result.signals) == fresh
                await cache.settled()
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert [line["reason"] for line in warnings] == [f"{FILE_NAME}: No space left on device"]
    assert cache.statistics().tier_failures >= 5
    assert cache.statistics().memory_hits == 4 * 5


async def test_a_disk_that_gets_room_again_is_used_again(store, tmp_path, monkeypatch):
    now = [0.0]
    cache = FeatureCache(
        FeatureSettings(max_entries=5), Recorder(), slots(tmp_path), Breaker("SlotFile", lambda: now[0])
    )

    def broken(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with analysing(store, cache) as analyzer:
        monkeypatch.setattr(slot_file, "os", faulty(pread=broken))
        await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        assert (await analyzer.analyse(store.symbols(), NOW_MS, IDLE)).reused == 5
        monkeypatch.undo()
        now[0] += 1_000.0
        await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
        await cache.settled()
        assert (await analyzer.analyse(store.symbols(), NOW_MS, IDLE)).reused == len(SYMBOLS)


async def test_a_disk_that_hangs_is_given_up_and_keeps_nobody_from_closing(store, tmp_path, monkeypatch):
    hanging, over = threading.Event(), threading.Event()

    def hang(*arguments):
        hanging.set()
        over.wait(30)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(slot_file, "_LIMIT_S", 0.1)
    tier = slots(tmp_path)
    monkeypatch.setattr(tier, "limit_s", 0.1, raising=False)
    fresh, _ = await signals_of(store)
    monkeypatch.setattr(slot_file, "os", faulty(pread=hang))
    with capture_logs() as lines:
        found, reused = await signals_of(store, cache_of(tier))
    over.set()
    assert hanging.is_set()
    assert (found, reused) == (fresh, 0)
    told = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert told == [
        "feature cache: second tier fails, results are computed instead",
        "feature cache: second tier left open",
    ]


class Hanging:
    """A second tier that never answers."""

    shared = True
    limit_s = put_limit_s = 0.05

    async def get_many(self, rows, tokens, now_ms, ttl_ms):
        await asyncio.Event().wait()

    async def put_many(self, rows, tokens, bodies, now_ms, ttl_ms):
        await asyncio.Event().wait()

    async def close(self):
        pass


async def test_a_second_tier_that_hangs_is_given_up_at_its_limit_and_then_left_alone(store):
    recorder = Recorder()
    cache = FeatureCache(FeatureSettings(max_entries=5), recorder, Hanging(), Breaker("x", lambda: 0.0))
    fresh, _ = await signals_of(store)
    async with analysing(store, cache) as analyzer:
        for _ in range(3):
            result = await analyzer.analyse(store.symbols(), NOW_MS, IDLE)
            assert msgspec.json.encode(result.signals) == fresh
    assert cache.statistics().tier_failures == recorder.counts["features.tier_failures"] == 1


async def test_no_time_to_live_computes_every_cycle_anew(store, tmp_path):
    cache = cache_of(slots(tmp_path), ttl_s=0.0)
    async with analysing(store, cache) as analyzer:
        for _ in range(2):
            assert (await analyzer.analyse(store.symbols(), NOW_MS, IDLE)).analysed == len(SYMBOLS)
    assert not (tmp_path / FILE_NAME).exists()


async def test_a_broken_file_is_a_typed_error_and_opened_again_later(tmp_path):
    tier = SlotFile(tmp_path / "missing" / FILE_NAME, 4, 256)
    with pytest.raises(CacheUnavailable, match="No such file"):
        await tier.get_many([0], [b"t" * 16], 0, 1_000)
    (tmp_path / "missing").mkdir()
    await tier.put_many([0, 3], [b"a" * 16, b"b" * 16], [b"x", b""], 0, 1_000)
    found = await tier.get_many([0, 3, 1], [b"a" * 16, b"b" * 16, b"c" * 16], 0, 1_000)
    assert found == [b"x", b"", None]
    await tier.close()
