"""The analysis of one cycle: batches that follow the load, in parallel, with one order of results."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from service.analysis.batching import batch_size, in_batches
from service.analysis.pool import WorkersUnavailable
from service.analysis.worker import Outcome, Place, StrategyFacts, Task, analyse_batch, describe_strategy
from service.errors import PerpdError, WorkerLost
from service.market.candles import CandleStore
from service.ports import Recorder
from service.records import Load, Signal
from service.settings import AnalysisSettings, StrategySettings

_LANES_PER_WORKER = 2  # batches in flight per worker: one is worked on, one waits beside it
_QUARANTINE_CYCLES, _MAX_QUARANTINE_CYCLES = 10, 1_000

log = structlog.get_logger("analysis.analyzer")


class AnalysisResult(NamedTuple):
    """What one cycle's analysis found. Each symbol is in exactly one of the counts."""

    signals: list[Signal]  # in the order of the rows given
    analysed: int  # computed in this cycle, with or without a signal
    reused: int  # unchanged since an earlier cycle: its result stands
    failed: dict[str, str]  # symbol -> why: the strategy broke on it, or its worker died
    skipped: dict[str, str]  # symbol -> why: its data or its quarantine did not allow an analysis
    batches: int
    batch_symbols: int  # the batch size the load allowed
    seconds: float


class _Known(NamedTuple):
    """The last result of a symbol and the state of its candles it belongs to."""

    row: int
    sequence: int
    outcome: Outcome


class _Quarantine(NamedTuple):
    until_cycle: int
    times: int


class ParallelAnalyzer:
    """Analyses the universe in batches on an executor's workers.

    The result does not depend on batch size, worker count or earlier cycles: a symbol whose candles did
    not change keeps its result, all others are computed from their candles alone.
    """

    def __init__(
        self,
        executor: Executor,
        store_path: Path,
        settings: AnalysisSettings,
        strategy: StrategySettings,
        recorder: Recorder,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises CandleFileInvalid. The store must exist; `close` lets go of it."""
        self._executor = executor
        self._settings = settings
        self._strategy = strategy
        self._recorder = recorder
        self._monotonic_s = monotonic_s
        self._store = CandleStore.attach(store_path)
        self._task = Task(str(store_path), strategy, settings.collect_after_batch)
        self._known: dict[str, _Known] = {}
        self._quarantine: dict[str, _Quarantine] = {}
        self._cycle = 0

    def close(self) -> None:
        """Let go of the candle store and of what earlier cycles left."""
        self._store.close()
        self._known.clear()
        self._quarantine.clear()

    async def describe_strategy(self) -> StrategyFacts:
        """Load the strategy in a worker and say what it needs.

        Raises: StrategyInvalid, SettingsInvalid: it cannot be loaded or refuses its options.
        """
        facts: StrategyFacts = await asyncio.wrap_future(
            self._executor.submit(describe_strategy, self._strategy)
        )
        return facts

    async def analyse(self, places: Sequence[Place], now_ms: int, load: Load) -> AnalysisResult:
        """Analyse every symbol once.

        Args: places: (row, symbol) in the order the signals shall have; now_ms: venue time, for the age
        of new signals; load: decides the batch size.
        Raises: StrategyInvalid, SettingsInvalid, CandleFileInvalid: nothing can be analysed.
        """
        started_s = self._monotonic_s()
        self._cycle += 1
        outcomes: list[Outcome | None] = [self._without_work(place) for place in places]
        due = [index for index, outcome in enumerate(outcomes) if outcome is None]
        size = self._batch_size(load)
        batches = in_batches(due, size)
        await self._run(places, batches, outcomes)
        self._remember(places, outcomes)
        result = self._result(places, outcomes, due, len(batches), size, self._monotonic_s() - started_s)
        self._report(result, [outcomes[index] for index in due], now_ms)
        return result

    def _batch_size(self, load: Load) -> int:
        s = self._settings
        return batch_size(s.workers, load, s.batch_factors, s.memory_thresholds, s.cpu_thresholds)

    def _without_work(self, place: Place) -> Outcome | None:
        """What is known of a symbol without analysing it; None when it must be."""
        row, symbol = place
        held = self._quarantine.get(symbol)
        if held is not None and self._cycle <= held.until_cycle:
            return Outcome(-1, skipped=f"in quarantine until cycle {held.until_cycle}: it cost two workers")
        known = self._known.get(symbol)
        if known is not None and known.row == row and known.sequence == self._store.sequence(row):
            return known.outcome
        return None

    async def _run(
        self, places: Sequence[Place], batches: list[list[int]], outcomes: list[Outcome | None]
    ) -> None:
        """Fill `outcomes`, a few batches at a time; each batch is let go before its lane takes the next."""
        waiting = iter(batches)
        lanes = min(max(self._settings.workers, 1) * _LANES_PER_WORKER, len(batches))
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(lanes):
                    lane = self._lane(places, waiting, outcomes)
                    tasks.create_task(lane, name=f"analysis.lane-{number}")
        except ExceptionGroup as group:
            raise group.exceptions[0] from group  # the lanes fail alike: one error says it

    async def _lane(
        self, places: Sequence[Place], waiting: Iterator[list[int]], outcomes: list[Outcome | None]
    ) -> None:
        for batch in waiting:
            found = await self._batch([places[index] for index in batch])
            for index, outcome in zip(batch, found, strict=True):
                outcomes[index] = outcome
            del found

    async def _batch(self, batch: list[Place]) -> list[Outcome]:
        """A batch, or where it cost a worker, each of its symbols alone."""
        try:
            return await self._submit(batch)
        except WorkersUnavailable as error:
            return [Outcome(-1, failed=str(error)) for _ in batch]
        except WorkerLost as error:
            log.warning("batch lost its worker; its symbols are tried one by one", reason=str(error))
            self._recorder.count("analysis.batches_lost")
        return [await self._single(place) for place in batch]

    async def _single(self, place: Place) -> Outcome:
        try:
            return (await self._submit([place]))[0]
        except WorkersUnavailable as error:
            return Outcome(-1, failed=str(error))
        except WorkerLost as error:
            self._put_in_quarantine(place[1], str(error))
            return Outcome(-1, failed=str(error))

    async def _submit(self, batch: list[Place]) -> list[Outcome]:
        started_s = self._monotonic_s()
        answer = await asyncio.wrap_future(self._executor.submit(analyse_batch, self._task, batch))
        self._recorder.record("analysis.batch", self._monotonic_s() - started_s)
        return _decode(answer)

    def _put_in_quarantine(self, symbol: str, reason: str) -> None:
        before = self._quarantine.get(symbol)
        times = 1 if before is None else before.times + 1
        cycles = min(_QUARANTINE_CYCLES * 2 ** min(times - 1, 20), _MAX_QUARANTINE_CYCLES)
        self._quarantine[symbol] = _Quarantine(self._cycle + cycles, times)
        self._recorder.count("analysis.quarantined")
        log.error("symbol in quarantine: it cost two workers", symbol=symbol, cycles=cycles, reason=reason)

    def _remember(self, places: Sequence[Place], outcomes: Sequence[Outcome | None]) -> None:
        """Keep what may be reused; symbols that left the universe are forgotten."""
        self._known = {
            symbol: _Known(row, outcome.sequence, outcome)
            for (row, symbol), outcome in zip(places, outcomes, strict=True)
            if outcome is not None and outcome.sequence >= 0
        }
        present = {symbol for _, symbol in places}
        self._quarantine = {s: q for s, q in self._quarantine.items() if s in present}

    def _result(
        self,
        places: Sequence[Place],
        outcomes: Sequence[Outcome | None],
        due: Sequence[int],
        batches: int,
        size: int,
        seconds: float,
    ) -> AnalysisResult:
        signals: list[Signal] = []
        failed: dict[str, str] = {}
        skipped: dict[str, str] = {}
        reused = len(places) - len(due)
        fresh = set(due)
        for index, ((_, symbol), outcome) in enumerate(zip(places, outcomes, strict=True)):
            if outcome is None:
                raise PerpdError(f"no result for {symbol}: a lane ended early")
            if outcome.failed:
                failed[symbol] = outcome.failed
            elif outcome.skipped:
                skipped[symbol] = outcome.skipped
                reused -= index not in fresh
            elif outcome.signal is not None:
                signals.append(outcome.signal)
        analysed = len(places) - reused - len(failed) - len(skipped)
        return AnalysisResult(signals, analysed, reused, failed, skipped, batches, size, seconds)

    def _report(self, result: AnalysisResult, fresh: Sequence[Outcome | None], now_ms: int) -> None:
        record, count = self._recorder.record, self._recorder.count
        record("analysis.cycle", result.seconds)
        for name in ("analysed", "reused"):
            count(f"analysis.{name}", getattr(result, name))
        for name, symbols in (("failed", result.failed), ("skipped", result.skipped)):
            count(f"analysis.{name}", len(symbols))
        for outcome in fresh:
            if outcome is not None and outcome.signal is not None:
                age_ms = now_ms - outcome.signal.candle_close_ms
                record("analysis.close_to_signal", age_ms / 1000 + result.seconds)
        if result.failed:
            symbol, reason = next(iter(result.failed.items()))
            log.warning("strategy failed", symbols=len(result.failed), first=symbol, reason=reason)


_decode = msgspec.msgpack.Decoder(list[Outcome]).decode
