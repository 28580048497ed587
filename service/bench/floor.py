"""The floor under a cycle: the strategy's own TA-Lib calls over the same data, in one loop, in one process.

The calls are those of a full computation, all series, nothing reused. They are noted while the strategy runs
over every row, with their very arguments, then made again with nothing around them: at the beginning of the
next round, when others have used the processor's caches since, as it is for a cycle's workers, and at once,
when the caches hold all of it. How many of them a cycle makes that reuses the series which did not change is
counted beside it. Asked one line at a time, so that floor and cycles take turns on the same noisy machine.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.analysis.series import SeriesMemo

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class _Noting:
    """Stands where the indicators expect TA-Lib and notes each call on its way."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def noted(*arguments: Any) -> Any:
            self.calls.append((function, arguments))
            return function(*arguments)

        return noted


class Floor:
    """The strategy and the store, attached as a worker attaches them."""

    def __init__(self, store_path: Path) -> None:
        from service.analysis.nursery import preload
        from service.analysis.series import SeriesMemo
        from service.market.candles import CandleStore
        from service.strategies.loader import load_strategy

        preload()
        self._store = CandleStore.attach(store_path)
        self._memo = SeriesMemo()
        self._strategy = load_strategy("ict_smc", {})
        self._calls: list[Call] = []  # of the last round
        gc.disable()  # the floor pays for no collection: it is what cannot be undercut

    def round(self) -> dict[str, float]:
        """One measurement over all rows as they are now. Seconds, and the numbers of calls.

        The arguments are views of the store, so the calls of the last round work on candles of now, too.
        """
        if not self._calls:
            self._calls = self._noted(None)
        wall_s, cpu_s = _timed(self._make_calls)
        strategy_wall_s, strategy_cpu_s = _timed(self._analyse_all)
        calls_made = len(self._noted(self._memo))
        self._calls = self._noted(None)
        _, warm_cpu_s = _timed(self._make_calls)
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "warm_cpu_s": warm_cpu_s,
            "calls": len(self._calls),
            "calls_made": calls_made,
            "strategy_wall_s": strategy_wall_s,
            "strategy_cpu_s": strategy_cpu_s,
        }

    def _make_calls(self) -> None:
        for function, arguments in self._calls:
            function(*arguments)

    def _noted(self, memo: "SeriesMemo | None") -> list[Call]:
        import talib

        from service.analysis import indicators

        noting = _Noting(talib)
        vars(indicators)["talib"] = noting
        try:
            self._analyse_all(memo)
        finally:
            vars(indicators)["talib"] = talib
        return noting.calls

    def _analyse_all(self, memo: "SeriesMemo | None" = None) -> None:
        from service.analysis.row_view import RowView

        for row, symbol in self._store.symbols():
            self._strategy.analyse(RowView(self._store, row, symbol, memo))


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def _serve(spec: dict[str, Any]) -> None:
    """One answer for each line of input, until its end."""
    floor = Floor(Path(spec["store"]))
    for _ in sys.stdin:
        print(json.dumps(floor.round()), flush=True)  # noqa: T201


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
