"""What a run did, counted while it runs and logged as its last line."""

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import structlog

log = structlog.get_logger("perpd")


class RunSummary:
    """Counters of one run. `snapshot` holds what only open parts can tell; the daemon takes it last."""

    def __init__(self) -> None:
        self.began = False  # once the first cycle may come: a start that fails has nothing to sum up
        self.cycles = 0
        self.symbols = 0
        self.shed = 0
        self.signals = 0
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.exit_reason = "error"
        self.snapshot: dict[str, Any] = {
            "orders": 0,
            "fills": 0,
            "positions_open": 0,
            "positions_closed": 0,
            "symbols_cooling": 0,
            "shadow_open": 0,
            "shadow_closed": 0,
            "equity": None,
            "exchange_equity": None,
        }
        self.measured: dict[str, Any] = dict.fromkeys(
            (
                "cycle_ms_p50",
                "cycle_ms_p99",
                "analysis_ms_p50",
                "close_to_signal_ms_p50",
                "close_to_signal_ms_p95",
                "close_to_signal_ms_max",
                "features_hit_fraction",
                "features_memory_hits",
                "features_tier_hits",
                "features_misses",
                "features_saved_ms",
                "loop_lag_ms_p99",
                "pss_mb_last",
                "pss_mb_peak",
                "advice",
            )
        )
        self.archived: Mapping[str, int] = {}

    def log(self) -> None:
        """Write the last line of the run."""
        fields = {
            "cycles": self.cycles,
            "symbols": self.symbols,
            "shed": self.shed,
            "signals": self.signals,
            "accepted": self.accepted,
            "refused": dict(sorted(self.refused.items())),
            **self.snapshot,
            "archived": dict(self.archived),
            **self.measured,
            "exit_reason": self.exit_reason,
        }
        log.info("run summary", **{key: _money(value) for key, value in fields.items()})


def _money(value: Any) -> Any:
    """Amounts are shown to a hundredth of a cent; the books keep every digit."""
    return float(round(value, 4)) if isinstance(value, Decimal) else value
