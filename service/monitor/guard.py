"""Keeps the memory budget: samples, follows the level and performs what the plan says."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
import structlog

from service.errors import LimitTooLow
from service.monitor.budget import (
    CrowdAlarm,
    GrowthAlarm,
    Level,
    MemoryBudget,
    Reaction,
    Step,
    needed_mb,
    worker_limit_mb,
)
from service.monitor.memory import MemorySampler
from service.ports import Recorder
from service.records import Load
from service.settings import AnalysisSettings, MonitorSettings, Settings

MEMORY_CRITICAL = "memory critical"
"""The reason of the stop that ends the process to be started anew."""

_SOON_S = 1.0  # between samples while the level rises

log = structlog.get_logger("monitor.memory")


class Workers(Protocol):
    """The part of a pool of workers that can give memory back."""

    @property
    def workers(self) -> int: ...

    def resize(self, workers: int) -> None:
        """Keep this many workers; what is too much ends once it is idle."""

    def replace_workers(self, reason: str) -> None:
        """Replace every worker once it is idle."""


def within_limit(settings: Settings, limit_mb: float) -> AnalysisSettings:
    """How to analyse within the limit: a worker is replaced before it takes what the others need.

    Raises LimitTooLow: start-up alone would exceed the limit.
    """
    needed = needed_mb(settings.analysis, settings.market)
    if limit_mb < needed:
        raise LimitTooLow(
            f"the memory limit is {limit_mb:.0f} MB and start-up needs {needed:.0f} MB with "
            f"{settings.analysis.workers} workers and {settings.market.symbols} symbols of "
            f"{settings.market.candles} candles"
        )
    return msgspec.structs.replace(
        settings.analysis, worker_memory_limit_mb=worker_limit_mb(settings, limit_mb)
    )


class MemoryGuard:
    """Samples the process tree and reacts to its level.

    Args: workers: given back and reduced at level high; shrink(on): halves the caches; flush_early(on): of
    the archive; quiet(on): drops debug and info lines; stop(reason): asks for the drain that ends the
    process.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        sampler: MemorySampler,
        recorder: Recorder,
        *,
        workers: Workers,
        shrink: Callable[[bool], None],
        flush_early: Callable[[bool], None],
        quiet: Callable[[bool], None],
        stop: Callable[[str], None],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sampler = sampler
        self._recorder = recorder
        self._workers = workers
        self._all_workers = workers.workers
        self._shrink = shrink
        self._flush_early = flush_early
        self._quiet = quiet
        self._stop = stop
        self._monotonic_s = monotonic_s
        self._sample_s = settings.sample_s
        self._growth = GrowthAlarm(settings.memory_growth_mb_per_hour, settings.memory_growth_hours)
        self._growth_limit = settings.memory_growth_mb_per_hour
        self._in_force: set[Reaction] = set()
        self._trimming: threading.Thread | None = None
        self.budget = MemoryBudget(settings)
        self.used_fraction = 0.0  # of the limit: the tree's or the control group's, whichever is more
        self._crowd = CrowdAlarm(settings)
        self._no_entries = ""  # why the level allows none, or ""
        self._crowded = ""  # why others in our control group allow none, or ""
        self.upkeep_deferred = ""  # why neither the archive's upkeep nor training may run now, or ""
        self.load = Load(memory_fraction=0.0, cpu_fraction=0.0)

    @property
    def level(self) -> Level:
        return self.budget.level

    @property
    def entries_off(self) -> str:
        """Why nothing may be opened now, or ''."""
        return self._no_entries or self._crowded

    @property
    def in_force(self) -> list[str]:
        """Reactions in force, mildest first."""
        return [reaction.value for reaction in Reaction if reaction in self._in_force]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Guard while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self.run(), name="monitor.memory")
            try:
                yield
            finally:
                watching.cancel()

    async def run(self) -> None:
        """Sample until cancelled; sooner than usual while the level rises."""
        while True:
            self.sample()
            await asyncio.sleep(min(self._sample_s, _SOON_S) if self.budget.rising else self._sample_s)

    def sample(self) -> None:
        """Take one sample and act on it. On the loop: it takes less than a millisecond for four processes."""
        started_s = self._monotonic_s()
        load = self._sampler.sample()
        self.used_fraction = max(load.memory_fraction, self._sampler.group_fraction())
        pressure_pct = self._sampler.pressure_pct()
        change = self.budget.update(self.used_fraction, pressure_pct, started_s)
        if change is not None:
            self._change(change)
        # At least full: the smallest batches, whatever the CPU says.
        fraction = 1.0 if Reaction.SMALLER_BATCHES in self._in_force else 0.0
        self.load = Load(memory_fraction=max(self.used_fraction, fraction), cpu_fraction=load.cpu_fraction)
        self._watch_crowd(started_s)
        self._watch_growth(started_s)
        self._recorder.record("memory sample", self._monotonic_s() - started_s)

    def _change(self, change: Step) -> None:
        for reaction in change.undo:  # first of all, or a dropped log would drop what is said about it
            self._undo(reaction)
        tell = log.warning if change.after > change.before else self._tell_relief()
        tell(
            "memory level",
            memory_level=change.after.name.lower(),
            before=change.before.name.lower(),
            reason=change.reason,
            pss_mb=round(self._sampler.pss_mb_last, 1),
            limit_mb=round(self._sampler.limit_mb, 1),
        )
        self._recorder.count(f"memory.{change.after.name.lower()}")
        for reaction in change.undo:
            tell("memory reaction undone", reaction=reaction.value, reason=change.reason)
        for reaction in change.begin:
            log.warning("memory reaction", reaction=reaction.value, reason=change.reason)
            self._begin(reaction, change.reason)
        if change.after < change.before:
            return
        if change.before > Level.NORMAL:
            self._trim()  # each rise tries again: there is more to hand back now

    def _begin(self, reaction: Reaction, reason: str) -> None:
        self._in_force.add(reaction)
        match reaction:
            case Reaction.SMALLER_CACHES:
                self._shrink(True)
            case Reaction.EARLY_FLUSH:
                self._flush_early(True)
            case Reaction.TRIM:
                self._trim()
            case Reaction.NO_UPKEEP:
                self.upkeep_deferred = f"memory {self.level.name.lower()}: {reason}"
            case Reaction.FEWER_WORKERS:
                self._workers.resize(max(1, self._all_workers // 2))
                self._workers.replace_workers(f"memory {self.level.name.lower()}")
            case Reaction.NO_ENTRIES:
                self._no_entries = f"memory {self.level.name.lower()}: {reason}"
            case Reaction.QUIET_LOG:
                self._quiet(True)
            case Reaction.RESTART:
                self._stop(MEMORY_CRITICAL)
            case Reaction.SMALLER_BATCHES:
                pass  # `load` says it

    def _undo(self, reaction: Reaction) -> None:
        self._in_force.discard(reaction)
        match reaction:
            case Reaction.SMALLER_CACHES:
                self._shrink(False)
            case Reaction.EARLY_FLUSH:
                self._flush_early(False)
            case Reaction.FEWER_WORKERS:
                self._workers.resize(self._all_workers)
            case Reaction.NO_UPKEEP:
                self.upkeep_deferred = ""
            case Reaction.NO_ENTRIES:
                self._no_entries = ""
            case Reaction.QUIET_LOG:
                self._quiet(False)
            case Reaction.TRIM | Reaction.SMALLER_BATCHES | Reaction.RESTART:
                pass  # nothing lasts: the loop reads `load`, and a drain that began goes on

    def _trim(self) -> None:
        """Hand freed memory back to the kernel, off the loop: it takes milliseconds and holds no GIL."""
        if self._trimming is None or not self._trimming.is_alive():
            self._trimming = threading.Thread(target=trim, name="malloc-trim", daemon=True)
            self._trimming.start()

    def _watch_crowd(self, now_s: float) -> None:
        """Others fill our control group: nothing we give back helps, but we may be what the kernel ends."""
        fraction = self._sampler.foreign_fraction()
        told = self._crowd.update(fraction, now_s)
        if told is None:
            return
        used = f"{fraction:.0%} of the control group's memory limit in use, most of it by others"
        self._crowded = used if told else ""
        if told:
            self._recorder.count("memory.crowded")
            log.warning(
                "others fill the control group, no new entries",
                reason=used,
                advice="give it a higher limit, or run what else is in it elsewhere",
            )
        else:
            self._tell_relief()("others no longer fill the control group, entries again", reason=used)

    def _tell_relief(self) -> Callable[..., object]:
        """How good news are told: while info lines are dropped, as warnings."""
        found: Callable[..., object] = log.warning if Reaction.QUIET_LOG in self._in_force else log.info
        return found

    def _watch_growth(self, now_s: float) -> None:
        told = self._growth.add(now_s, self._sampler.pss_mb_last)
        if told is None:
            return
        growing = round(self._growth.slope_mb_per_hour, 2)
        if told:
            self._recorder.count("memory.growth_alarms")
            log.warning(
                "memory grows", mb_per_hour=growing, limit=self._growth_limit, advice="see `perpd memory`"
            )
        else:
            self._tell_relief()("memory grows no more", mb_per_hour=growing)

    @property
    def growth_mb_per_hour(self) -> float | None:
        """Of the last hours; None until the window is filled."""
        found = self._growth.slope_mb_per_hour
        return None if math.isnan(found) else found


def trim() -> bool:
    """Have the allocator return free pages; False where it cannot (another C library)."""
    import ctypes  # half a MB, for a daemon that may never need it

    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError):
        return False
