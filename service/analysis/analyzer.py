"""The analysis of one cycle: batches that follow the load, in parallel, with one order of results."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from service.analysis.backlog import Backlog
from service.analysis.batching import batch_size, in_batches
from service.analysis.executor import AnalysisExecutor
from service.analysis.pool import WorkersUnavailable
from service.analysis.row_view import CLOCK_TIMEFRAME
from service.analysis.worker import (
    BatchAnswer,
    Outcome,
    Place,
    StrategyFacts,
    Task,
    analyse_batch,
    describe_strategy,
)
from service.errors import WorkerLost
from service.learning.code_version import code_version
from service.learning.feature_cache import FeatureCache
from service.learning.identity import CandleIdentity, Key, Lookup
from service.learning.loaded_modules import decode_modules, loaded_modules
from service.market.candles import CandleStore
from service.ports import Recorder
from service.records import TIMEFRAME_MS, Load, Signal
from service.settings import AnalysisSettings, StrategySettings

_LANES_PER_WORKER = 2  # batches in flight per worker: one is worked on, one waits beside it
_PATIENCE_S = 0.01
_CLOCK_MS = TIMEFRAME_MS[CLOCK_TIMEFRAME]
_QUARANTINE_CYCLES, _MAX_QUARANTINE_CYCLES = 10, 1_000

log = structlog.get_logger("analysis.analyzer")


class AnalysisResult(NamedTuple):
    """What one cycle's analysis found. Each symbol is in exactly one of the counts."""

    signals: list[Signal]  # in the order of the rows given
    analysed: int  # computed in this cycle, with or without a signal
    reused: int  # unchanged since it was computed: its result stands
    failed: dict[str, str]  # symbol -> why: the strategy broke on it, or its worker died
    skipped: dict[str, str]  # symbol -> why: its data or its quarantine did not allow an analysis
    shed: list[str]  # not reached within the time limit, the most important first
    batches: int
    batch_symbols: int  # the batch size the load allowed
    series_reused: int  # parts that depend on one series, of the symbols computed: it had not changed
    series_computed: int
    seconds: float


class _Quarantine(NamedTuple):
    until_cycle: int
    times: int


class ParallelAnalyzer:
    """Analyses the universe in batches on an executor's workers.

    The result does not depend on batch size, worker count or earlier cycles: a symbol whose candles did
    not change keeps its result (see FeatureCache), all others are computed from their candles alone.

    Within a time limit symbols with open positions come first, then those that were shed in three cycles
    running, longest first, then the others in the order given. Batches in flight at the limit are abandoned:
    their workers finish them, and what they found serves the next cycle. Without workers the batch under way
    is finished first.
    """

    def __init__(
        self,
        executor: AnalysisExecutor,
        store_path: Path,
        settings: AnalysisSettings,
        strategy: StrategySettings,
        recorder: Recorder,
        cache: FeatureCache | None = None,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises CandleFileInvalid. The store must exist; `close` lets go of it.

        Args: cache: of earlier results, the caller's to close; None computes every symbol in every cycle.
        """
        self._executor = executor
        self._settings = settings
        self._strategy = strategy
        self._recorder = recorder
        self._cache = cache if cache is not None and cache.enabled else None
        self._monotonic_s = monotonic_s
        self._store = CandleStore.attach(store_path)
        self._timeframes = ",".join(self._store.timeframes)
        self._analyse = partial(analyse_batch, Task(str(store_path), strategy, settings.collect_after_batch))
        self._identity: CandleIdentity | None = None
        self._quarantine: dict[str, _Quarantine] = {}
        self._suspects: set[str] = set()  # an abandoned batch of theirs cost a worker: they go one by one
        self._backlog = Backlog()
        self._late: dict[str, Outcome] = {}  # what abandoned batches found since
        self._series_reused = self._series_computed = 0  # in this cycle
        self._symbol_s = 0.0  # wall time a symbol takes when most are computed
        self._cycle = 0
        self._closed = False

    def close(self) -> None:
        """Let go of the candle store and of what earlier cycles left."""
        self._closed = True
        self._store.close()
        self._quarantine.clear()
        self._late.clear()

    async def describe_strategy(self) -> StrategyFacts:
        """Load the strategy in a worker and say what it needs.

        Raises: StrategyInvalid, SettingsInvalid: it cannot be loaded or refuses its options.
        """
        facts: StrategyFacts = await asyncio.wrap_future(
            self._executor.submit(describe_strategy, self._strategy)
        )
        if self._cache is not None:
            await self._identified()  # now, not in the first cycle: it reads every module's file
        return facts

    async def analyse(
        self,
        places: Sequence[Place],
        now_ms: int,
        load: Load,
        *,
        first: Set[str] = frozenset(),
        limit_s: float = math.inf,
    ) -> AnalysisResult:
        """Analyse every symbol once.

        Args: places: (row, symbol) in the order the signals shall have, the most liquid first; now_ms: market
        time; load: decides the batch size; first: symbols to begin with; limit_s: wall time it may take.
        Raises: StrategyInvalid, SettingsInvalid, CandleFileInvalid: nothing can be analysed.
        """
        started_s = self._monotonic_s()
        self._cycle += 1
        self._series_reused = self._series_computed = 0
        outcomes = [self._in_quarantine(symbol) for _, symbol in places]
        late = self._take_late(places, outcomes)
        lookups = await self._reuse(places, outcomes, now_ms)
        looked_up_s = self._monotonic_s()
        due = [index for index, outcome in enumerate(outcomes) if outcome is None]
        due = self._backlog.ordered(due, [symbol for _, symbol in places], first)
        size = self._batch_size(load)
        batches = self._batches(places, due, size)
        await self._run(places, batches, outcomes, limit_s - (looked_up_s - started_s))
        computed_s = self._monotonic_s() - looked_up_s
        self._remember(places, outcomes, sorted([*late, *due]), lookups, now_ms)
        result = self._result(
            places, outcomes, due, len(batches), size, seconds=self._monotonic_s() - started_s
        )
        self._backlog.note(result.shed)
        self._account(result, looked_up_s - started_s, computed_s)
        self._report(result, limit_s)
        return result

    def _batch_size(self, load: Load) -> int:
        s = self._settings
        return batch_size(s.workers, load, s.batch_factors, s.memory_thresholds, s.cpu_thresholds)

    def _batches(self, places: Sequence[Place], due: Sequence[int], size: int) -> list[list[int]]:
        if not self._suspects:
            return in_batches(due, size)
        trusted = [index for index in due if places[index][1] not in self._suspects]
        return [*in_batches(trusted, size), *([i] for i in due if places[i][1] in self._suspects)]

    # -- what need not be computed

    def _in_quarantine(self, symbol: str) -> Outcome | None:
        held = self._quarantine.get(symbol)
        if held is None or self._cycle > held.until_cycle:
            return None
        return Outcome(-1, skipped=f"in quarantine until cycle {held.until_cycle}: it cost two workers")

    def _take_late(self, places: Sequence[Place], outcomes: list[Outcome | None]) -> list[int]:
        """Fill in what abandoned batches found meanwhile, for candles that are still the same."""
        late, self._late = self._late, {}
        taken = []
        for index, (row, symbol) in enumerate(places if late else ()):
            outcome = late.get(symbol)
            if outcome is None or outcomes[index] is not None:
                continue
            if outcome.sequence == self._store.sequence(row):
                outcomes[index] = outcome
                taken.append(index)
        return taken

    async def _reuse(
        self, places: Sequence[Place], outcomes: list[Outcome | None], now_ms: int
    ) -> dict[int, Lookup]:
        """Fill in what the cache holds for these very candles; returns what was looked up, by index."""
        if self._cache is None:
            return {}
        identity = await self._identified()
        if identity is None:
            return {}
        lookups = {
            index: lookup
            for index, place in enumerate(places)
            if outcomes[index] is None and (lookup := self._lookup(place)) is not None
        }
        found = await self._cache.get_many(list(lookups.values()), identity, now_ms)
        for index, outcome in zip(lookups, found, strict=True):
            outcomes[index] = outcome
        return lookups

    async def _identified(self) -> CandleIdentity | None:
        """What tells this strategy's results on these candles apart; None while no worker can say it."""
        if self._identity is None:
            try:
                ask = partial(loaded_modules, apart=self._settings.workers > 0)
                found: bytes = await asyncio.wrap_future(self._executor.submit(ask, self._strategy))
            except WorkerLost as error:
                log.warning("no results are reused: the code's version is unknown", reason=str(error))
                return None
            version = await asyncio.to_thread(code_version, self._strategy, decode_modules(found))
            self._identity = CandleIdentity(self._store, version)
        return self._identity

    def _lookup(self, place: Place) -> Lookup | None:
        """The cache's key of a symbol now; None while its row is being written or has no candle."""
        row, symbol = place
        sequence = self._store.sequence(row)
        open_ms = self._store.last_open_ms(row, CLOCK_TIMEFRAME)
        if sequence & 1 or not open_ms:
            return None
        return Lookup(Key(symbol, self._timeframes, open_ms + _CLOCK_MS), row, sequence)

    def _remember(
        self,
        places: Sequence[Place],
        outcomes: Sequence[Outcome | None],
        found: Sequence[int],
        lookups: dict[int, Lookup],
        now_ms: int,
    ) -> None:
        """Put what was computed into the cache; symbols that left the universe are forgotten."""
        if self._quarantine or self._suspects:
            present = {symbol for _, symbol in places}
            self._quarantine = {s: q for s, q in self._quarantine.items() if s in present}
            self._suspects &= present
        if self._cache is None or self._identity is None:
            return
        kept = []
        for index in found:
            outcome = outcomes[index]
            if outcome is None or outcome.sequence < 0:
                continue
            lookup = lookups.get(index)
            if lookup is None or lookup.sequence != outcome.sequence:  # a candle came in between
                lookup = self._lookup(places[index])
            if lookup is not None and lookup.sequence == outcome.sequence:
                kept.append((lookup, outcome))
        self._cache.put_many([k[0] for k in kept], [k[1] for k in kept], self._identity, now_ms)

    # -- what is computed

    async def _run(
        self,
        places: Sequence[Place],
        batches: list[list[int]],
        outcomes: list[Outcome | None],
        limit_s: float,
    ) -> None:
        """Fill `outcomes`, a few batches at a time; each batch is let go before its lane takes the next."""
        waiting = deque(enumerate(batches))
        all_taken = asyncio.Event()
        lanes = min(max(self._settings.workers, 1) * _LANES_PER_WORKER, len(batches))
        try:
            async with asyncio.timeout(None if limit_s == math.inf else max(limit_s, 0.0)):
                async with asyncio.TaskGroup() as tasks:
                    for number in range(lanes):
                        lane = self._lane(number, places, waiting, all_taken, outcomes)
                        tasks.create_task(lane, name=f"analysis.lane-{number}")
        except TimeoutError:
            self._recorder.count("analysis.deadlines")
        except ExceptionGroup as group:
            raise group.exceptions[0] from group  # the lanes fail alike: one error says it

    async def _lane(
        self,
        number: int,
        places: Sequence[Place],
        waiting: deque[tuple[int, list[int]]],
        all_taken: asyncio.Event,
        outcomes: list[Outcome | None],
    ) -> None:
        """Take batches until none waits: those of the lane's own worker first, then it helps the others.

        The last ones are left to their own worker for a moment: it remembers what another would compute.
        """
        worker = number % max(self._settings.workers, 1)
        while waiting:
            batch = self._next_for(worker, waiting)
            if batch is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_S):
                        await all_taken.wait()
                if not waiting:
                    return
                batch = waiting.popleft()[1]
            if not waiting:
                all_taken.set()
            found = await self._batch(worker, [places[index] for index in batch])
            for index, outcome in zip(batch, found, strict=True):
                outcomes[index] = outcome
            del found

    def _next_for(self, worker: int, waiting: deque[tuple[int, list[int]]]) -> list[int] | None:
        """The first batch that is this worker's by its number, so that it meets what it remembers.

        Not far ahead of the order given, which counts at the deadline: then simply the first. None where the
        few that are left are all another's.
        """
        workers = max(self._settings.workers, 1)
        near = workers * _LANES_PER_WORKER
        for at, (number, batch) in enumerate(islice(waiting, near)):
            if number % workers == worker:
                del waiting[at]
                return batch
        return waiting.popleft()[1] if len(waiting) > near else None

    async def _batch(self, worker: int, batch: list[Place]) -> list[Outcome]:
        """A batch, or where it cost a worker, each of its symbols alone."""
        try:
            return await self._submit(worker, batch)
        except WorkersUnavailable as error:
            return [Outcome(-1, failed=str(error)) for _ in batch]
        except WorkerLost as error:
            log.warning("batch lost its worker; its symbols are tried one by one", reason=str(error))
            self._recorder.count("analysis.batches_lost")
        return [await self._single(worker, place) for place in batch]

    async def _single(self, worker: int, place: Place) -> Outcome:
        try:
            return (await self._submit(worker, [place]))[0]
        except WorkersUnavailable as error:
            return Outcome(-1, failed=str(error))
        except WorkerLost as error:
            self._put_in_quarantine(place[1], str(error))
            return Outcome(-1, failed=str(error))

    async def _submit(self, worker: int, batch: list[Place]) -> list[Outcome]:
        started_s = self._monotonic_s()
        future = self._executor.submit_to(worker, self._analyse, batch)
        try:
            answer = await _ended(future)
        except asyncio.CancelledError:
            future.add_done_callback(partial(self._abandoned, batch))
            raise
        self._recorder.record("analysis.batch", self._monotonic_s() - started_s)
        if self._suspects:
            self._suspects.difference_update(symbol for _, symbol in batch)
        found = _decode(answer)
        self._series_reused += found.series_reused
        self._series_computed += found.series_computed
        return found.outcomes

    def _abandoned(self, batch: list[Place], future: "Future[bytes]") -> None:
        """A batch that missed the time limit has ended: keep what it found, or note whom it may be due to."""
        if future.cancelled() or self._closed:
            return  # no worker had begun it, or nobody asks any more
        error = future.exception()
        symbols = [symbol for _, symbol in batch]
        if error is None:
            self._late.update(zip(symbols, _decode(future.result()).outcomes, strict=True))
            self._suspects.difference_update(symbols)
        elif isinstance(error, WorkerLost) and not isinstance(error, WorkersUnavailable):
            if len(batch) == 1 and symbols[0] in self._suspects:
                self._put_in_quarantine(symbols[0], str(error))
            self._suspects.update(symbols)

    def _put_in_quarantine(self, symbol: str, reason: str) -> None:
        before = self._quarantine.get(symbol)
        times = 1 if before is None else before.times + 1
        cycles = min(_QUARANTINE_CYCLES * 2 ** min(times - 1, 20), _MAX_QUARANTINE_CYCLES)
        self._quarantine[symbol] = _Quarantine(self._cycle + cycles, times)
        self._recorder.count("analysis.quarantined")
        log.error("symbol in quarantine: it cost two workers", symbol=symbol, cycles=cycles, reason=reason)

    def _result(
        self,
        places: Sequence[Place],
        outcomes: Sequence[Outcome | None],
        due: Sequence[int],
        batches: int,
        size: int,
        *,
        seconds: float,
    ) -> AnalysisResult:
        signals: list[Signal] = []
        failed: dict[str, str] = {}
        skipped: dict[str, str] = {}
        reused = len(places) - len(due)
        fresh = set(due)
        for index, ((_, symbol), outcome) in enumerate(zip(places, outcomes, strict=True)):
            if outcome is None:
                continue
            if outcome.failed:
                failed[symbol] = outcome.failed
            elif outcome.skipped:
                skipped[symbol] = outcome.skipped
                reused -= index not in fresh
            elif outcome.signal is not None:
                signals.append(outcome.signal)
        shed = [places[index][1] for index in due if outcomes[index] is None]
        analysed = len(places) - reused - len(failed) - len(skipped) - len(shed)
        return AnalysisResult(
            signals,
            analysed,
            reused,
            failed,
            skipped,
            shed,
            batches,
            size,
            self._series_reused,
            self._series_computed,
            seconds,
        )

    def _account(self, result: AnalysisResult, lookup_s: float, computed_s: float) -> None:
        """What reuse saved: the wall time a symbol took when most of the market was computed last."""
        if result.analysed > result.reused:  # few symbols take little less time than some more: no measure
            self._symbol_s = computed_s / result.analysed
        if self._cache is not None and self._symbol_s:
            self._cache.saved(result.reused * self._symbol_s - lookup_s)
        self._recorder.record("analysis.lookup", lookup_s)

    def _report(self, result: AnalysisResult, limit_s: float) -> None:
        record, count = self._recorder.record, self._recorder.count
        record("analysis.cycle", result.seconds)
        for name in ("analysed", "reused"):
            count(f"analysis.{name}", getattr(result, name))
        if result.series_reused or result.series_computed:
            count("series.hits", result.series_reused)
            count("series.misses", result.series_computed)
        for name, symbols in (("failed", result.failed), ("skipped", result.skipped), ("shed", result.shed)):
            count(f"analysis.{name}", len(symbols))
        if result.failed:
            symbol, reason = next(iter(result.failed.items()))
            log.warning("strategy failed", symbols=len(result.failed), first=symbol, reason=reason)
        if result.shed:
            log.warning(
                "analysis reached its deadline, symbols shed",
                shed=len(result.shed),
                first=result.shed[0],
                limit_s=round(limit_s, 3),
            )


async def _ended(future: "Future[bytes]") -> bytes:
    """As `asyncio.wrap_future`, which would wake the loop from outside: a pool's futures end on the loop."""
    if future.done():  # computed in this process: the loop and its timers have their turn first
        return await asyncio.wrap_future(future)
    waiter = asyncio.get_running_loop().create_future()

    def wake(_: "Future[bytes]") -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    try:
        await waiter
    except asyncio.CancelledError:
        future.cancel()  # it is not begun if it still waits
        raise
    return future.result()


_decode = msgspec.msgpack.Decoder(BatchAnswer).decode
