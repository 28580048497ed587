"""Prometheus text format 0.0.4, from plain numbers.

Names are perpd_<part>_<what>_<unit>: base units only (seconds, bytes), counters end in _total.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, Self

import msgspec

from service.monitor.performance import Percentiles, PerformanceMonitor, cache_use

Kind = Literal["counter", "gauge"]
Sample = tuple[Mapping[str, str], float]
"""Labels and value."""

_NAME = re.compile(r"perpd_[a-z0-9_]*[a-z0-9]")
_LABEL = re.compile(r"[a-z_][a-z0-9_]*")


class Metric(msgspec.Struct, frozen=True):
    """One metric with its samples; those of one metric differ in their labels."""

    name: str
    kind: Kind
    help: str
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        """Raises ValueError: a name that breaks the convention."""
        if not _NAME.fullmatch(self.name) or self.name.endswith("_total") != (self.kind == "counter"):
            raise ValueError(f"not a name for a {self.kind}: {self.name!r}")

    @classmethod
    def gauge(cls, name: str, help: str, value: float) -> Self:
        return cls(name, "gauge", help, (({}, value),))

    @classmethod
    def counter(cls, name: str, help: str, value: float) -> Self:
        return cls(name, "counter", help, (({}, value),))

    @classmethod
    def by(cls, label: str, name: str, kind: Kind, help: str, values: Mapping[str, float]) -> Self:
        """One sample for each value of one label."""
        return cls(name, kind, help, tuple(({label: key}, value) for key, value in values.items()))


def render(metrics: Iterable[Metric]) -> str:
    """The page. Metrics without samples are left out. Raises ValueError: a name twice, or a bad label."""
    lines: list[str] = []
    seen: set[str] = set()
    for metric in metrics:
        if not metric.samples:
            continue
        if metric.name in seen:
            raise ValueError(f"metric {metric.name} twice")
        seen.add(metric.name)
        lines.append(f"# HELP {metric.name} {_escape(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        lines.extend(f"{metric.name}{_labels(labels)} {_number(value)}" for labels, value in metric.samples)
    return "\n".join(lines) + "\n" if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    for name in labels:
        if not _LABEL.fullmatch(name):
            raise ValueError(f"not a label: {name!r}")
    inside = ",".join(f'{name}="{_escape(value, quotes=True)}"' for name, value in labels.items())
    return f"{{{inside}}}"


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def performance_metrics(performance: PerformanceMonitor) -> list[Metric]:
    """Operations, counters and caches of the monitor, labelled with their names."""
    totals, counters = performance.totals(), performance.counters
    recent = performance.recent_percentiles()
    counts = {kind: total.count for kind, total in totals.items()}
    seconds = {kind: total.seconds for kind, total in totals.items()}
    hit_fractions = {name: use.hit_fraction for name, use in cache_use(counters).items()}
    return [
        Metric.by("operation", "perpd_operations_total", "counter", "Operations done.", counts),
        Metric.by(
            "operation", "perpd_operation_seconds_total", "counter", "Time spent in operations.", seconds
        ),
        *(_quantile(recent, name, words) for name, words in _QUANTILES.items()),
        Metric.by("event", "perpd_events_total", "counter", "What parts counted.", counters),
        Metric.by("cache", "perpd_cache_hit_ratio", "gauge", "Hits of all lookups, 0 to 1.", hit_fractions),
    ]


_QUANTILES = {
    "p50": "Median of the last operations.",
    "p95": "95th percentile of the same.",
    "p99": "99th percentile of the same.",
}


def _quantile(recent: Mapping[str, Percentiles], name: str, words: str) -> Metric:
    values = {kind: float(getattr(found, name)) for kind, found in recent.items()}
    return Metric.by("operation", f"perpd_operation_{name}_seconds", "gauge", words, values)
