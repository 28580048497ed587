"""What the open parts state about themselves, as gauges for /metrics: name to (help, value)."""

from collections.abc import Mapping

from service.archive.archiver import ArchiveStatistics
from service.archive.keeper import Keeper
from service.cycle import CLOSE_TO_SIGNAL, Parts
from service.learning.feature_cache import CacheStatistics
from service.monitor.performance import PerformanceMonitor
from service.store.lease import Lease
from service.trading.halting import KillSwitch

Gauges = Mapping[str, tuple[str, float]]


def trading_gauges(parts: Parts, kill: KillSwitch | None, lease: Lease, shed: int) -> Gauges:
    """Args: shed: symbols that the last cycle did not reach."""
    executor, account = parts.executor, parts.equity.account
    unprotected = max((seconds for _, seconds in executor.unprotected()), default=0.0)
    severity = kill.level.severity + 1 if kill and kill.level else 0
    gauges = {
        "perpd_positions_open": ("Positions open", float(len(executor.positions()))),
        "perpd_shadow_positions_open": ("Shadow positions open", float(parts.shadows.open_count)),
        "perpd_symbols_cooling": (
            "Symbols on which nothing is opened for a while after a stop",
            float(len(executor.cooling())),
        ),
        "perpd_unprotected_seconds": ("Longest time a position now lacks its stop", unprotected),
        "perpd_symbols_shed": ("Symbols the last cycle did not reach before its deadline", float(shed)),
        "perpd_event_queue_depth": ("Private stream events waiting", float(executor.queue_depth)),
        "perpd_repair_queue_depth": (
            "Series waiting for repair",
            float(parts.feed.statistics()["depth"]),
        ),
        "perpd_lease_epoch": ("Fencing token of the lease on the account", float(lease.epoch)),
        "perpd_lease_held": ("1 while orders may be sent", float(not lease.may_send())),
        "perpd_kill_level": ("0 free, 1 no entries, 2 reduce only, 3 flatten", float(severity)),
    }
    if account is not None:
        gauges["perpd_equity"] = ("Equity with open positions, quote currency", float(account.equity))
    return gauges


def archive_gauges(archive: ArchiveStatistics, keeper: Keeper) -> Gauges:
    return {
        "perpd_archive_disk_bytes": ("Bytes of the archive on disk", float(keeper.disk_bytes)),
        "perpd_archive_disk_free_bytes": ("Bytes free on its disk", float(keeper.disk_free_bytes)),
        "perpd_archive_journal_bytes": ("Bytes in its journal", float(archive.journal_bytes)),
        "perpd_archive_writable": ("1 when the archive can be written", float(archive.writable)),
    }


def cache_gauges(cache: CacheStatistics) -> Gauges:
    return {
        "perpd_features_entries": ("Results the feature cache holds in memory", float(cache.entries)),
        "perpd_features_hit_ratio": ("Share of results that need not be computed", cache.hit_fraction),
        "perpd_features_saved_seconds": ("Wall time the feature cache saved, lookups paid", cache.saved_s),
        "perpd_features_tier_failures": ("Times the cache's second tier failed", float(cache.tier_failures)),
    }


def delay_gauges(monitor: PerformanceMonitor) -> Gauges:
    """From a candle's close to its signal, one sample a cycle: the last cycles and the longest of all."""
    recent, ever = monitor.percentiles(CLOSE_TO_SIGNAL), monitor.totals().get(CLOSE_TO_SIGNAL)
    if recent is None or ever is None:
        return {}
    words = "Wall time per cycle from a candle's close to its latest signal being ready"
    return {
        "perpd_close_to_signal_p50_seconds": (f"{words}, recent median", recent.p50),
        "perpd_close_to_signal_p95_seconds": (f"{words}, recent 95th percentile", recent.p95),
        "perpd_close_to_signal_max_seconds": (f"{words}, longest", ever.longest_s),
    }
