"""Which part holds the daemon up, and what its user can do about it: measured values against limits.

Pure. Each piece of advice names the value, the limit it exceeds and the setting that changes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from service.monitor.performance import CacheUse, Percentiles

CYCLE_FRACTION = 0.5
"""Of its interval that a cycle may take at p95: beyond it one slow answer makes it overrun."""
OVERRUN_FRACTION = 0.01
FLUSH_S = 0.1
"""A flush is one write and one fsync of a few KB: a disk that takes longer is busy or far away."""
LAG_P99_MS = 20.0
"""Four times what a quiet machine shows; from here on candles and fills are read late."""
GARBAGE_S = 0.001
HIT_FRACTION = 0.5
"""Of the hits that are possible: below it a cache costs its memory and saves little."""
CANDLE_S = 300.0
LOOKUPS = 100
"""Fewer say nothing about a cache."""
REPLACEMENTS_PER_HOUR = 6.0
LAG_ALARMS_PER_HOUR = 6.0

PARTS = {
    "analysis": "analysis",
    "decisions": "cycle.decisions",
    "shadows": "cycle.shadows",
    "garbage": "garbage",
}
"""Parts of a cycle, each done once in it, and the operation that times it."""


class Advice(msgspec.Struct, frozen=True):
    """One thing to change. Values in the unit that `text` names."""

    about: str  # stays the same while the reason does
    measured: float
    limit: float
    setting: str
    text: str

    @property
    def excess(self) -> float:
        """How far beyond its limit, as a factor of at least 1."""
        low, high = sorted((self.measured, self.limit))
        return high / max(low, 1e-9)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What advice is judged by. Events, caches and replaced workers are those of the last `window_s`."""

    recent: Mapping[str, Percentiles]  # by operation
    interval_s: float  # wall seconds between two cycles
    window_s: float
    cycles: int = 0
    missed: int = 0
    lag_p99_ms: float = 0.0
    lag_alarms: int = 0
    lag_alarm_ms: float = 100.0
    held: Sequence[str] = ()  # the stack that held the loop last, innermost last
    workers: int = 0
    cores: float = 1.0
    workers_replaced: int = 0
    caches: Mapping[str, CacheUse] = {}
    features_ttl_s: float = 1_800.0
    features_tier: str = ""  # the feature cache's second tier by its class, "" for none
    tier_failures: int = 0  # of it
    speed: float = 1.0  # market seconds in a wall second


def cycle_shares(recent: Mapping[str, Percentiles]) -> dict[str, float]:
    """Fraction of a cycle's time by part, largest first; empty before the first cycle."""
    cycle = recent.get("cycle")
    if cycle is None or cycle.mean <= 0:
        return {}
    means = {part: recent[kind].mean for part, kind in PARTS.items() if kind in recent}
    # Measured apart from the cycle's own end, so that a part's mean may exceed it by a clock tick.
    shares = {part: min(mean / cycle.mean, 1.0) for part, mean in means.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def advise(facts: Facts) -> list[Advice]:
    """Everything beyond its limit, worst first."""
    rules = (_cycle, _overruns, _disk, _loop, _garbage, _workers, _caches)
    return sorted((advice for rule in rules for advice in rule(facts)), key=lambda one: -one.excess)


def _cycle(facts: Facts) -> Iterator[Advice]:
    shares, cycle = cycle_shares(facts.recent), facts.recent.get("cycle")
    if cycle is None or not shares or cycle.p95 <= CYCLE_FRACTION * facts.interval_s:
        return
    part, share = next(iter(shares.items()))
    setting, remedy = _remedy(part, facts)
    used = cycle.p95 / facts.interval_s
    yield Advice(
        f"cycle.{part}",
        used,
        CYCLE_FRACTION,
        setting,
        f"{part} takes {share:.0%} of a cycle, and a cycle {used:.0%} of its interval of "
        f"{facts.interval_s:g} s (p95 {cycle.p95 * 1000:.0f} ms, limit {CYCLE_FRACTION:.0%}): {remedy}",
    )


def _remedy(part: str, facts: Facts) -> tuple[str, str]:
    """The setting that makes a part of the cycle shorter, and words for it."""
    match part:
        case "analysis" if facts.workers < facts.cores:
            return (
                "analysis.workers",
                f"raise analysis.workers (now {facts.workers} of {facts.cores:g} cores) "
                "or lower market.symbols",
            )
        case "analysis":
            return (
                "market.symbols",
                f"lower market.symbols or market.candles; {facts.workers} workers use all cores",
            )
        case "decisions":
            return (
                "trading.top_signals",
                "lower trading.top_signals, or run nearer to the venue: its answers are waited for",
            )
        case "shadows":
            return "trading.max_shadows", "lower trading.max_shadows or trading.shadow_hours"
        case _:
            return "cycle.collect_garbage", "set cycle.collect_garbage = false"


def _overruns(facts: Facts) -> Iterator[Advice]:
    slots = facts.cycles + facts.missed
    if not slots or facts.missed / slots <= OVERRUN_FRACTION:
        return
    fraction = facts.missed / slots
    yield Advice(
        "cycle.overruns",
        fraction,
        OVERRUN_FRACTION,
        "cycle.interval_s",
        f"{facts.missed} of {slots} cycles in the last {_minutes(facts.window_s)} were missed, since the "
        f"one before overran ({fraction:.0%}, limit {OVERRUN_FRACTION:.0%}): raise cycle.interval_s (now "
        f"{facts.interval_s:g} s of wall time) or lower market.symbols",
    )


def _disk(facts: Facts) -> Iterator[Advice]:
    flush = facts.recent.get("archive.flush")
    if flush is not None and flush.p95 > FLUSH_S:
        yield Advice(
            "archive.flush",
            flush.p95 * 1000,
            FLUSH_S * 1000,
            "run.data_dir",
            f"a write to the archive takes {flush.p95 * 1000:.0f} ms at p95 (limit {FLUSH_S * 1000:.0f} ms): "
            "the disk is slow or busy; put run.data_dir on a faster one, or raise archive.buffer_records and "
            "archive.flush_after_s for fewer writes",
        )


def _loop(facts: Facts) -> Iterator[Advice]:
    where = f", last at {facts.held[-1]}" if facts.held else ""
    setting, remedy = _loop_remedy(facts)
    if facts.lag_p99_ms > LAG_P99_MS:
        yield Advice(
            "loop.lag",
            facts.lag_p99_ms,
            LAG_P99_MS,
            setting,
            f"the event loop wakes {facts.lag_p99_ms:.1f} ms late at p99 (limit {LAG_P99_MS:g} ms){where}: "
            f"{remedy}",
        )
    per_hour = _per_hour(facts.lag_alarms, facts)
    if per_hour > LAG_ALARMS_PER_HOUR:
        yield Advice(
            "loop.held",
            per_hour,
            LAG_ALARMS_PER_HOUR,
            setting,
            f"the event loop is held beyond monitor.lag_alarm_ms ({facts.lag_alarm_ms:g} ms) {per_hour:.0f} "
            f"times an hour (limit {LAG_ALARMS_PER_HOUR:g}){where}: {remedy}",
        )


def _loop_remedy(facts: Facts) -> tuple[str, str]:
    if not facts.workers:
        return "analysis.workers", "with analysis.workers = 0 the analysis holds it; raise analysis.workers"
    return (
        "market.symbols",
        "lower market.symbols or analysis.workers where the CPU is short",
    )


def _per_hour(times: int, facts: Facts) -> float:
    """A rate; 0 for what happened once, which is none yet."""
    return times * 3_600 / facts.window_s if times > 1 else 0.0


def _garbage(facts: Facts) -> Iterator[Advice]:
    garbage = facts.recent.get("garbage")
    if garbage is not None and garbage.p95 > GARBAGE_S:
        yield Advice(
            "garbage",
            garbage.p95 * 1000,
            GARBAGE_S * 1000,
            "cycle.collect_garbage",
            f"collecting garbage takes {garbage.p95 * 1000:.1f} ms a cycle at p95 (limit "
            f"{GARBAGE_S * 1000:g} ms): lower trading.max_shadows, or set cycle.collect_garbage = false",
        )


def _workers(facts: Facts) -> Iterator[Advice]:
    per_hour = _per_hour(facts.workers_replaced, facts)
    if per_hour > REPLACEMENTS_PER_HOUR:
        yield Advice(
            "workers.replaced",
            per_hour,
            REPLACEMENTS_PER_HOUR,
            "analysis.worker_memory_limit_mb",
            f"workers are replaced {per_hour:.0f} times an hour (limit {REPLACEMENTS_PER_HOUR:g}): the "
            "strategy leaks or needs more; raise analysis.worker_memory_limit_mb, or mend strategy.name",
        )


def _caches(facts: Facts) -> Iterator[Advice]:
    # A candle's results serve every cycle until the next one closes, but the first.
    possible = max(1 - facts.interval_s * facts.speed / CANDLE_S, 0.0)
    limit = HIT_FRACTION * possible
    for name, use in facts.caches.items():
        remedy = CACHE_REMEDIES.get(name)
        if remedy is None or use.hits + use.misses < LOOKUPS or use.hit_fraction >= limit:
            continue
        setting, words = remedy(facts)
        yield Advice(
            f"cache.{name}",
            use.hit_fraction,
            limit,
            setting,
            f"the cache of {name} had {use.hit_fraction:.0%} of {use.hits + use.misses} lookups in the last "
            f"{_minutes(facts.window_s)} (limit {limit:.0%}, possible {possible:.0%}): {words}",
        )


def _features_remedy(facts: Facts) -> tuple[str, str]:
    """A result is found again until the next 5m candle, if it was kept for so long and had a place."""
    if facts.features_ttl_s < CANDLE_S:
        return (
            "features.ttl_s",
            f"raise features.ttl_s (now {facts.features_ttl_s:g} s) to a 5m candle's {CANDLE_S:g} s or more",
        )
    if facts.tier_failures and facts.features_tier == "RedisTier":
        return (
            "features.redis_limit_ms",
            f"Redis failed {facts.tier_failures} times: mend it or what leads to it, or raise "
            "features.redis_limit_ms; the log names the reason",
        )
    if facts.tier_failures:
        return (
            "run.data_dir",
            f"its slot file in run.data_dir failed {facts.tier_failures} times; the log names the reason",
        )
    if facts.features_tier == "SlotFile":
        return "features.slot_bytes", "results larger than features.slot_bytes find no place: raise it"
    return "features.max_entries", "raise features.max_entries to the number of symbols or more"


CACHE_REMEDIES: dict[str, Callable[[Facts], tuple[str, str]]] = {"features": _features_remedy}
"""By cache, the setting that makes it hit more often, and words for it.

Results of the analysis have none: each closed candle ends some.
"""


def _minutes(seconds: float) -> str:
    return f"{max(round(seconds / 60), 1)} min"
