"""How long operations take and how often things happen, in memory that never grows.

The last 500 operations of all kinds and the last 100 of each kind are kept as numbers in arrays; totals
are kept for ever. A length of 0 keeps everything, as the founding report's "before" did per kind, and then
it grows. Durations are wall seconds.
"""

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from service.ports import Clock
from service.settings import MonitorSettings

_KINDS_LIMIT = 256
OTHER = "other"
"""Where operations and counts go whose names would exceed the table: names come from code, not from data."""


class Window:
    """The last `size` numbers, in one array; of size 0, all of them.

    Args: code: of the array's items; "H" holds whole numbers up to 65,535 in a quarter of the space.
    """

    def __init__(self, size: int, code: Literal["d", "H"] = "d") -> None:
        self._values: array[Any] = array(code)
        self._size = size
        self._next = 0

    def add(self, value: float) -> None:
        if self._size and len(self._values) == self._size:
            self._values[self._next] = value
            self._next = (self._next + 1) % self._size
            return
        self._values.append(value)
        if len(self._values) == self._size:
            self._values = self._values[:]  # full: without the room that an array keeps for growing

    def values(self) -> list[float]:
        """Oldest first."""
        return [*self._values[self._next :], *self._values[: self._next]]

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size_bytes(self) -> int:
        """What the numbers take, with the room their array keeps for growing."""
        return sys.getsizeof(self._values)


def percentile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between closest ranks, as numpy's default. Args: ordered: ascending, not empty."""
    position = (len(ordered) - 1) * fraction
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Percentiles(msgspec.Struct, frozen=True):
    """Of the last operations of one kind, in seconds; `count` says how many these are."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    last: float


class Totals(msgspec.Struct, frozen=True):
    """Of one kind of operation since the start."""

    count: int
    seconds: float
    longest_s: float
    per_second: float  # operations per wall second since the start

    @property
    def mean_s(self) -> float:
        return self.seconds / self.count


class CacheUse(msgspec.Struct, frozen=True):
    """How often a cache had what was asked of it, since the start."""

    hits: int
    misses: int

    @property
    def hit_fraction(self) -> float:
        return self.hits / (self.hits + self.misses)


def cache_use(counters: Mapping[str, int]) -> dict[str, CacheUse]:
    """Each cache that was asked, by name: one counts NAME.misses and NAME.hits, or NAME.TIER_hits by tier.

    The analyser keeps the result of a symbol whose candles did not change: that is a cache too.
    """
    hits: Counter[str] = Counter({"analysis results": counters.get("analysis.reused", 0)})
    misses: Counter[str] = Counter({"analysis results": counters.get("analysis.analysed", 0)})
    for key, count in counters.items():
        name, _, what = key.rpartition(".")
        if what == "hits" or what.endswith("_hits"):
            hits[name] += count
        elif what == "misses":
            misses[name] += count
    asked = hits + misses
    return {name: CacheUse(hits=hits[name], misses=misses[name]) for name in sorted(asked)}


class _Kind:
    def __init__(self, number: int, window: int) -> None:
        self.number = number
        self.window = Window(window)
        self.count = 0
        self.seconds = 0.0
        self.longest_s = 0.0


class PerformanceMonitor:
    """Where parts report what they do. Implements `ports.Recorder`; never raises.

    It never grows, except where the settings ask it to keep all operations.
    """

    def __init__(self, settings: MonitorSettings, clock: Clock) -> None:
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._per_kind = settings.operations_per_kind
        self._kinds: dict[str, _Kind] = {}
        self._recent_kinds = Window(settings.operations, "H")
        self._recent_seconds = Window(settings.operations)
        self._counters: dict[str, int] = {}

    def record(self, operation: str, seconds: float) -> None:
        """Note one operation. Args: seconds: wall time it took."""
        kind = self._kinds.get(operation)
        if kind is None:
            kind = self._new_kind(operation)
        kind.count += 1
        kind.seconds += seconds
        kind.longest_s = max(kind.longest_s, seconds)
        kind.window.add(seconds)
        self._recent_kinds.add(kind.number)
        self._recent_seconds.add(seconds)

    def _new_kind(self, operation: str) -> _Kind:
        if len(self._kinds) >= _KINDS_LIMIT:
            operation = OTHER
        return self._kinds.setdefault(operation, _Kind(len(self._kinds), self._per_kind))

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that lives until the end."""
        if name not in self._counters and len(self._counters) >= _KINDS_LIMIT:
            name = OTHER
        self._counters[name] = self._counters.get(name, 0) + amount

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Time the block, whether it ends well or not."""
        started_s = self._clock.monotonic_s()
        try:
            yield
        finally:
            self.record(name, self._clock.monotonic_s() - started_s)

    def percentiles(self, kind: str) -> Percentiles | None:
        """Of the last operations of a kind; None when there was none."""
        known = self._kinds.get(kind)
        if known is None:
            return None
        values = known.window.values()
        ordered = sorted(values)
        return Percentiles(
            count=len(values),
            mean=sum(values) / len(values),
            p50=percentile(ordered, 0.50),
            p95=percentile(ordered, 0.95),
            p99=percentile(ordered, 0.99),
            last=values[-1],
        )

    def recent_percentiles(self) -> dict[str, Percentiles]:
        """Of each kind that was ever recorded."""
        return {kind: found for kind in self._kinds if (found := self.percentiles(kind)) is not None}

    def totals(self) -> dict[str, Totals]:
        """Every kind since the start."""
        elapsed_s = self._clock.monotonic_s() - self._started_s
        return {
            name: Totals(
                count=kind.count,
                seconds=kind.seconds,
                longest_s=kind.longest_s,
                per_second=kind.count / elapsed_s if elapsed_s > 0 else 0.0,
            )
            for name, kind in self._kinds.items()
        }

    @property
    def history_bytes(self) -> int:
        """What the last operations take, of all kinds and of each kind; totals are apart."""
        windows = [self._recent_kinds, self._recent_seconds, *(kind.window for kind in self._kinds.values())]
        return sum(window.size_bytes for window in windows)

    def recent(self) -> list[tuple[str, float]]:
        """The last operations of all kinds, oldest first: kind and seconds."""
        names = list(self._kinds)
        pairs = zip(self._recent_kinds.values(), self._recent_seconds.values(), strict=True)
        return [(names[int(number)], seconds) for number, seconds in pairs]

    @property
    def recent_count(self) -> int:
        """How many operations `recent` gives."""
        return len(self._recent_seconds)

    def slowest(self, count: int) -> list[tuple[str, float]]:
        """Of the last operations of all kinds those that took longest, longest first: kind and seconds."""
        return sorted(self.recent(), key=lambda one: -one[1])[:count]

    @property
    def counters(self) -> Mapping[str, int]:
        return dict(self._counters)
