"""What strategies computed from one series alone, kept in a worker until that series changes.

Two of three 5m closes come without a 15m candle and eleven of twelve without one of 1h: what `analyse` makes
of these series is the same again. See `MarketView.remember`.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from service.strategies.base import MAX_REMEMBERED_BYTES, Candles, size_to_remember

MAX_FUNCTIONS = 8
"""Of all timeframes together; another one takes the place of the oldest."""

Compute = Callable[..., Any]


class _Known(msgspec.Struct, frozen=True, gc=False):
    """One result. The version vouches for the series, whoever owned the row before."""

    version: int
    arguments: tuple[Any, ...]
    result: Any


class SeriesMemo:
    """At most one result a row of the store for each of a few functions; its worker's, and gone with it.

    A row of the store, a timeframe and a version name one state of a series: a symbol that takes over a row
    finds another version, and the number of candles is the store's.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, Compute], dict[int, _Known]] = {}
        self._reused = self._computed = 0

    def recall(
        self,
        row: int,
        version: int,
        read: Callable[[str], Candles],
        timeframe: str,
        compute: Compute,
        arguments: tuple[Any, ...],
    ) -> Any:
        """What `compute` makes of the series at this version. Raises what it raises, StrategyBroke."""
        of_function = self._known.get((timeframe, compute))
        if of_function is None:
            of_function = self._begin(timeframe, compute)
        known = of_function.get(row)
        if known is not None and known.version == version and known.arguments == arguments:
            self._reused += 1
            return known.result
        self._computed += 1
        result = compute(read(timeframe), *arguments)
        if size_to_remember((arguments, result)) <= MAX_REMEMBERED_BYTES:
            of_function[row] = _Known(version, arguments, result)
        else:
            of_function.pop(row, None)
        return result

    def _begin(self, timeframe: str, compute: Compute) -> dict[int, _Known]:
        if len(self._known) >= MAX_FUNCTIONS:
            del self._known[next(iter(self._known))]
        return self._known.setdefault((timeframe, compute), {})

    def discard(self, row: int) -> None:
        """Forget a row that was written while it was read."""
        for of_function in self._known.values():
            of_function.pop(row, None)

    def take_counts(self) -> tuple[int, int]:
        """Results reused and computed since the last call."""
        counts = self._reused, self._computed
        self._reused = self._computed = 0
        return counts
