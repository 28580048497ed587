"""The daemon: opens every part in the order of the data flow, runs cycles, drains in reverse.

The only file that knows all parts, and the only place where an unexpected error is caught.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import uvloop

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.inline import InlineExecutor
from service.analysis.pool import NurseryPool, open_pool
from service.archive.archiver import DataArchiver, archiving
from service.archive.keeper import Keeper
from service.clock import WallClock
from service.cycle import CLOSE_TO_SIGNAL, Parts, run_cycle
from service.directory import claim, data_directory
from service.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_RESTART,
    DataDirectoryUnusable,
    PerpdError,
    SettingsInvalid,
    StrategyInvalid,
    VenueError,
)
from service.exchange.gate import Gate
from service.exchange.recording import check_market
from service.exchange.venue import Venue, open_venue
from service.gauges import Gauges, archive_gauges, cache_gauges, delay_gauges, trading_gauges
from service.learning.feature_cache import FeatureCache
from service.learning.slot_file import FILE_NAME as SLOT_FILE_NAME
from service.learning.slot_file import SlotFile
from service.logs import RUN_SUMMARY, configure, log_failure, set_level
from service.market.candle_file import opened_candles
from service.market.candles import FILE_NAME, CandleFileInvalid, CandleStore
from service.market.feed import CandleFeed
from service.market.funding import FundingHistory
from service.market.instruments import InstrumentTable
from service.market.universe import Universe, mistaken, select, unlisted, unlisted_words
from service.monitor.advisor import Advisor
from service.monitor.budget import Level
from service.monitor.by_hand import answer_by_hand
from service.monitor.collection import Collector
from service.monitor.control import BadQuestion, controlling
from service.monitor.explained import HeapMarks
from service.monitor.guard import MEMORY_CRITICAL, MemoryGuard, within_limit
from service.monitor.lag import LoopLag
from service.monitor.memory import MemorySampler, available_cpus, memory_limit_mb
from service.monitor.performance import PerformanceMonitor
from service.monitor.report import MemoryReport
from service.monitor.sizes import held_bytes
from service.monitor.stack import HeldStack
from service.monitor.status import Status
from service.monitor.watchdog import Notifier
from service.ports import CacheTier, Clock, Exchange
from service.records import CycleReport, Instrument
from service.schedule import Schedule
from service.settings import Loaded, Settings
from service.stopping import StopRequest, cancel_start, stop_on_signal
from service.store.bans import keeping_bans
from service.store.opening import State, open_state
from service.summary import RunSummary
from service.trading.decision_log import DecisionLog
from service.trading.equity import EquityWatch
from service.trading.executor import Executor
from service.trading.following import ShadowFollower
from service.trading.halting import KillSwitch, Surroundings
from service.trading.ledger import Ledger, LedgerCheck, open_ledger
from service.trading.reconcile import Reconciler
from service.trading.shadow import ShadowBook
from service.web.kill import kill_api
from service.web.server import serving
from service.web.standby import standing_by

if TYPE_CHECKING:
    from service.analysis.nursery import Nursery

PROGRESS_STEPS = 5
# Shares of the drain limit: the cycle under way, orders in flight, and the archive.
CYCLE_SHARE, SETTLE_SHARE, ARCHIVE_SHARE = 0.25, 0.35, 0.4
UPKEEP_MB = 60  # what the archive's upkeep takes beside its data
STORE_RETRY_S = 1.0
CENT = Decimal("0.01")
EXCLUDED_ONCE = "market.excluded"
"""The value in the store: the names of `market.exclude` that the venue has listed."""

log = structlog.get_logger("perpd")


def run(loaded: Loaded, nursery: "Nursery | None") -> int:
    """Trade until a stop signal, the last cycle or the end of the market. Returns the exit code."""
    configure(loaded.settings.log, secrets=loaded.secrets.values(), unlimited=(RUN_SUMMARY, "cycle"))
    summary = RunSummary()
    try:
        if loaded.settings.run.mode == "sim" and not loaded.settings.sim.url:
            check_market(loaded.settings.sim)
        with (
            data_directory(loaded.settings) as directory,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(_run(loaded, nursery, directory, summary))
        code = EXIT_RESTART if summary.exit_reason == MEMORY_CRITICAL else EXIT_OK
    except BaseException as error:  # noqa: BLE001 - the last resort: said once, and the process ends
        code = _explain(error)
        if not summary.began:
            return code
        summary.exit_reason = "error"
    # Whatever the level: the last line of a run is always there.
    configure(msgspec.structs.replace(loaded.settings.log, level="info"), secrets=loaded.secrets.values())
    summary.log()
    return code


def _explain(error: BaseException) -> int:
    """Say what ended the run, once; returns the exit code."""
    known = _first(error, PerpdError)
    if known is not None:
        log_failure(known)
        return known.exit_code
    log.error("unexpected error", exc_info=error, exit_code=EXIT_FAILURE)
    return EXIT_FAILURE


def _first(error: BaseException, kind: type[PerpdError]) -> PerpdError | None:
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for one in error.exceptions if (found := _first(one, kind))), None)
    return None


async def _run(loaded: Loaded, nursery: "Nursery | None", directory: Path, summary: RunSummary) -> None:
    """A stop during start-up cancels it; from the first cycle on, the cycles see it themselves."""
    stop = StopRequest()
    started = asyncio.Event()
    with stop_on_signal(stop):
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(
                _trade(loaded, nursery, directory, summary, stop, started), name="daemon.trade"
            )
            tasks.create_task(cancel_start(stop, started, work), name="daemon.stop")
    summary.exit_reason = stop.reason or "error"
    if not started.is_set():
        log.info("stopped before the first cycle", exit_reason=stop.reason)


async def _trade(
    loaded: Loaded,
    nursery: "Nursery | None",
    directory: Path,
    summary: RunSummary,
    stop: StopRequest,
    started: asyncio.Event,
) -> None:
    settings = loaded.settings
    marks = HeapMarks()
    monitor = PerformanceMonitor(settings.monitor, WallClock())
    notifier = Notifier.from_environment(os.environ)
    analysis = within_limit(settings, memory_limit_mb(settings.monitor.memory_limit_mb))
    log.info("daemon starting", mode=settings.run.mode, data_dir=str(directory), pid=os.getpid())
    try:
        async with (
            # First, so that one who stands by has neither workers nor a venue; last to close, so that the
            # lease is given back once nothing more can be sent.
            open_state(loaded, directory, partial(standing_by, settings.web, notifier)) as state,
            keeping_bans(state.store) as bans,
            open_pool(analysis, nursery) as pool,
            open_venue(
                loaded, directory, monitor, gate := Gate(state.lease.may_send, bans.until_ms, bans.add)
            ) as venue,
            archiving(
                directory / "archive",
                settings.archive,
                venue.clock,
                drain_limit_s=settings.run.drain_limit_s * ARCHIVE_SHARE,
                recorder=monitor,
            ) as archive,
        ):
            if settings.run.mode == "live":
                from service.check.command import require  # not needed for any other mode

                gate = Gate(state.lease.may_send, bans.until_ms, bans.add)
                await require(loaded, directory, venue.access, gate)
            claim(settings, directory)
            cache = _feature_cache(loaded, venue.clock.speed, directory, monitor)
            opened = OpenDaemon(
                settings,
                directory,
                monitor,
                pool,
                venue,
                state,
                archive,
                cache,
                notifier,
                loaded.secrets.api_token,
                marks,
                gate,
            )
            await opened.trade(summary, stop, started)
        summary.archived = archive.archived
    finally:
        summary.measured |= _measured(monitor)


def tell_positions(executor: Executor, held: frozenset[str]) -> None:
    """After the comparison at the start: what is ours, and what the venue holds besides."""
    ours = {position.symbol for position in executor.positions()}
    waiting = {position.symbol for position in executor.unconfirmed_positions()}
    if held <= ours and not waiting:
        log.info("positions agree with the venue", symbols=sorted(ours))
        return
    log.warning(
        "positions were compared with the venue and differ",
        symbols=sorted(ours - waiting),
        not_in_our_books=sorted(held - ours),
        compared_again=sorted(waiting),
    )


def _milliseconds(seconds: float | None, digits: int = 3) -> float | None:
    return None if seconds is None else round(seconds * 1000, digits)


def _measured(monitor: PerformanceMonitor) -> dict[str, Any]:
    """For the run summary, in ms: percentiles over the last cycles, one sample a cycle."""

    def milliseconds(kind: str, name: str) -> float | None:
        found = monitor.percentiles(kind)
        return _milliseconds(getattr(found, name)) if found else None

    to_signal = monitor.totals().get(CLOSE_TO_SIGNAL)

    return {
        "cycle_ms_p50": milliseconds("cycle", "p50"),
        "cycle_ms_p99": milliseconds("cycle", "p99"),
        "analysis_ms_p50": milliseconds("analysis", "p50"),
        "close_to_signal_ms_p50": milliseconds(CLOSE_TO_SIGNAL, "p50"),
        "close_to_signal_ms_p95": milliseconds(CLOSE_TO_SIGNAL, "p95"),
        "close_to_signal_ms_max": _milliseconds(to_signal.longest_s if to_signal else None),
    }


def _rows(settings: Settings) -> int:
    """Rows of the candle store: a symbol with an open position stays beyond the universe."""
    return settings.market.symbols + settings.trading.max_positions


def _feature_cache(
    loaded: Loaded, speed: float, directory: Path, monitor: PerformanceMonitor
) -> FeatureCache:
    """The cache with the tier below its memory that the environment and the settings ask for.

    Raises: SettingsInvalid: REDIS_URL is no address.
    """
    settings, features = loaded.settings, loaded.settings.features
    tier: CacheTier | None = None
    if loaded.secrets.redis_url:
        from service.learning.redis_tier import RedisTier  # 7 MB that nobody else pays

        tier = RedisTier(loaded.secrets.redis_url, limit_s=features.redis_limit_ms / 1000, speed=speed)
        tier.connect()  # now, not in the first cycle
        log.info("feature cache is shared through Redis")
    elif features.slot_bytes:
        tier = SlotFile(directory / SLOT_FILE_NAME, _rows(settings), features.slot_bytes)
    return FeatureCache(features, monitor, tier)


class OpenDaemon:
    """The run once the outside world is open: market, books, then cycles."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        monitor: PerformanceMonitor,
        pool: NurseryPool | InlineExecutor,
        venue: Venue,
        state: State,
        archive: DataArchiver,
        cache: FeatureCache,
        notifier: Notifier,
        api_token: str,
        marks: HeapMarks,
        gate: Gate,
    ) -> None:
        self.gate = gate
        self.settings = settings
        self.api_token = api_token
        self.directory = directory
        self.monitor = monitor
        self.pool = pool
        self.venue = venue
        self.exchange: Exchange = venue.exchange
        self.clock: Clock = venue.clock
        self.store = state.store
        self.lease = state.lease
        self.archive = archive
        self.notifier = notifier
        self.lag = LoopLag(alarm_ms=settings.monitor.lag_alarm_ms, on_alarm=self._on_lag)
        self.held = HeldStack(self.lag, alarm_ms=settings.monitor.lag_alarm_ms)
        self.memory = MemorySampler(settings.monitor.memory_limit_mb, exclude_pids=lambda: set(venue.pids))
        self.cache = cache
        self.guard = MemoryGuard(
            settings.monitor,
            self.memory,
            monitor,
            workers=pool,
            shrink=self.cache.shrink,
            flush_early=archive.flush_early,
            quiet=lambda on: set_level(
                "warn" if on and settings.log.level != "error" else settings.log.level
            ),
            stop=lambda reason: self.stop.set(reason),
        )
        self.keeper = Keeper(directory / "archive", settings.archive, monitor, calm=self._calm)
        self.advisor = Advisor(
            monitor,
            self.lag,
            pool,
            interval_s=settings.cycle.interval_s / self.clock.speed,
            speed=self.clock.speed,
            lag_alarm_ms=settings.monitor.lag_alarm_ms,
            cores=available_cpus(),
            features_ttl_s=settings.features.ttl_s,
            features_tier=cache.tier_name,
        )
        self.collector = Collector(monitor, limit_ms=settings.cycle.collect_limit_ms)
        self.status = Status(self.clock, settings.cycle.interval_s)
        self.status.archive_writable = lambda: archive.writable
        self.stop = StopRequest()
        self.kill: KillSwitch | None = None  # from the moment there are books
        self.stale_fraction = 0.0  # of the symbols followed, in the last cycle
        self.chosen: set[str] = set()
        self.failing = ""
        self.shed = 0  # in the last cycle
        self.marks = marks
        self.gauges: Callable[[], Gauges] = dict

    async def trade(self, summary: RunSummary, stop: StopRequest, started: asyncio.Event) -> None:
        """Open the market and the books, then run cycles until the stop, then settle."""
        self.stop = stop
        settings = self.settings
        async with opened_candles(
            self.directory / FILE_NAME,
            self.store,
            symbols_capacity=_rows(settings),
            candles=settings.market.candles,
        ) as candles:
            await self._analysing(candles, summary, started)

    async def _analysing(self, candles: CandleStore, summary: RunSummary, started: asyncio.Event) -> None:
        settings = self.settings
        analyzer = ParallelAnalyzer(
            self.pool, candles.path, settings.analysis, settings.strategy, self.monitor, self.cache
        )
        try:
            facts = await analyzer.describe_strategy()
            log.info("strategy loaded", strategy=facts.name)
            report = MemoryReport(self.memory, self.guard, self.marks)
            async with (
                self.guard.running(),
                controlling(
                    self.directory,
                    {"memory": report.answer, "performance": self.advisor.answer, "kill": self._kill},
                ),
                serving(
                    settings.web.host,
                    settings.web.port,
                    health=self.status.health,
                    ready=self.status.ready,
                    metrics=lambda: self.status.metrics(self.monitor, self.lag, self.memory, self.gauges()),
                    api=kill_api(self.api_token, self._kill) if self.api_token else None,
                ) as port,
            ):
                log.info("serving health, readiness and metrics", host=settings.web.host, port=port)
                await self._trade_on(candles, analyzer, summary, started)
        finally:
            await self.cache.close()
            analyzer.close()

    async def _kill(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """The kill switch by hand, from the control socket or the web. Raises BadQuestion."""
        if self.kill is None:
            raise BadQuestion("the daemon is still starting, ask again")
        return await answer_by_hand(self.kill, question)

    def _memory_critical(self) -> bool:
        """It stays so when the drain has freed memory: what restarts for it must know why."""
        return self.guard.level is Level.CRITICAL or self.stop.reason == MEMORY_CRITICAL

    async def _trade_on(
        self, candles: CandleStore, analyzer: ParallelAnalyzer, summary: RunSummary, started: asyncio.Event
    ) -> None:
        settings, exchange, clock = self.settings, self.exchange, self.clock
        instruments = InstrumentTable(await exchange.instruments())
        await self._check_excluded(instruments)
        self.ledger = ledger = await self._open_ledger()
        shadows = ShadowBook(
            self.store,
            self.archive,
            self.monitor,
            fee_fraction=settings.sim.taker_fee_fraction,
            life_hours=settings.trading.shadow_hours,
            max_shadows=settings.trading.max_shadows,
        )
        await shadows.restore()
        equity = EquityWatch(exchange, self.store, ledger, clock, self.monitor)
        await equity.open()
        self.status.equity_known = lambda: equity.account is not None and not equity.unexplained
        self.kill = kill = KillSwitch(
            self.store,
            equity,
            clock,
            self.monitor,
            settings.kill,
            settings.risk,
            Surroundings(
                stale_fraction=lambda: self.stale_fraction,
                clock_moved_ms=lambda: clock.moved_ms if isinstance(clock, WallClock) else 0.0,
                memory_critical=self._memory_critical,
            ),
        )
        await kill.open()
        self.gate.may_open = lambda: kill.words
        executor = Executor(
            exchange,
            self.store,
            self.archive,
            ledger,
            clock,
            settings.trading,
            self.monitor,
            margin_type=settings.exchange.margin_type,
            rules=lambda symbol: self._rules(instruments, symbol),
            instrument_of=instruments.get,
            halted=lambda: kill.words,
            order_window=settings.kill.order_window,
            cooldown_minutes=settings.risk.cooldown_minutes,
        )
        equity.reconciliation = executor
        reconciler = Reconciler(
            executor,
            exchange,
            self.store,
            ledger,
            clock,
            self.monitor,
            settings.trading,
            instrument_of=instruments.get,
        )
        feed = CandleFeed(exchange, candles, clock, settings.market, self.monitor)
        self.schedule = Schedule(
            settings.cycle,
            clock,
            self.stop,
            self.monitor,
            cycles=settings.run.cycles,
            end_ms=self.venue.end_ms,
            awaits_close=feed.awaits_close,
        )
        feed.on_price = lambda symbol, price, _: executor.on_price(symbol, price)
        await executor.restore()
        universe = await self._choose(instruments, executor.held_symbols())
        await exchange.prepare(universe.symbols, settings.exchange.margin_type)
        self.parts = Parts(
            settings=settings,
            clock=clock,
            feed=feed,
            analyzer=analyzer,
            instruments=instruments,
            brackets=await exchange.brackets(),
            equity=equity,
            executor=executor,
            shadows=shadows,
            follower=ShadowFollower(shadows, feed, exchange, FundingHistory(exchange, clock), self.monitor),
            store=self.store,
            archive=self.archive,
            decisions=DecisionLog(self.store, self.archive, shadows),
            monitor=self.monitor,
            collector=self.collector,
            load=lambda: self.guard.load,
            entries_off=self._entries_off,
            halt=kill.refusal,
        )
        self.marks.parts |= {
            "archive buffers": lambda: held_bytes(self.archive, within="service.archive"),
            "shadow book": lambda: held_bytes(shadows),
            "orders and positions": lambda: held_bytes(executor),
            "ledger": lambda: held_bytes(ledger),
            "instruments": lambda: held_bytes(instruments) + held_bytes(self.parts.brackets),
            "candle feed": lambda: held_bytes(feed),
            "analysis results": lambda: held_bytes(analyzer),
            "feature cache": lambda: held_bytes(self.cache, within="service.learning"),
            "decided signals": lambda: held_bytes(self.parts.decided),
            "monitor history": lambda: (
                held_bytes(self.monitor)
                + held_bytes(self.lag, within="service.monitor")
                + held_bytes(self.memory, within="service.monitor")
                + held_bytes(self.advisor)
            ),
            "exchange adapter": lambda: held_bytes(exchange, within="service.exchange"),
        }
        self.gauges = self._gauges
        async with (
            executor.running(),
            exchange.user_stream(executor.on_event, executor.on_gap),
            reconciler.running(),
            kill.running(executor),
        ):
            tell_positions(executor, reconciler.held)
            await self._bootstrap(
                universe
            )  # minutes on a large universe, in which positions are looked after
            async with feed.running(universe.symbols), self._watching():
                await feed.settled()
                await self._decided_before()
                self.collector.freeze()
                self.marks.started()
                log.info("trading", symbols=len(universe.symbols))
                self.notifier.ready("trading")
                summary.began = True
                started.set()
                await self._cycles(summary, universe)
                await self._drain(summary)

    async def _open_ledger(self) -> Ledger:
        account = await self.exchange.account()
        # what it books at the first start goes to the archive with all else that is booked
        ledger, _ = await open_ledger(self.store, account, self.monitor, self.settings.market.quote_asset)
        return ledger

    async def _rules(self, instruments: InstrumentTable, symbol: str) -> Instrument | None:
        """The venue's rules of a symbol, read anew. Raises VenueError."""
        instruments.refresh(await self.exchange.instruments())
        return instruments.get(symbol)

    async def _check_excluded(self, instruments: InstrumentTable) -> None:
        """A name that the venue never listed is a mistake: what was meant would be traded.

        One that it listed in an earlier run was taken off since: a daemon that holds positions must start
        all the same. Raises SettingsInvalid.
        """
        exclude = self.settings.market.exclude
        known = set(msgspec.json.decode(await self.store.get_value(EXCLUDED_ONCE) or "[]", type=list[str]))
        gone = unlisted(exclude, instruments)
        if wrong := mistaken(gone, known, self.settings.run.mode):
            raise SettingsInvalid(f"{unlisted_words(wrong)}; correct the name or take it out")
        listed = sorted(name for name in set(exclude) if name not in gone or name in known)
        if listed != sorted(known):
            await self.store.set_value(EXCLUDED_ONCE, msgspec.json.encode(listed).decode())

    async def _choose(self, instruments: InstrumentTable, held: frozenset[str]) -> Universe:
        universe = select(
            list(instruments),
            await self.exchange.tickers(),
            settings=self.settings.market,
            held=held,
            now_ms=self.clock.now_ms(),
        )
        if gone := unlisted(self.settings.market.exclude, instruments):
            log.warning("excluded symbols are not listed", reason=unlisted_words(gone))
        if set(universe.symbols) != self.chosen:
            log.info("universe chosen", symbols=len(universe.symbols), dropped=universe.dropped)
        self.chosen = set(universe.symbols)
        return universe

    async def _bootstrap(self, universe: Universe) -> None:
        """Fetch what candles are missing, saying how far it is."""
        told = 0

        def progress(done: int, total: int) -> None:
            nonlocal told
            step = done * PROGRESS_STEPS // total
            if step > told:
                told = step
                log.info("fetching candles", done=done, of=total)
                self.notifier.extend(60)

        failed = await self.parts.feed.bootstrap(universe.symbols, progress)
        self.schedule.sign_of_life()  # the first cycle's time begins now
        statistics = self.parts.feed.statistics()
        log.info(
            "candles ready",
            fetched=statistics.get("fetched", 0),
            requests=statistics["requests"],
            failed=failed,
        )

    async def _decided_before(self) -> None:
        """A signal decided before the restart is not decided again, and its record is complete."""
        await self.parts.decisions.recover()
        newest = self.clock.now_ms()
        known = await self.store.decided_since(newest - 2 * 3_600_000)
        self.parts.decided.update(dict.fromkeys(known, newest))

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """The tasks that look after the process while cycles run."""
        async with asyncio.TaskGroup() as tasks:
            watchers = [
                tasks.create_task(self.lag.run(), name="monitor.lag"),
                tasks.create_task(self.schedule.stalled(), name="monitor.stalled"),
                tasks.create_task(self.keeper.run(), name="archive.keeper"),
                tasks.create_task(self.advisor.run(), name="monitor.advisor"),
                tasks.create_task(self._store_back(), name="monitor.store"),
            ]
            try:
                with self.held.watching():
                    yield
            finally:
                for watcher in watchers:
                    watcher.cancel()

    async def _store_back(self) -> None:
        """A store that failed is tried again: while nothing is opened, nothing else may write to it."""
        while True:
            await asyncio.sleep(STORE_RETRY_S)
            if not self.parts.executor.store_failing:
                continue
            try:
                await self.store.set_value("store.tried_ms", str(self.clock.now_ms()))
                await self.parts.executor.store_back()
            except DataDirectoryUnusable as error:
                log.debug("state still cannot be written", error=str(error))

    def _on_lag(self, lag_ms: float) -> None:
        self.monitor.count("loop.lag_alarms")
        stack = self.held.take()
        self.advisor.held = stack or self.advisor.held
        log.warning("the event loop was held up", lag_ms=round(lag_ms, 1), stack=stack)

    def _calm(self, running: bool) -> bool:
        """Whether the archive's upkeep may run: memory is plentiful and, before it starts, so is the CPU."""
        if self.guard.upkeep_deferred:
            return False
        needed_mb = self.settings.archive.compact_memory_mb + UPKEEP_MB
        used_mb = self.memory.pss_mb_last + needed_mb
        room = used_mb < self.memory.limit_mb * self.settings.monitor.memory_levels[0]
        return running or (room and self.guard.load.cpu_fraction < self.settings.analysis.cpu_thresholds[0])

    def _entries_off(self) -> str:
        """Why nothing may be opened now, or ''."""
        if self.stop:
            return f"draining: {self.stop.reason}"
        if not self.archive.writable:
            return "the archive cannot be written"
        if self.parts.executor.store_failing:
            return "state cannot be written"
        return self.lease.may_send() or self.failing or self.parts.equity.words or self.guard.entries_off

    def _gauges(self) -> Gauges:
        """What only the open parts know."""
        return {
            **trading_gauges(self.parts, self.kill, self.lease, self.shed),
            **archive_gauges(self.archive.statistics(), self.keeper),
            **cache_gauges(self.cache.statistics()),
            **delay_gauges(self.monitor),
        }

    # -- cycles

    async def _cycles(self, summary: RunSummary, universe: Universe) -> None:
        refresh_ms = self._next_refresh_ms()
        summary.symbols = len(universe.symbols)
        async with aclosing(self.schedule.slots()) as slots:
            async for number in slots:
                report = await self._cycle(number)
                if report is not None:
                    self._account_for(report, summary)
                    if self.archive.writable:  # where it is not, cycles go on: they look after positions
                        await self.archive.put("cycles", report)
                if self.clock.now_ms() >= refresh_ms:
                    refresh_ms = self._next_refresh_ms()
                    await self._refresh_universe(summary)
                    await self._prune()

    def _next_refresh_ms(self) -> int:
        return self.clock.now_ms() + round(self.settings.market.universe_refresh_s * 1000)

    async def _cycle(self, number: int) -> CycleReport | None:
        """One cycle, cut short when a stop comes and it does not end soon; None when it did not finish.

        What a cycle cannot write or load keeps entries off until a cycle succeeds; it never ends a daemon
        that holds positions.
        """
        work = asyncio.create_task(run_cycle(self.parts, number), name="cycle")
        asked = asyncio.create_task(self.stop.wait(), name="cycle.stop")
        try:
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await asyncio.wait({work}, timeout=self.settings.run.drain_limit_s * CYCLE_SHARE)
            if not work.done():
                log.warning("the cycle did not end in time for the drain, cut short", cycle=number)
                return None
            report = work.result()
        except (DataDirectoryUnusable, StrategyInvalid, SettingsInvalid, CandleFileInvalid) as error:
            self.monitor.count("cycles.failed")
            self.failing = f"the last cycle failed: {error}"
            log.error("the cycle failed, no entries until one succeeds", cycle=number, reason=str(error))
            return None
        finally:
            for task in (work, asked):
                task.cancel()
            await asyncio.wait({work, asked})
        self.failing = ""
        return report

    def _account_for(self, report: CycleReport, summary: RunSummary) -> None:
        summary.cycles += 1
        self.shed = report.shed
        summary.shed += report.shed
        summary.signals += report.signals
        summary.accepted += report.accepted
        summary.refused.update(report.refused)
        executor, equity = self.parts.executor, self.parts.equity
        account = equity.account
        log.info(
            "cycle",
            cycle=report.number,
            analysed=report.analysed,
            stale=report.stale,
            failed=report.failed,
            shed=report.shed,
            signals=report.signals,
            accepted=report.accepted,
            refused=report.refused,
            positions=len(executor.positions()),
            cooling=len(executor.cooling()),
            shadows=self.parts.shadows.open_count,
            shadows_closed=self.parts.shadows.closed_count,
            equity=float(round(account.equity, 2)) if account else None,
            series_reused=report.series_reused,
            series_computed=report.series_computed,
            analysis_ms=round(report.analysis_s * 1000, 1),
            close_to_signal_ms=_milliseconds(report.close_to_signal_s, 1),
            cycle_ms=round(report.seconds * 1000, 1),
            garbage_ms=round(report.garbage_s * 1000, 2),
            pss_mb=round(self.memory.pss_mb_last, 1),
        )
        self.schedule.sign_of_life()
        fresh = report.analysed + report.shed
        followed = fresh + report.stale
        self.stale_fraction = report.stale / followed if followed else 1.0
        self.status.cycle_finished(fresh=fresh, stale=report.stale)
        self.notifier.cycle_finished(f"cycle {report.number}, {len(executor.positions())} positions")

    async def _refresh_universe(self, summary: RunSummary) -> None:
        try:
            self.parts.instruments.refresh(await self.exchange.instruments())
            self.parts.brackets = await self.exchange.brackets()
            universe = await self._choose(self.parts.instruments, self.parts.executor.held_symbols())
            await self.parts.feed.set_symbols(universe.symbols)
            summary.symbols = len(universe.symbols)
        except* VenueError as errors:
            log.warning("the universe stays as it is", reason=str(errors.exceptions[0]))

    async def _prune(self) -> None:
        """What ended long ago leaves the store, or it would grow for ever; the archive has it."""
        try:
            deleted = await self.store.prune(self.clock.now_ms())
        except DataDirectoryUnusable as error:
            log.warning("the store was not pruned", error=str(error))
        else:
            log.debug("store pruned", rows=deleted)

    # -- the end

    async def _drain(self, summary: RunSummary) -> None:
        """Settle what is in flight; stops stay on the exchange. What follows closes the parts in reverse."""
        self.notifier.stopping(f"draining: {self.stop.reason}")
        executor = self.parts.executor
        account = None
        try:
            async with asyncio.timeout(self.settings.run.drain_limit_s * SETTLE_SHARE):
                await executor.settle(self.settings.run.drain_limit_s * SETTLE_SHARE)
                if self.archive.writable:
                    await self.parts.shadows.flush(everything=True)
                account = await self._agreed()
        except TimeoutError:
            log.error("orders were not settled in time", working=len(executor.working_orders()))
        except DataDirectoryUnusable as error:
            log.error("state could not be written while draining", reason=str(error))
        totals = self.monitor.counters
        self.memory.sample()
        summary.snapshot = {
            "orders": totals.get("trading.orders", 0),
            "fills": totals.get("trading.fills", 0),
            "positions_open": len(executor.positions()),
            "positions_closed": totals.get("trading.positions_closed", 0),
            "symbols_cooling": len(executor.cooling()),
            "shadow_open": self.parts.shadows.open_count,
            "shadow_closed": self.parts.shadows.closed_count,
            "equity": account.ledger_equity if account else None,
            "exchange_equity": account.venue_equity if account else None,
        }
        lag = self.lag.statistics()
        cache = self.cache.statistics()
        summary.measured |= {
            "features_hit_fraction": round(cache.hit_fraction, 4),
            "features_memory_hits": cache.memory_hits,
            "features_tier_hits": cache.tier_hits,
            "features_misses": cache.misses,
            "features_saved_ms": round(cache.saved_s * 1000, 1),
            "loop_lag_ms_p99": round(lag.p99_ms, 3),
            "pss_mb_last": round(self.memory.pss_mb_last, 1),
            "pss_mb_peak": round(self.memory.pss_mb_peak, 1),
            "advice": next((one.text for one in self.advisor.current()), None),
        }

    async def _agreed(self) -> LedgerCheck | None:
        """Our books against the venue's at one instant.

        An event on its way makes them differ for a moment, so a difference is looked at again while the
        stream is read; one that stays is reported as it is.
        """
        equity = self.parts.equity
        for _ in range(10):
            await equity.look(attempts=1)
            if equity.check is None or abs(equity.check.difference) <= CENT:
                break
            await asyncio.sleep(0.2)
        return equity.check
