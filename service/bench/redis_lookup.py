"""The part of `perpd bench features` that asks a Redis server."""

import os
import statistics
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from service.bench.redis_server import RedisServer, server_binary
from service.bench.result import Figure, quantile

GOAL_US = 300.0
LOOKUPS = 2_000
STORED_BYTES = 960  # of a founding signal


@contextmanager
def some_redis(url: str) -> Iterator[str]:
    """The address of a server: the one given, one that runs as long as the block, or "" without a program."""
    binary = "" if url else server_binary()
    if not binary:
        yield url
        return
    with RedisServer(binary, tcp=True) as server:
        yield server.url


def redis_figures(found: dict[str, float]) -> tuple[Figure, ...]:
    """Nothing when no server was asked."""
    if not found:
        return ()
    return (
        Figure("Redis lookup p50", found["lookup_p50_s"] * 1e6, "us", "less", GOAL_US),
        Figure("Redis lookup p99", found["lookup_p99_s"] * 1e6, "us", "less"),
        Figure("Redis lookup, in a batch of all", found["batch_lookup_s"] * 1e6, "us", "less"),
        Figure("Redis put of every result, mean", found["put_s"] * 1000, "ms", "less"),
        Figure("Redis client's import, resident", found["import_bytes"] / 2**20, "MB", "less"),
    )


async def ask_redis(url: str, symbols: int) -> dict[str, float]:
    """Seconds of a get of one key, of one key in a get of all, and of a put of all."""
    from service.bench.processes import memory_of

    before = memory_of(os.getpid()).resident
    from service.learning.redis_tier import RedisTier

    import_bytes = memory_of(os.getpid()).resident - before
    tier = RedisTier(url, limit_s=1.0, speed=1.0)
    tokens = [number.to_bytes(16, "big") for number in range(symbols)]
    rows, bodies = [0] * symbols, [b"x" * STORED_BYTES] * symbols
    times: dict[str, list[float]] = {"put": [], "one": [], "all": []}
    for number in range(LOOKUPS):
        if number % 40 == 0:
            times["put"].append(await _timed(tier.put_many(rows, tokens, bodies, 0, 60_000)))
            times["all"].append(await _timed(tier.get_many(rows, tokens, 0, 60_000)))
        token = tokens[number % symbols]
        times["one"].append(await _timed(tier.get_many([0], [token], 0, 60_000)))
    await tier.close()
    return {
        "lookup_p50_s": statistics.median(times["one"]),
        "lookup_p99_s": quantile(times["one"], 0.99),
        "batch_lookup_s": statistics.median(times["all"]) / symbols,
        "put_s": statistics.mean(times["put"]),
        "import_bytes": float(import_bytes),
    }


async def _timed(work: Awaitable[Any]) -> float:
    began_s = time.perf_counter()
    await work
    return time.perf_counter() - began_s
