"""What a strategy sees of a row of the candle store, with what a worker remembers of it.

Made anew for every symbol of every cycle, so it reads the row's state once.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from service.analysis.series import SeriesMemo
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS
from service.strategies.base import Candles, MarketView

T = TypeVar("T")

CLOCK_TIMEFRAME = "5m"
"""Its newest candle dates a result."""

_CLOCK_MS = TIMEFRAME_MS[CLOCK_TIMEFRAME]


class RowView(MarketView):
    """A MarketView of one row, of use as long as the row does not change."""

    __slots__ = ("_memo", "_row", "_state", "_store")

    def __init__(
        self,
        store: CandleStore,
        row: int,
        symbol: str,
        memo: SeriesMemo | None = None,
        state: Sequence[int] | None = None,
    ) -> None:
        """Args: memo: of this store, None remembers nothing; state: the row's, when it is at hand."""
        self.symbol = symbol
        self._store = store
        self._row = row
        self._state = state = store.state(row) if state is None else state
        self.candle_close_ms = store.last_open_ms(row, CLOCK_TIMEFRAME, state) + _CLOCK_MS
        self._memo = memo

    def candles(self, timeframe: str) -> Candles:
        store = self._store
        # the named constructor costs twice as much, and this runs for every series
        return tuple.__new__(Candles, store.columns(self._row, timeframe, store.candles))

    def remember(self, timeframe: str, compute: Callable[..., T], *arguments: Any) -> T:
        if self._memo is None:
            return super().remember(timeframe, compute, *arguments)
        version = self._state[self._store.version_at[timeframe]]
        result: T = self._memo.recall(self._row, version, self.candles, timeframe, compute, arguments)
        return result
