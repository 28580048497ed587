"""The FeatureCache: what the analysis found for a symbol, until its candles change.

A 5m candle lives for five cycles of a minute, so four of five cycles find a symbol's result here instead of
computing it. Entries are keyed by symbol, timeframe set and candle time; an entry is served only when the
candles, the strategy, its options and its code are those it was computed from, so a hit is never stale and
signals are the same bytes with any cache, cold or warm, or none.

Two tiers. Memory holds at most `max_entries`. The second tier takes every entry: a slot file in the data
directory, or Redis where machines share it. It may fail: then results are computed again.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import structlog

from service.analysis.worker import Outcome
from service.errors import CacheUnavailable
from service.learning.breaker import Breaker
from service.learning.identity import CandleIdentity, Key, Lookup
from service.learning.memory_tier import MemoryTier
from service.ports import CacheTier, Recorder
from service.records import Signal
from service.settings import FeatureSettings

_DRAIN_LIMIT_S = 1.0

log = structlog.get_logger("learning.features")


class _Known(NamedTuple):
    """An entry in memory. The row's sequence vouches for its candles, the version for the code."""

    row: int
    sequence: int
    version: bytes
    outcome: Outcome


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """An entry in the second tier. Its token vouches for candles and code."""

    signal: Signal | None
    skipped: str


class CacheStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the start, except `entries`."""

    entries: int  # in memory now
    memory_hits: int
    tier_hits: int
    misses: int
    evicted: int
    tier_failures: int
    saved_s: float  # wall time not spent on computing, less what the lookups took

    @property
    def hit_fraction(self) -> float:
        asked = self.memory_hits + self.tier_hits + self.misses
        return (self.memory_hits + self.tier_hits) / asked if asked else 0.0


class FeatureCache:
    """See the module. One owner, on the loop; a put goes on in the background, one at a time."""

    def __init__(
        self,
        settings: FeatureSettings,
        recorder: Recorder,
        tier: CacheTier | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        """Args: tier: the second tier; it is the cache's to close."""
        self._ttl_ms = round(settings.ttl_s * 1000)
        self._recorder = recorder
        self._memory: MemoryTier[Key, _Known] = MemoryTier(settings.max_entries, self._ttl_ms)
        self._tier = tier if self.enabled else None
        self._breaker = breaker or Breaker(type(tier).__name__ if tier else "none")
        self._written: dict[int, int] = {}  # row to the sequence its own slot holds since this start
        self._putting: asyncio.Task[None] | None = None
        self._memory_hits = self._tier_hits = self._misses = 0
        self._saved_s = 0.0

    @property
    def enabled(self) -> bool:
        """Whether anything is kept at all."""
        return self._ttl_ms > 0

    @property
    def tier_name(self) -> str:
        """The second tier by its class; "" without one."""
        return type(self._tier).__name__ if self._tier else ""

    async def close(self) -> None:
        """Let a put end and the second tier go, within a second each."""
        if self._putting is not None:
            await asyncio.wait({self._putting}, timeout=_DRAIN_LIMIT_S)
            self._is_putting()
        if self._tier is not None:
            try:
                async with asyncio.timeout(_DRAIN_LIMIT_S):
                    await self._tier.close()
            except (CacheUnavailable, TimeoutError) as error:
                log.warning("feature cache: second tier left open", reason=str(error) or "it does not answer")
        self._memory.clear()

    def shrink(self, on: bool) -> None:
        """Give half of the memory back while memory is short; what is dropped is still in the second tier."""
        self._memory.shrink(on)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._memory.clear()

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            entries=len(self._memory),
            memory_hits=self._memory_hits,
            tier_hits=self._tier_hits,
            misses=self._misses,
            evicted=self._memory.evicted,
            tier_failures=self._breaker.failures,
            saved_s=self._saved_s,
        )

    def saved(self, seconds: float) -> None:
        """Note wall time that was not spent; negative where a lookup cost more than it saved."""
        self._saved_s += seconds

    async def get_many(
        self, lookups: Sequence[Lookup], identity: CandleIdentity, now_ms: int
    ) -> list[Outcome | None]:
        """The outcome of each lookup, None where it must be computed. Never raises, never blocks for long.

        Args: lookups: the symbols of one cycle; now_ms: market time, for the time to live.
        """
        if not self.enabled:
            return [None] * len(lookups)
        self._memory.begin_pass()
        version = identity.version
        found = [self._from_memory(lookup, version, now_ms) for lookup in lookups]
        memory_hits = len(found) - found.count(None)
        tier_hits = await self._from_tier(lookups, found, identity, now_ms)
        misses = len(found) - memory_hits - tier_hits
        self._memory_hits += memory_hits
        self._tier_hits += tier_hits
        self._misses += misses
        for name, amount in (("memory_hits", memory_hits), ("tier_hits", tier_hits), ("misses", misses)):
            self._recorder.count(f"features.{name}", amount)
        return found

    def _from_memory(self, lookup: Lookup, version: bytes, now_ms: int) -> Outcome | None:
        known = self._memory.get(lookup.key, now_ms)
        if known is None:
            return None
        if known.row == lookup.row and known.sequence == lookup.sequence and known.version == version:
            return known.outcome
        self._memory.drop(lookup.key)
        return None

    async def _from_tier(
        self,
        lookups: Sequence[Lookup],
        found: list[Outcome | None],
        identity: CandleIdentity,
        now_ms: int,
    ) -> int:
        """Fill the gaps in `found` from the second tier; returns how many."""
        tier = self._tier
        wanted = [i for i, one in enumerate(found) if one is None and self._may_hold(lookups[i])]
        if tier is None or not wanted or not self._breaker.closed:
            return 0
        tokens = await asyncio.to_thread(identity.tokens, [lookups[i] for i in wanted])
        asked = [(i, token) for i, token in zip(wanted, tokens, strict=True) if token is not None]
        try:
            async with asyncio.timeout(tier.limit_s):
                bodies = await tier.get_many(
                    [lookups[i].row for i, _ in asked], [token for _, token in asked], now_ms, self._ttl_ms
                )
        except (CacheUnavailable, TimeoutError) as error:
            self._tier_failed(str(error) or f"no answer within {tier.limit_s * 1000:g} ms")
            return 0
        self._breaker.succeeded()
        hits = 0
        for (i, _), body in zip(asked, bodies, strict=True):
            if body is None or (outcome := _decoded(body, lookups[i])) is None:
                continue
            found[i] = outcome
            hits += 1
            self._keep(lookups[i], outcome, identity.version, now_ms)
            if not tier.shared:
                self._written[lookups[i].row] = lookups[i].sequence
        return hits

    def _tier_failed(self, reason: str) -> None:
        self._breaker.failed(reason)
        self._recorder.count("features.tier_failures")

    def _may_hold(self, lookup: Lookup) -> bool:
        """Our own file holds what we wrote since the start or what it held then; to Redis others write."""
        if self._tier is None or self._tier.shared:
            return True
        return self._written.get(lookup.row, lookup.sequence) == lookup.sequence

    def _keep(self, lookup: Lookup, outcome: Outcome, version: bytes, now_ms: int) -> None:
        self._memory.put(lookup.key, _Known(lookup.row, lookup.sequence, version, outcome), now_ms)

    def put_many(
        self, lookups: Sequence[Lookup], outcomes: Sequence[Outcome], identity: CandleIdentity, now_ms: int
    ) -> None:
        """Keep what was computed: in memory at once, in the second tier in the background.

        Where the last put is still under way the second tier goes without this one.
        """
        if not self.enabled or not lookups:
            return
        self._memory.sweep(now_ms)
        for lookup, outcome in zip(lookups, outcomes, strict=True):
            self._keep(lookup, outcome, identity.version, now_ms)
        if self._tier is None or not self._breaker.closed:
            return
        if self._is_putting():
            self._recorder.count("features.puts_dropped")
            return
        put = self._put(self._tier, list(lookups), list(outcomes), identity, now_ms)
        self._putting = asyncio.create_task(put, name="features.put")

    def _is_putting(self) -> bool:
        """Whether a put is under way; one that broke in a way nobody foresaw raises here."""
        if self._putting is None or not self._putting.done():
            return self._putting is not None
        if not self._putting.cancelled():
            self._putting.result()
        self._putting = None
        return False

    async def settled(self) -> None:
        """Wait until the last put has ended."""
        if self._putting is not None:
            await asyncio.wait({self._putting})

    async def _put(
        self,
        tier: CacheTier,
        lookups: list[Lookup],
        outcomes: list[Outcome],
        identity: CandleIdentity,
        now_ms: int,
    ) -> None:
        tokens = await asyncio.to_thread(identity.tokens, lookups)
        kept = [
            (lookup, token, _encode(_Stored(outcome.signal, outcome.skipped)))
            for lookup, outcome, token in zip(lookups, outcomes, tokens, strict=True)
            if token is not None
        ]
        try:
            async with asyncio.timeout(tier.put_limit_s):
                await tier.put_many(
                    [lookup.row for lookup, _, _ in kept],
                    [token for _, token, _ in kept],
                    [body for _, _, body in kept],
                    now_ms,
                    self._ttl_ms,
                )
        except (CacheUnavailable, TimeoutError) as error:
            self._tier_failed(str(error) or f"no answer within {tier.put_limit_s * 1000:g} ms")
            return
        self._breaker.succeeded()
        if not tier.shared:
            self._written.update({lookup.row: lookup.sequence for lookup, _, _ in kept})


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(_Stored)


def _decoded(body: bytes, lookup: Lookup) -> Outcome | None:
    """The outcome, valid at the row's sequence; None for what cannot be one of this key."""
    try:
        stored = _decoder.decode(body)
    except msgspec.DecodeError:
        return None
    signal, key = stored.signal, lookup.key
    if signal is not None and (signal.symbol, signal.candle_close_ms) != (key.symbol, key.close_ms):
        return None
    return Outcome(lookup.sequence, signal, stored.skipped)
