"""`perpd bench features`: what a lookup in the feature cache costs, and what computing again would."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from service.bench.analysis_process import analysing, measure_in_loop
from service.bench.machine import machine
from service.bench.processes import answer_of
from service.bench.redis_lookup import ask_redis, redis_figures, some_redis
from service.bench.result import Figure, Result

if TYPE_CHECKING:
    from service.analysis.analyzer import ParallelAnalyzer
    from service.analysis.inline import InlineExecutor
    from service.analysis.nursery import Nursery
    from service.analysis.pool import NurseryPool
    from service.learning.feature_cache import FeatureCache
    from service.learning.memory_tier import MemoryTier
    from service.market.candles import CandleStore
    from service.ports import CacheTier
    from service.settings import AnalysisSettings

NAME = "features"
SUMMARY = "lookups in the feature cache, in memory and below, beside computing again"
MEASURES = (
    "ParallelAnalyzer over the worker pool, the founding strategy, a seeded market whose candles stay as "
    "they are, so that a cycle may reuse every result. Kinds of cycle, in turns: computed (no cache), memory "
    "(without bound), default (100 entries in memory, the file below them), restart (everything from the "
    "file, candles hashed anew). Lookups: one key after the other, nothing else going on. Scan: hits of a "
    "memory of half the market that is asked for the whole market again and again. Redis: a server "
    "of its own over loopback TCP, or the one given."
)
MEMORY_GOAL_US = 5.0
SCAN_PASSES = 10
LOOKUPS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="1 to 700 (default 200)")
    parser.add_argument("--candles", type=int, default=200, metavar="M", help="120 to 500 (default 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument("--rounds", type=int, default=40, metavar="R", help="cycles of a kind (default 40)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")
    parser.add_argument("--redis", default="", metavar="URL", help="server to ask (default: starts one)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    parameters = {name: getattr(args, name) for name in ("symbols", "candles", "workers", "rounds", "seed")}
    with tempfile.TemporaryDirectory(prefix="perpd-bench-") as directory:
        market = {
            "directory": directory,
            "symbols": args.symbols,
            "candles": args.candles,
            "rounds": 1,
            "seed": args.seed,
        }
        answer_of("service.bench.market", market)
        with some_redis(args.redis) as url:
            found = answer_of("service.bench.features", {"directory": directory, "redis": url, **parameters})
        parameters["redis"] = "given" if args.redis else "own" if url else "none: no redis-server found"
    return Result(NAME, MEASURES, parameters, facts, figures(found), found)


def figures(found: dict[str, Any]) -> tuple[Figure, ...]:
    """Seconds in; milliseconds a cycle and microseconds a lookup out."""
    cycles = {kind: statistics.median(found["cycles"][kind]) for kind in found["cycles"]}
    computed_s = cycles["computed"]
    return (
        Figure("memory lookup p50", found["memory_lookup_s"] * 1e6, "us", "less", MEMORY_GOAL_US),
        Figure("file lookup, mean of a batch", found["file_lookup_s"] * 1e6, "us", "less"),
        Figure("hash of a symbol's candles", found["hash_s"] * 1e6, "us", "less"),
        Figure("computing a symbol, wall", computed_s / found["symbols"] * 1e6, "us"),
        Figure("cycle p50, computed", computed_s * 1000, "ms"),
        *(
            Figure(f"cycle p50, {kind}", seconds * 1000, "ms", "less", computed_s * 1000)
            for kind, seconds in cycles.items()
            if kind != "computed"
        ),
        Figure("put of every result, mean", found["put_s"] * 1000, "ms", "less"),
        *redis_figures(found["redis"]),
        Figure("scan hits, ours", found["scan_hits"]["ours"] * 100, "%", "more"),
        Figure("scan hits, plain LRU", found["scan_hits"]["plain"] * 100, "%", "more"),
        Figure("bytes of a stored signal", found["stored_bytes"], "bytes"),
        Figure("same signals in every kind", float(found["identical"]), "(1: yes)", "more", 1),
    )


# -- in the fresh process


async def _measure(spec: dict[str, Any], nursery: "Nursery | None") -> dict[str, Any]:
    async with analysing(spec, nursery) as opened:
        bench = _Bench(opened.store, opened.pool, opened.settings, opened.rounds.start_ms)
        found = await bench.run(spec["rounds"])
    half = max(spec["symbols"] // 2, 1)
    found["redis"] = await ask_redis(spec["redis"], spec["symbols"]) if spec["redis"] else {}
    hits = {"ours": _scan(_ours(half), spec["symbols"]), "plain": _scan(_plain(half), spec["symbols"])}
    return {**found, "scan_hits": hits, "symbols": spec["symbols"]}


class _Bench:
    """Cycles over one store whose candles stay as they are."""

    def __init__(
        self,
        store: "CandleStore",
        pool: "NurseryPool | InlineExecutor",
        settings: "AnalysisSettings",
        now_ms: int,
    ) -> None:
        self._store = store
        self._places = store.symbols()
        self._pool = pool
        self._settings = settings
        self._now_ms = now_ms
        self._answers: set[bytes] = set()

    async def run(self, rounds: int) -> dict[str, Any]:
        cycles: dict[str, list[float]] = {"computed": [], "memory": [], "default": [], "restart": []}
        caches = {"computed": None, "memory": self._cache(0), "default": self._cache(100, self._file())}
        kept = {kind: (cache, await self._analyzer(cache)) for kind, cache in caches.items()}
        for _ in range(3):  # warm: workers have loaded the strategy, caches are filled
            for cache, analyzer in kept.values():
                await self._cycle(analyzer, cache)
        for _ in range(rounds):
            for kind, (cache, analyzer) in kept.items():
                cycles[kind].append(await self._cycle(analyzer, cache))
            cold = self._cache(100, self._file())
            restarted = await self._analyzer(cold)
            cycles["restart"].append(await self._cycle(restarted, cold))
            await cold.close()
            restarted.close()
        found = await self._lookups()
        for cache, analyzer in kept.values():
            if cache is not None:
                await cache.close()
            analyzer.close()
        return {"cycles": cycles, "identical": len(self._answers) == 1, **found}

    def _file(self) -> "CacheTier":
        from service.learning.slot_file import FILE_NAME, SlotFile

        return SlotFile(self._store.path.with_name(FILE_NAME), self._store.capacity, 2_048)

    def _cache(self, max_entries: int, tier: "CacheTier | None" = None) -> "FeatureCache":
        from service.bench.cycle import _Silent
        from service.learning.feature_cache import FeatureCache
        from service.settings import FeatureSettings

        return FeatureCache(FeatureSettings(max_entries=max_entries), _Silent(), tier)

    async def _analyzer(self, cache: "FeatureCache | None") -> "ParallelAnalyzer":
        """One that knows its strategy, as the daemon's does before the first cycle."""
        from service.analysis.analyzer import ParallelAnalyzer
        from service.bench.cycle import _Silent
        from service.settings import StrategySettings

        analyzer = ParallelAnalyzer(
            self._pool, self._store.path, self._settings, StrategySettings(), _Silent(), cache
        )
        await analyzer.describe_strategy()
        return analyzer

    async def _cycle(self, analyzer: "ParallelAnalyzer", cache: "FeatureCache | None") -> float:
        """Seconds of one analysis; what it puts in the background is waited for afterwards."""
        import msgspec

        from service.records import Load

        began_s = time.perf_counter()
        result = await analyzer.analyse(self._places, self._now_ms, Load(0.0, 0.0))
        seconds = time.perf_counter() - began_s
        if cache is not None:
            await cache.settled()
        self._answers.add(msgspec.json.encode(result.signals))
        return seconds

    async def _lookups(self) -> dict[str, float]:
        """Seconds of single operations."""
        import msgspec

        from service.bench.archive import example_signal
        from service.learning.identity import CandleIdentity, Key, Lookup
        from service.learning.slot_file import FILE_NAME, SlotFile

        signal = example_signal()
        body = msgspec.msgpack.encode([signal, ""])
        rows = [row for row, _ in self._places]
        lookups = [
            Lookup(Key(symbol, "1h,15m,5m", self._now_ms), row, self._store.sequence(row))
            for row, symbol in self._places
        ]
        memory = _ours(len(rows))
        for lookup in lookups:
            memory.put(lookup.key, signal, 0)
        tokens = [token or b"" for token in CandleIdentity(self._store, b"v").tokens(lookups)]
        began_s = time.perf_counter()
        CandleIdentity(self._store, b"v").tokens(lookups)
        hash_s = (time.perf_counter() - began_s) / len(rows)
        file = SlotFile(self._store.path.with_name(FILE_NAME), self._store.capacity, 2_048)
        bodies = [body] * len(rows)
        put_s = _mean(lambda: file.write(rows, tokens, bodies, 1_000), 20)
        file_s = _mean(lambda: file.read(rows, tokens, 0, 1_000), 20) / len(rows)
        await file.close()
        return {
            "memory_lookup_s": _median_lookup(memory, lookups),
            "file_lookup_s": file_s,
            "hash_s": hash_s,
            "put_s": put_s + hash_s * len(rows),
            "stored_bytes": len(body),
        }


def _median_lookup(memory: "MemoryTier[Any, Any]", lookups: list[Any]) -> float:
    """Each lookup timed for itself, the clock's own cost included."""
    times = []
    for number in range(LOOKUPS):
        lookup = lookups[number % len(lookups)]
        began_s = time.perf_counter()
        memory.get(lookup.key, 0)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _mean(work: Callable[[], Any], times: int) -> float:
    began_s = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began_s) / times


def _ours(limit: int) -> "MemoryTier[Any, Any]":
    from service.learning.memory_tier import MemoryTier

    return MemoryTier(limit, 1_800_000)


class _PlainLru:
    """What everybody writes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[int, int] = OrderedDict()

    def begin_pass(self) -> None:
        """Knows no passes."""

    def get(self, key: int, now_ms: int) -> int | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: int, value: int, now_ms: int) -> None:
        self._entries[key] = value
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)


def _plain(limit: int) -> _PlainLru:
    return _PlainLru(limit)


def _scan(memory: "MemoryTier[Any, Any] | _PlainLru", keys: int) -> float:
    """Share of hits after the first pass; each pass asks for every key and puts what is missing."""
    hits = 0
    for number in range(SCAN_PASSES + 1):
        memory.begin_pass()
        for key in range(keys):
            if memory.get(key, 0) is not None:
                hits += number > 0
            else:
                memory.put(key, key + 1, 0)
    return hits / (SCAN_PASSES * keys)


if __name__ == "__main__":
    measure_in_loop(json.loads(sys.argv[1]), _measure)
