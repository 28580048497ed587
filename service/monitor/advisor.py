"""Asks for advice while the daemon runs: facts of the last minutes in, a log line when the advice changes."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import structlog

from service.monitor.advice import Advice, Facts, advise, cycle_shares
from service.monitor.lag import LoopLag
from service.monitor.performance import CacheUse, PerformanceMonitor, cache_use

_EVERY_S = 60.0
_WINDOW_MARKS = 10  # counters are compared with those of ten minutes ago
_SLOWEST = 10  # of the last operations of all kinds, shown one by one
_AGAIN_S = 3_600.0  # the same advice is not told again sooner, however often it comes and goes

log = structlog.get_logger("monitor.advisor")


class Replaced(Protocol):
    """A pool of workers, as far as advice goes."""

    @property
    def workers(self) -> int: ...
    @property
    def replaced(self) -> int: ...
    @property
    def lost(self) -> int: ...


class _Mark(NamedTuple):
    """Counters at one moment."""

    at_s: float
    counters: Mapping[str, int]
    replaced: int


class Advisor:
    """Keeps the counters of the last ten minutes, and what was advised.

    Args: interval_s: wall seconds between two cycles; speed: market seconds in one of them; cores: that the
    process may use at once; features_ttl_s, features_tier: how the feature cache keeps results, see Facts.
    """

    def __init__(
        self,
        performance: PerformanceMonitor,
        lag: LoopLag,
        pool: Replaced,
        *,
        interval_s: float,
        speed: float,
        lag_alarm_ms: float,
        cores: float,
        features_ttl_s: float = 1_800.0,
        features_tier: str = "",
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._performance = performance
        self._lag = lag
        self._pool = pool
        self._interval_s = interval_s
        self._speed = speed
        self._lag_alarm_ms = lag_alarm_ms
        self._cores = cores
        self._features_ttl_s = features_ttl_s
        self._features_tier = features_tier
        self._monotonic_s = monotonic_s
        self._told_s: dict[str, float] = {}
        self._marks: deque[_Mark] = deque([self._mark()], maxlen=_WINDOW_MARKS)
        self.held: Sequence[str] = ()
        """The stack that held the loop last; whoever hears the alarm puts it here."""
        self.advice: list[Advice] = []

    async def run(self) -> None:
        """Look once a minute until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            self.look()

    def look(self) -> None:
        """Judge anew and log what changed, each piece once an hour at most."""
        before = {one.about for one in self.advice}
        self.advice = self.current()
        self._marks.append(self._mark())
        now_s = self._monotonic_s()
        for one in self.advice:
            if now_s - self._told_s.get(one.about, -_AGAIN_S) >= _AGAIN_S and one.about not in before:
                self._told_s[one.about] = now_s
                log.warning("performance advice", about=one.about, advice=one.text, setting=one.setting)
        for about in sorted(before - {one.about for one in self.advice}):
            log.info("performance advice no longer holds", about=about)

    def current(self) -> list[Advice]:
        """Advice as of now, worst first."""
        return advise(self._facts())

    def _mark(self) -> _Mark:
        cycles = self._performance.totals().get("cycle")
        counters = {**self._performance.counters, "cycles.done": cycles.count if cycles else 0}
        return _Mark(self._monotonic_s(), counters, self._pool.replaced + self._pool.lost)

    def _facts(self) -> Facts:
        then, now = self._marks[0], self._mark()
        events = {name: count - then.counters.get(name, 0) for name, count in now.counters.items()}
        totals = self._performance.totals()
        recent = {
            kind: found for kind in totals if (found := self._performance.percentiles(kind)) is not None
        }
        return Facts(
            recent=recent,
            interval_s=self._interval_s,
            speed=self._speed,
            window_s=max(now.at_s - then.at_s, 1.0),
            cycles=events.get("cycles.done", 0),
            missed=events.get("cycles.missed", 0),
            lag_p99_ms=self._lag.statistics().p99_ms,
            lag_alarms=events.get("loop.lag_alarms", 0),
            lag_alarm_ms=self._lag_alarm_ms,
            held=self.held,
            workers=self._pool.workers,
            cores=self._cores,
            workers_replaced=now.replaced - then.replaced,
            caches=cache_use(events),
            features_ttl_s=self._features_ttl_s,
            features_tier=self._features_tier,
            tier_failures=events.get("features.tier_failures", 0),
        )

    async def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What `perpd performance` shows. Seconds, and fractions of 0 to 1."""
        facts = self._facts()
        totals = self._performance.totals()
        lag = self._lag.statistics()
        return {
            "interval_s": self._interval_s,
            "cycle_shares": cycle_shares(facts.recent),
            "advice": [{"about": a.about, **_plain(a)} for a in advise(facts)],
            "operations": {
                kind: {
                    "count": totals[kind].count,
                    "per_second": totals[kind].per_second,
                    "total_s": totals[kind].seconds,
                    "longest_s": totals[kind].longest_s,
                    "recent": found.count,
                    "mean_s": found.mean,
                    "p50_s": found.p50,
                    "p95_s": found.p95,
                    "p99_s": found.p99,
                    "last_s": found.last,
                }
                for kind, found in facts.recent.items()
            },
            "recent_operations": self._performance.recent_count,
            "slowest_recent": [
                {"operation": kind, "seconds": seconds}
                for kind, seconds in self._performance.slowest(_SLOWEST)
            ],
            "caches": {name: _use(use) for name, use in cache_use(self._performance.counters).items()},
            "events": dict(self._performance.counters),
            "loop_lag": {"p50_ms": lag.p50_ms, "p99_ms": lag.p99_ms, "longest_ms": lag.longest_ms},
            "loop_held_at": list(self.held),
        }


def _plain(advice: Advice) -> dict[str, Any]:
    return {
        "measured": advice.measured,
        "limit": advice.limit,
        "setting": advice.setting,
        "text": advice.text,
    }


def _use(use: CacheUse) -> dict[str, Any]:
    return {"hits": use.hits, "misses": use.misses, "hit_fraction": use.hit_fraction}
