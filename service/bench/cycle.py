"""`perpd bench cycle`: what one cycle of the whole strategy costs, beside the floor of its TA-Lib calls."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bench.analysis_process import analysing, measure_in_loop
from service.bench.machine import machine
from service.bench.processes import BenchFailed, answer_of, command, cpu_s, environment
from service.bench.result import Figure, Result, quantile

if TYPE_CHECKING:
    from service.analysis.analyzer import AnalysisResult, ParallelAnalyzer
    from service.analysis.inline import InlineExecutor
    from service.analysis.nursery import Nursery
    from service.analysis.pool import NurseryPool
    from service.bench.market import Rounds
    from service.market.candles import CandleStore
    from service.records import Load

NAME = "cycle"
SUMMARY = "wall and CPU time of one cycle's analysis, and the floor of its TA-Lib calls"
MEASURES = (
    "ParallelAnalyzer over the worker pool, the founding strategy, a seeded market. A 5m candle of every "
    "symbol closes before each cycle, so every symbol is computed; candles of 15m and 1h close as the clock "
    "says, and what depends on such a series alone is reused while it stands. Floor: the TA-Lib calls of a "
    "full computation, all series, nothing reused, on the same data in one loop of one process, in turns "
    "with the cycles. All changed: the venue also corrects the newest candle of 15m and 1h of every symbol "
    "before each cycle, so no series is reused. CPU: daemon side, nursery and workers together. Dispatch: "
    "the same cycle with a strategy that looks at nothing. Idle and busy: batch factors 2 and 1; idle "
    "unless said."
)
WARM_UP_ROUNDS = 3
GOALS_MS = {(200, 200, 2): 30.0, (650, 500, 2): 120.0}  # symbols, candles, workers
FLOOR_GOAL = 4.0
GC_GOAL_MS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="1 to 700 (default 200)")
    parser.add_argument("--candles", type=int, default=200, metavar="M", help="120 to 500 (default 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument("--rounds", type=int, default=40, metavar="R", help="cycles measured (default 40)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    parameters = {name: getattr(args, name) for name in ("symbols", "candles", "workers", "rounds", "seed")}
    with tempfile.TemporaryDirectory(prefix="perpd-bench-") as directory:
        market = {
            "directory": directory,
            "symbols": args.symbols,
            "candles": args.candles,
            "rounds": 4 * (WARM_UP_ROUNDS + args.rounds),  # idle, all changed, busy, nothing
            "seed": args.seed,
        }
        answer_of("service.bench.market", market)
        found = answer_of("service.bench.cycle", {"directory": directory, **parameters})
    return Result(NAME, MEASURES, parameters, facts, figures(found, parameters), found)


def figures(found: dict[str, Any], parameters: dict[str, Any]) -> tuple[Figure, ...]:
    """Seconds in, milliseconds out. Means of CPU, quantiles of wall time."""
    goal = GOALS_MS.get((parameters["symbols"], parameters["candles"], parameters["workers"]))
    idle, busy, nothing, floor = found["idle"], found["busy"], found["nothing"], found["floor"]
    worst, worst_floor = found["worst"], found["worst_floor"]
    worst_cpu, worst_floor_cpu = statistics.mean(worst["cpu_s"]), statistics.mean(worst_floor["cpu_s"])
    cpu, floor_cpu = statistics.mean(idle["cpu_s"]), statistics.mean(floor["cpu_s"])
    wall, floor_wall = statistics.median(idle["wall_s"]), statistics.median(floor["wall_s"])
    return (
        Figure("cycle wall p50", wall * 1000, "ms", "less", goal),
        Figure("cycle wall p95", quantile(idle["wall_s"], 0.95) * 1000, "ms", "less", goal),
        Figure("cycle wall max", max(idle["wall_s"]) * 1000, "ms", "less"),
        Figure("cycle CPU mean", cpu * 1000, "ms", "less"),
        Figure("floor wall p50", floor_wall * 1000, "ms"),
        Figure("floor CPU mean", floor_cpu * 1000, "ms"),
        Figure("floor CPU mean, caches warm", statistics.mean(floor["warm_cpu_s"]) * 1000, "ms"),
        Figure("CPU over floor", cpu / floor_cpu, "times", "less", FLOOR_GOAL),
        Figure("wall over floor", wall / floor_wall, "times", "less"),
        Figure("cycle wall p50, all changed", statistics.median(worst["wall_s"]) * 1000, "ms", "less", goal),
        Figure("cycle CPU mean, all changed", worst_cpu * 1000, "ms", "less"),
        Figure("CPU over floor, all changed", worst_cpu / worst_floor_cpu, "times", "less"),
        Figure("strategy alone, one loop, CPU mean", statistics.mean(floor["strategy_cpu_s"]) * 1000, "ms"),
        Figure("dispatch wall p50", statistics.median(nothing["wall_s"]) * 1000, "ms", "less"),
        Figure("dispatch CPU mean", statistics.mean(nothing["cpu_s"]) * 1000, "ms", "less"),
        Figure("cycle wall p50, busy", statistics.median(busy["wall_s"]) * 1000, "ms", "less", goal),
        Figure("cycle CPU mean, busy", statistics.mean(busy["cpu_s"]) * 1000, "ms", "less"),
        Figure("collection p50", statistics.median(idle["collect_s"]) * 1000, "ms", "less", GC_GOAL_MS),
        Figure("collection max", max(idle["collect_s"]) * 1000, "ms", "less", GC_GOAL_MS),
        Figure("TA-Lib calls of a full computation", statistics.mean(floor["calls"]), "calls"),
        Figure("TA-Lib calls made a cycle", statistics.mean(floor["calls_made"]), "calls"),
        Figure("series parts reused a cycle", statistics.mean(idle["series_reused"]), "parts"),
        Figure("series parts computed a cycle", statistics.mean(idle["series_computed"]), "parts"),
        Figure("signals a cycle", statistics.mean(idle["signals"]), "signals"),
        Figure("batches, idle", idle["batches"], "batches"),
        Figure("batches, busy", busy["batches"], "batches"),
    )


# -- in the fresh process


async def _measure(spec: dict[str, Any], nursery: "Nursery | None") -> dict[str, Any]:
    from service.records import Load

    nothing = f"{Path(__file__).with_name('nothing.py')}:Nothing"
    async with analysing(spec, nursery) as opened:
        bench = _Bench(opened.store, opened.rounds, opened.pool, opened.settings, spec["rounds"])
        idle = await bench.run("ict_smc", Load(0.0, 0.0), with_floor=True)
        floor, bench.floor = bench.floor, {}
        worst = await bench.run("ict_smc", Load(0.0, 0.0), with_floor=True, all_change=True)
        worst_floor = bench.floor
        busy = await bench.run("ict_smc", Load(1.0, 1.0))
        dispatch = await bench.run(nothing, Load(0.0, 0.0))
    return {
        "idle": idle,
        "worst": worst,
        "busy": busy,
        "nothing": dispatch,
        "floor": floor,
        "worst_floor": worst_floor,
    }


class _Bench:
    """Cycles over one store, each after a candle of every symbol closed."""

    def __init__(
        self,
        store: "CandleStore",
        market: "Rounds",
        pool: "NurseryPool | InlineExecutor",
        settings: Any,
        rounds: int,
    ) -> None:
        self._store = store
        self._places = store.symbols()
        row_of = {symbol: row for row, symbol in self._places}
        self._rows = [row_of[symbol] for symbol in market.symbols]
        self._following = zip(market.candles, market.longer, strict=True)
        self._now_ms = market.start_ms
        self._pool = pool
        self._settings = settings
        self._rounds = rounds
        self.floor: dict[str, list[float]] = {}

    async def run(
        self, strategy: str, load: "Load", *, with_floor: bool = False, all_change: bool = False
    ) -> dict[str, Any]:
        """Lists with one entry a cycle, after the warm-up."""
        import gc

        from service.analysis.analyzer import ParallelAnalyzer
        from service.settings import StrategySettings

        analyzer = ParallelAnalyzer(
            self._pool, self._store.path, self._settings, StrategySettings(name=strategy), _Silent()
        )
        floor = _start_floor(self._store.path) if with_floor else None
        names = ("wall_s", "cpu_s", "collect_s", "signals", "series_reused", "series_computed")
        found: dict[str, Any] = {name: [] for name in names}
        try:
            for _ in range(WARM_UP_ROUNDS):
                await self._cycle(analyzer, load, all_change)
                _ask(floor)
            gc.collect()
            gc.freeze()  # as the daemon does once it trades
            for _ in range(self._rounds):
                result, cycle = await self._cycle(analyzer, load, all_change)
                for name, value in cycle.items():
                    found[name].append(value)
                for name, value in _ask(floor).items():
                    self.floor.setdefault(name, []).append(value)
        finally:
            analyzer.close()
            if floor is not None:
                floor.communicate()
        return {**found, "batches": result.batches, "batch_symbols": result.batch_symbols}

    def _close_candles(self, *, all_change: bool) -> None:
        candles, longer = next(self._following)
        for timeframe, closed in {"5m": candles, **longer}.items():
            for row, candle in zip(self._rows, closed, strict=True):
                self._store.append(row, timeframe, [candle])
        for timeframe in ("15m", "1h") if all_change else ():
            for row in self._rows:
                newest = self._store.last_open_ms(row, timeframe)
                open_ms, open_, high, low, close, volume = self._store.rows_since(row, timeframe, newest)[0]
                self._store.append(row, timeframe, [(open_ms, open_, high, low, close, volume + 1.0)])

    async def _cycle(
        self, analyzer: "ParallelAnalyzer", load: "Load", all_change: bool
    ) -> tuple["AnalysisResult", dict[str, float]]:
        import gc
        import time

        self._close_candles(all_change=all_change)
        self._now_ms += 300_000
        cpu_before_s, began_s = self._cpu_s(), time.perf_counter()
        result = await analyzer.analyse(self._places, self._now_ms, load)
        analysed_s = time.perf_counter()
        used_s = self._cpu_s() - cpu_before_s
        collected_s = time.perf_counter()
        gc.collect()
        if result.analysed != len(self._places):
            raise BenchFailed(f"{result.analysed} of {len(self._places)} symbols analysed: {result.failed}")
        return result, {
            "wall_s": analysed_s - began_s,
            "cpu_s": used_s,
            "collect_s": time.perf_counter() - collected_s,
            "signals": len(result.signals),
            "series_reused": result.series_reused,
            "series_computed": result.series_computed,
        }

    def _cpu_s(self) -> float:
        import os

        pids = [os.getpid(), *self._pool.pids]
        nursery_pid = getattr(self._pool, "nursery_pid", 0)
        return sum(map(cpu_s, [*pids, nursery_pid] if nursery_pid else pids))


class _Silent:
    """A recorder that keeps nothing."""

    def record(self, operation: str, seconds: float) -> None:
        """Dropped."""

    def count(self, name: str, amount: int = 1) -> None:
        """Dropped."""


def _start_floor(store_path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("service.bench.floor", {"store": str(store_path)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def _ask(floor: "subprocess.Popen[str] | None") -> dict[str, float]:
    """One round of the floor; nothing else of ours runs meanwhile."""
    if floor is None:
        return {}
    assert floor.stdin is not None
    assert floor.stdout is not None
    floor.stdin.write("round\n")
    floor.stdin.flush()
    line = floor.stdout.readline()
    if not line:
        raise BenchFailed("the floor's process ended early")
    answer: dict[str, float] = json.loads(line)
    return answer


if __name__ == "__main__":
    measure_in_loop(json.loads(sys.argv[1]), _measure)
