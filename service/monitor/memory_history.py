"""The tree's memory over a month in a few KB: a point each minute for an hour, each hour for a month."""

import math
import time
from array import array
from collections.abc import Callable
from typing import NamedTuple

MINUTES, HOURS = 60, 31 * 24
_NAN = float("nan")


class Point(NamedTuple):
    """One span of time. Ages and values are those of its samples: lowest, mean, highest, in MB."""

    age_s: float  # from the span's end until now; 0 for the one under way
    low: float
    mean: float
    high: float


class _Ring:
    """The last `spans` spans of equal length, three 4-byte numbers each; one without a sample is empty."""

    def __init__(self, span_s: float, spans: int) -> None:
        self._span_s = span_s
        self._low, self._mean, self._high = (array("f", [_NAN]) * spans for _ in range(3))
        self._current = -1  # number of the span under way
        self._samples = 0

    def add(self, value: float, at_s: float) -> None:
        number = int(at_s / self._span_s)
        if number > self._current:
            self._begin(number)
        place = number % len(self._mean)
        self._samples += 1
        if self._samples == 1:
            self._low[place] = self._mean[place] = self._high[place] = value
            return
        self._low[place] = min(self._low[place], value)
        self._high[place] = max(self._high[place], value)
        self._mean[place] += (value - self._mean[place]) / self._samples

    def _begin(self, number: int) -> None:
        """Enter a span; those that passed without a sample are emptied."""
        spans = len(self._mean)
        passed = range(max(self._current + 1, number - spans + 1), number + 1) if self._current >= 0 else ()
        for each in passed:
            self._low[each % spans] = self._mean[each % spans] = self._high[each % spans] = _NAN
        self._current, self._samples = number, 0

    def points(self, at_s: float) -> list[Point]:
        """Those with samples, oldest first."""
        found = []
        for number in range(max(self._current - len(self._mean) + 1, 0), self._current + 1):
            place = number % len(self._mean)
            if not math.isnan(self._mean[place]):
                age_s = max(at_s - (number + 1) * self._span_s, 0.0)
                found.append(Point(age_s, self._low[place], self._mean[place], self._high[place]))
        return found


class MemoryHistory:
    """What each sample said, at falling resolution. About 10 KB for ever; a restart begins anew."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._began_s = monotonic_s()
        self._minutes = _Ring(60.0, MINUTES)
        self._hours = _Ring(3_600.0, HOURS)

    def add(self, pss_mb: float) -> None:
        """Note one sample of the tree's PSS."""
        at_s = self._at_s()
        self._minutes.add(pss_mb, at_s)
        self._hours.add(pss_mb, at_s)

    def minutes(self) -> list[Point]:
        """Of the last hour, oldest first."""
        return self._minutes.points(self._at_s())

    def hours(self) -> list[Point]:
        """Of the last 31 days, oldest first."""
        return self._hours.points(self._at_s())

    def _at_s(self) -> float:
        return self._monotonic_s() - self._began_s
