"""What `/health`, `/ready` and `/metrics` say, from what the parts state about themselves."""

from collections.abc import Callable, Mapping
from typing import Any

from service.monitor.lag import LoopLag
from service.monitor.memory import MemorySampler
from service.monitor.metrics import Metric, performance_metrics, render
from service.monitor.performance import PerformanceMonitor
from service.ports import Clock

MB = 1024 * 1024
PERIODS = 2  # a cycle that finished longer ago than this many periods is no longer a sign of life


class Status:
    """Readiness is proven by work: fresh data, a writable archive, a cycle that finished of late."""

    def __init__(self, clock: Clock, interval_s: float) -> None:
        self._clock = clock
        # Market time, and never less than 3 s of wall time: at a high speed a period is a blink.
        self._limit_ms = max(PERIODS * interval_s * 1000, 3_000 * clock.speed)
        self._finished_ms = 0
        self._fresh = 0
        self._stale = 0
        self.archive_writable: Callable[[], bool] = lambda: False
        self.equity_known: Callable[[], bool] = lambda: True

    def cycle_finished(self, *, fresh: int, stale: int) -> None:
        self._finished_ms = self._clock.now_ms()
        self._fresh, self._stale = fresh, stale

    def health(self) -> dict[str, Any]:
        """Answered by the loop itself: that it answers is what it says."""
        return {"status": "ok"}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """(ready, reasons): each reason names what is missing."""
        reasons = []
        if not self._finished_ms:
            reasons.append("no cycle has finished yet")
        elif (age_ms := self._clock.now_ms() - self._finished_ms) > self._limit_ms:
            reasons.append(f"the last cycle finished {age_ms / 1000:.0f} s ago")
        if self._finished_ms and not self._fresh:
            reasons.append(f"no series is fresh, {self._stale} symbols are stale")
        if self._finished_ms and not self.equity_known():
            reasons.append("the account's equity is not known, or our books do not explain it: no entries")
        if not self.archive_writable():
            reasons.append("the archive cannot be written")
        return not reasons, {"status": "ready" if not reasons else "not ready", "reasons": reasons}

    def metrics(
        self,
        performance: PerformanceMonitor,
        lag: LoopLag,
        memory: MemorySampler,
        gauges: Mapping[str, tuple[str, float]],
    ) -> str:
        """Prometheus text. Args: gauges: name to (help, value), as the parts state them."""
        loop = lag.statistics()
        own = [
            Metric.gauge("perpd_memory_pss_bytes", "PSS of the process tree", memory.pss_mb_last * MB),
            Metric.gauge("perpd_memory_pss_peak_bytes", "Highest PSS sampled", memory.pss_mb_peak * MB),
            Metric.gauge("perpd_memory_limit_bytes", "Memory limit in force", memory.limit_mb * MB),
            Metric.gauge("perpd_loop_lag_p99_seconds", "Event loop lag, recent p99", loop.p99_ms / 1000),
            Metric.gauge("perpd_loop_lag_max_seconds", "Event loop lag, longest", loop.longest_ms / 1000),
            Metric.gauge("perpd_symbols_fresh", "Symbols whose series are all fresh", self._fresh),
            Metric.gauge("perpd_symbols_stale", "Symbols skipped as stale in the last cycle", self._stale),
            Metric.gauge("perpd_ready", "1 when ready", float(self.ready()[0])),
        ]
        parts = [Metric.gauge(name, words, value) for name, (words, value) in gauges.items()]
        return render([*own, *parts, *performance_metrics(performance)])
