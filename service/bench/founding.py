"""The real daemon under one profile of settings, with the four parts of the founding report looked at.

It runs as `perpd run --mode paper` runs it, but its market moves a minute when a cycle has ended, so that
cycles follow each other without a pause and nothing depends on the speed of the machine. The four parts are
the daemon's own, each with a look at the bytes it holds where it holds the most.
"""

import asyncio
import json
import os
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bench.processes import memory_of, tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from service.analysis.worker import Outcome, Place
    from service.bench.minutes import SteppedMarket
    from service.cycle import Parts
    from service.exchange.gate import Gate
    from service.exchange.venue import Venue
    from service.learning.feature_cache import FeatureCache
    from service.monitor.performance import PerformanceMonitor
    from service.ports import Clock, Recorder
    from service.records import CycleReport, Record
    from service.settings import Loaded, MonitorSettings

MB = 1024 * 1024
_SETTLE_LIMIT_S = 30.0
_REFERENCE_SYMBOLS = 50
_QUIET_LOOKS = 3  # in a row without anything in flight, before the market moves on


class Seen:
    """High-water marks in bytes, and what was handed to the parts, counted apart from them."""

    def __init__(self) -> None:
        self.batch_bytes = self.batches = self.batch_sum_bytes = 0
        self.batch_mean_bytes = 0.0
        self.batch_symbols: Counter[int] = Counter()
        self.buffer_bytes = self.buffer_records = 0  # of all streams together
        self.stream_bytes = self.stream_records = 0  # of the fullest stream
        self.full = self.full_sum_bytes = 0  # buffers that reached their number of records
        self.full_mean_bytes = 0.0
        self.history_bytes = 0
        self.cache_bytes = 0
        self.put: Counter[str] = Counter()
        self.recorded: Counter[str] = Counter()
        self.monitor: PerformanceMonitor | None = None
        self.cache: FeatureCache | None = None
        self.cycle_s: list[float] = []
        self.pss_mb: list[float] = []

    def as_json(self) -> dict[str, Any]:
        totals = self.monitor.totals() if self.monitor is not None else {}
        facts = {name: value for name, value in vars(self).items() if name not in ("monitor", "cache")}
        return {**facts, "kept": {kind: total.count for kind, total in totals.items()}}

    def buffer(self, size_bytes: int, *, full: bool) -> None:
        self.stream_bytes = max(self.stream_bytes, size_bytes)
        if full:
            self.full += 1
            self.full_sum_bytes += size_bytes
            self.full_mean_bytes = self.full_sum_bytes / self.full

    def batch(self, size_bytes: int, symbols: int) -> None:
        self.batches += 1
        self.batch_sum_bytes += size_bytes
        self.batch_mean_bytes = self.batch_sum_bytes / self.batches
        self.batch_symbols[symbols] += 1
        self.batch_bytes = max(self.batch_bytes, size_bytes)


def probe(seen: Seen, market: "SteppedMarket") -> None:
    """Have the daemon make the probed parts. Their work is the originals'; only the looks are added."""
    from service import daemon
    from service.analysis.analyzer import ParallelAnalyzer
    from service.archive import archiver
    from service.learning.feature_cache import FeatureCache
    from service.monitor.performance import PerformanceMonitor as Original
    from service.monitor.sizes import held_bytes
    from service.records import Load

    shared: list[Outcome] = []

    class Analyzer(ParallelAnalyzer):
        async def _submit(self, worker: int, batch: "list[Place]") -> "list[Outcome]":
            found = await super()._submit(worker, batch)
            # Names of features and the like are the decoder's and shared by all batches: what the first ones
            # hold too is not this one's own.
            if len(shared) < _REFERENCE_SYMBOLS:
                shared.extend(found)
            else:
                seen.batch(held_bytes([shared, list(found)]) - held_bytes([shared]), len(batch))
            return found  # its lane lets go of it before that takes the next

    class Archiver(archiver.DataArchiver):
        async def put(self, stream: str, record: "Record") -> None:
            await super().put(stream, record)
            seen.put[stream] += 1
            buffers = [one.lines for one in self._streams.values()]
            seen.buffer_records = max(seen.buffer_records, sum(map(len, buffers)))
            seen.buffer_bytes = max(seen.buffer_bytes, sum(map(held_bytes, buffers)))
            lines = self._streams[stream].lines
            full = len(lines) >= self._settings.buffer_records
            if full or len(lines) >= seen.stream_records:
                seen.stream_records = max(seen.stream_records, len(lines))
                seen.buffer(held_bytes(lines), full=full)

    class Monitor(Original):
        def __init__(self, settings: "MonitorSettings", clock: "Clock") -> None:
            super().__init__(settings, clock)
            seen.monitor = self

        def record(self, operation: str, seconds: float) -> None:
            super().record(operation, seconds)
            seen.recorded[operation] += 1

    def remembered(*args: Any, **kwargs: Any) -> FeatureCache:
        seen.cache = FeatureCache(*args, **kwargs)
        return seen.cache

    run_cycle = vars(daemon)["run_cycle"]

    async def cycle(parts: "Parts", number: int) -> "CycleReport":
        if number == 1:
            real = parts.load
            # At a cycle a minute the CPU is idle; here, where cycles follow each other, it is not.
            parts.load = lambda: Load(memory_fraction=real().memory_fraction, cpu_fraction=0.0)
        report: CycleReport = await run_cycle(parts, number)
        seen.cycle_s.append(report.seconds)
        seen.history_bytes = max(seen.history_bytes, parts.monitor.history_bytes)
        seen.cache_bytes = max(seen.cache_bytes, held_bytes(seen.cache, within="service.learning"))
        seen.pss_mb.append(sum(memory_of(pid).proportional for pid in tree(os.getpid())) / MB)
        await settled(parts)
        await aged(parts)
        market.step()
        await settled(parts)
        return report

    vars(daemon).update(
        FeatureCache=remembered,
        ParallelAnalyzer=Analyzer,
        PerformanceMonitor=Monitor,
        run_cycle=cycle,
    )
    vars(archiver).update(DataArchiver=Archiver)


async def settled(parts: "Parts") -> None:
    """Wait until nothing is in flight: orders, stops, events, repairs."""
    quiet = 0
    async with asyncio.timeout(_SETTLE_LIMIT_S):
        while quiet < _QUIET_LOOKS:
            await parts.executor.events_applied()
            await parts.feed.settled()
            await asyncio.sleep(0.001)
            busy = parts.executor.busy_symbols() or parts.executor.queue_depth
            quiet = 0 if busy else quiet + 1


async def aged(parts: "Parts") -> None:
    """Between two cycles of a minute every buffer reaches the age at which it is written."""
    parts.archive.flush_early(True)
    async with asyncio.timeout(_SETTLE_LIMIT_S):
        while any(stream.depth for stream in parts.archive.statistics().streams.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    parts.archive.flush_early(False)


def paper_venue(market: "SteppedMarket") -> "Callable[..., AbstractAsyncContextManager[Venue]]":
    """What takes the place of `open_venue`: the paper account over the stepped market."""
    from service.exchange.access import Access
    from service.exchange.paper import open_paper
    from service.exchange.venue import Venue

    @asynccontextmanager
    async def opened(
        loaded: "Loaded", directory: Path, recorder: "Recorder", gate: "Gate"
    ) -> "AsyncIterator[Venue]":
        settings = loaded.settings
        async with open_paper(
            market, market.clock, settings.sim, settings.trading.stop_working_type, directory
        ) as paper:
            yield Venue(exchange=paper, access=Access(settings=settings.exchange, clock=market.clock))

    return opened


def _main(spec: dict[str, Any]) -> int:
    from service.analysis.nursery import start_nursery
    from service.settings import load

    loaded = load(Path(spec["profile"]), {}, spec["settings"])
    nursery = start_nursery() if loaded.settings.analysis.workers else None
    from service import daemon
    from service.bench.minutes import SteppedMarket

    market, seen = SteppedMarket(Path(spec["market"])), Seen()
    probe(seen, market)
    vars(daemon).update(open_venue=paper_venue(market))
    code = daemon.run(loaded, nursery)
    market.close()
    Path(spec["seen"]).write_text(json.dumps(seen.as_json()))
    return code


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
