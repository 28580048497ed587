"""The daemon inside a simulated process: everything from `OpenDaemon` on is the daemon's own code.

Left out are the parts that watch the machine or serve its user: worker processes, memory, loop lag, web and
control socket. Analysis runs in the process itself.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import aiohttp

from service.analysis.analyzer import ParallelAnalyzer
from service.analysis.inline import InlineExecutor
from service.archive.archiver import DataArchiver
from service.daemon import OpenDaemon
from service.exchange.access import Access
from service.exchange.binance.adapter import BinanceExchange
from service.exchange.binance.rest import RestClient, first_contact
from service.exchange.binance.streams import background
from service.exchange.embedded import SIM_KEY, SIM_SECRET
from service.exchange.gate import Gate
from service.exchange.venue import Venue
from service.learning.feature_cache import FeatureCache
from service.market.candles import CandleStore
from service.monitor.collection import Collector
from service.monitor.explained import HeapMarks
from service.monitor.performance import PerformanceMonitor
from service.monitor.watchdog import Notifier
from service.settings import (
    AnalysisSettings,
    CycleSettings,
    MarketSettings,
    RiskSettings,
    RunSettings,
    Settings,
    StrategySettings,
    TradingSettings,
)
from service.simulation import strategy
from service.simulation.disk import Disk
from service.simulation.process import Process
from service.simulation.wire import Wire
from service.simulation.world import VirtualClock
from service.stopping import StopRequest
from service.store.bans import keeping_bans
from service.store.lease import Lease, LocalLease
from service.store.opening import State
from service.summary import RunSummary

SYMBOLS = 8
MANY = 1_000_000


def settings_of_simulation() -> Settings:
    """The defaults, but for what would make trading stop early or time pass slowly."""
    return Settings(
        run=RunSettings(mode="sim"),
        market=MarketSettings(symbols=SYMBOLS, candles=120),
        cycle=CycleSettings(close_wait_s=0.5, collect_garbage=False),
        analysis=AnalysisSettings(workers=0, collect_after_batch=False),
        trading=TradingSettings(trail_r=1.0),
        strategy=StrategySettings(name=f"{strategy.__file__}:Restless"),
        risk=RiskSettings(
            history_trades=MANY,
            caution_losses=MANY,
            caution_day_loss_fraction=0.15,
            cooldown_minutes=10.0,  # two candles: many begin and end in an hour, and trading goes on
        ),
    )


class AtOnce(InlineExecutor):
    """Analysis in the process itself, without the wall clock's limit."""

    def _start_timer(self) -> Any:
        return None


class Untouched(Collector):
    """The heap is the simulation's, which collects it between two seeds."""

    def freeze(self) -> None:
        """Nothing is."""


class Unmarked(HeapMarks):
    """Nobody asks what the memory is spent on."""

    def __init__(self) -> None:
        self.parts = {}

    def started(self) -> None:
        """Nothing is looked at."""


class SimulatedDaemon(OpenDaemon):
    """The daemon without what watches the machine."""

    async def trade(self, summary: RunSummary, stop: StopRequest, started: asyncio.Event) -> None:
        self.collector = Untouched(self.monitor, limit_ms=1.0)
        await super().trade(summary, stop, started)

    async def _analysing(self, candles: CandleStore, summary: RunSummary, started: asyncio.Event) -> None:
        settings = self.settings
        analyzer = ParallelAnalyzer(
            self.pool,
            candles.path,
            settings.analysis,
            settings.strategy,
            self.monitor,
            monotonic_s=self.clock.monotonic_s,
        )
        try:
            await self._trade_on(candles, analyzer, summary, started)
        finally:
            analyzer.close()

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(self.schedule.stalled(), name="monitor.stalled")]
            if not isinstance(self.lease, LocalLease):  # a database goes away and comes back
                watchers.append(tasks.create_task(self._store_back(), name="monitor.store"))
            try:
                yield
            finally:
                for watcher in watchers:
                    watcher.cancel()


class Life:
    """One life of the daemon, from start to end or death. `daemon` is None until the venue was reached.

    Args: opening: how it comes to its state. `waits`: it stands by; `refused_sends`: for want of the lease.
    """

    def __init__(
        self,
        settings: Settings,
        disk: Disk,
        wire: Wire,
        clock: VirtualClock,
        process: Process,
        opening: "Callable[[Life], AbstractAsyncContextManager[State]]",
    ) -> None:
        self.settings = settings
        self.disk = disk
        self.wire = wire
        self.clock = clock
        self.process = process
        self.waits = False
        self.refused_sends = 0
        self._opening = opening
        self._lease: Lease | None = None
        self.monitor = PerformanceMonitor(settings.monitor, clock)
        self.started = asyncio.Event()
        self.stop = StopRequest()
        self.daemon: SimulatedDaemon | None = None

    async def run(self) -> None:
        """From the store to the drain, as the daemon opens its parts."""
        async with self._opening(self) as state, keeping_bans(state.store) as bans:
            self.process.epoch = state.lease.epoch
            self._lease = state.lease

            def may_send() -> str:
                refusal = state.lease.may_send()
                self.refused_sends += bool(refusal)
                return refusal

            await self._trade(state, Gate(may_send, bans.until_ms, bans.add))

    @asynccontextmanager
    async def standing_by(self, holder: str) -> AsyncIterator[None]:
        """In place of the web's pages for one who stands by."""
        self.waits = True
        yield
        self.waits = False

    @property
    def barred(self) -> bool:
        """It may not send."""
        return self._lease is None or bool(self._lease.may_send())

    def end(self, reason: str) -> None:
        """Ask it to end in order, as the signal does."""
        self.stop.set(reason)
        if not self.started.is_set():
            self.process.cancel()

    async def _trade(self, state: State, gate: Gate) -> None:
        settings = self.settings
        rest = RestClient(
            cast(aiohttp.ClientSession, self.wire),
            settings.exchange,
            self.clock,
            api_key=SIM_KEY,
            api_secret=SIM_SECRET,
            recorder=self.monitor,
            gate=gate,
        )
        await first_contact(rest)
        async with background("venue clock", rest.keep_offset()):
            exchange = BinanceExchange(
                rest,
                settings.exchange,
                self.clock,
                settings.trading.stop_working_type,
                self.monitor,
                self.wire.connect,
            )
            self.daemon = SimulatedDaemon(
                settings,
                self.disk.directory,
                self.monitor,
                AtOnce(limit_s=settings.analysis.batch_limit_s),
                Venue(exchange=exchange, access=Access(settings=settings.exchange, clock=self.clock)),
                state,
                cast(DataArchiver, self.disk.archive()),
                FeatureCache(settings.features, self.monitor, None),
                Notifier(),
                api_token="",
                marks=Unmarked(),
                gate=gate,
            )
            await self.daemon.trade(RunSummary(), self.stop, self.started)

    async def resume(self) -> None:
        """A person lifts the kill switch, deliberately."""
        if self.daemon is not None and self.daemon.kill is not None:
            await self.daemon.kill.resume("the venue is calm again", "simulation")

    @property
    def halted(self) -> bool:
        """The kill switch is tripped."""
        return self.daemon is not None and self.daemon.kill is not None and bool(self.daemon.kill.words)
