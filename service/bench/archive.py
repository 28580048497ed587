"""`perpd bench archive`: records a second through the archiver to a synced disk, and the loop's lag."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bench.heartbeat import HeartbeatLag, beating
from service.bench.machine import file_system, machine
from service.bench.processes import answer_of
from service.bench.result import Figure, Result

if TYPE_CHECKING:
    from service.archive.segments import SegmentFile, Threads
    from service.records import Signal

NAME = "archive"
SUMMARY = "records a second through the archiver to fsynced disk, and the lag it causes on the loop"
MEASURES = (
    "Signals as the founding strategy makes them, put one after the other into one stream, then by two "
    "producers into two streams, until the archiver has drained: every record is journalled when put "
    "returns, and written and fsynced to its segment when the clock stops. Deepest buffer: asked after every "
    "record. Journal alone: lines of that length into its mapping, and beside it appended with write(2). "
    "Loop lag: the age of beats that another process sends every millisecond meanwhile. "
    "Disk alone: the same bytes in the same pieces, write and fsync in one plain loop."
)
GOAL_RECORDS_PER_S = 50_000.0
LAG_GOAL_MS = 5.0
BEAT_INTERVAL_S = 0.001
BUFFER_RECORDS = 50
JOURNAL_RECORDS = 50_000
DRAIN_LIMIT_S = 600.0
SCORES = ("trend", "structure", "position", "momentum", "volatility")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=int, default=200_000, metavar="N", help="in each part (default 200000)"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="on the disk to measure (default: here)"
    )


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="perpd-bench-", dir=args.directory) as directory:
        with beating(BEAT_INTERVAL_S) as pipe:
            spec = {"directory": directory, "records": args.records, "pipe": pipe}
            found = answer_of("service.bench.archive", spec, (pipe,))
        parameters = {"records": args.records, "file_system": file_system(Path(directory))}
    one, two, disk = found["one stream"], found["two streams"], found["disk"]
    figures = (
        Figure("one stream", one["records_per_s"], "records/s", "more", GOAL_RECORDS_PER_S),
        Figure("two streams", two["records_per_s"], "records/s", "more", GOAL_RECORDS_PER_S),
        Figure("disk alone", disk["records_per_s"], "records/s", "more"),
        Figure("share of the disk alone", one["records_per_s"] / disk["records_per_s"], "times", "more"),
        Figure("bytes a record", found["bytes_per_record"], "bytes"),
        Figure("CPU a record, one stream", one["cpu_s"] / args.records * 1e6, "us", "less"),
        Figure("appends to segments, one stream", one["appends"], "writes"),
        Figure("fsyncs, one stream", one["syncs"], "fsyncs"),
        Figure("deepest buffer", max(one["deepest"], two["deepest"]), "records", "less", BUFFER_RECORDS),
        Figure("journal alone, mapped, with checksums", found["journal"]["mapped_us"], "us a record", "less"),
        Figure(
            "the same bytes with write(2), no checksums",
            found["journal"]["written_us"],
            "us a record",
            "less",
        ),
        Figure("the same bytes with write(2), longest", found["journal"]["written_longest_ms"], "ms", "less"),
        Figure("loop lag p50, one stream", one["lag_p50_ms"], "ms", "less"),
        Figure("loop lag p99, one stream", one["lag_p99_ms"], "ms", "less", LAG_GOAL_MS),
        Figure("loop lag max, one stream", one["lag_max_ms"], "ms", "less"),
        Figure("loop lag p99, two streams", two["lag_p99_ms"], "ms", "less", LAG_GOAL_MS),
        Figure("beats, one stream", one["lag_samples"], "beats"),
        Figure("beats that should have come, one stream", one["lag_s"] / BEAT_INTERVAL_S, "beats"),
    )
    return Result(NAME, MEASURES, parameters, facts, figures, found)


# -- in the fresh process


def _main(spec: dict[str, Any]) -> None:
    import asyncio

    import uvloop

    directory, records = Path(spec["directory"]), int(spec["records"])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found: dict[str, Any] = {
            "one stream": runner.run(_archived(directory / "one", spec, ("signals",))),
            "two streams": runner.run(_archived(directory / "two", spec, ("signals", "decisions"))),
        }
    size_bytes = sum(file.stat().st_size for file in (directory / "one").rglob("*.jsonl"))
    found["bytes_per_record"] = size_bytes / records
    found["disk"] = _disk_alone(directory / "disk", size_bytes, records)
    found["journal"] = _journal_alone(directory, size_bytes // records)
    print(json.dumps(found))  # noqa: T201


async def _archived(directory: Path, spec: dict[str, Any], streams: tuple[str, ...]) -> dict[str, float]:
    """Put the records, spread evenly over the streams, one producer each; the time includes the drain."""
    import asyncio

    from service.archive.archiver import archiving
    from service.clock import WallClock
    from service.settings import ArchiveSettings

    signal = example_signal()
    settings = ArchiveSettings(buffer_records=BUFFER_RECORDS)
    lag = HeartbeatLag(spec["pipe"])
    disk = _CountedDisk()
    deepest = 0

    async def produce(stream: str) -> None:
        nonlocal deepest
        for _ in range(spec["records"] // len(streams)):
            await archive.put(stream, signal)
            deepest = max(deepest, archive.depth(stream))

    async with lag.running():
        began_s, cpu_before_s = time.perf_counter(), time.process_time()
        async with archiving(
            directory, settings, WallClock(), drain_limit_s=DRAIN_LIMIT_S, open_segment=disk.open
        ) as archive:
            async with asyncio.TaskGroup() as producers:
                for stream in streams:
                    producers.create_task(produce(stream), name=f"bench.{stream}")
        seconds = time.perf_counter() - began_s
        cpu_s = time.process_time() - cpu_before_s
    written = sum(archive.archived.values())
    seen = lag.statistics()
    return {
        "records": written,
        "appends": disk.appends,
        "syncs": disk.syncs,
        "deepest": deepest,
        "records_per_s": written / seconds,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "lag_samples": seen.samples,
        "lag_p50_ms": seen.p50_ms,
        "lag_p99_ms": seen.p99_ms,
        "lag_max_ms": seen.longest_ms,
        "lag_s": lag.seconds,
    }


class _CountedDisk:
    """The archive's own files, counted."""

    def __init__(self) -> None:
        self.appends = 0
        self.syncs = 0

    async def open(self, path: Path, size_bytes: int, threads: "Threads") -> "SegmentFile":
        from service.archive.segments import open_segment

        return _CountedFile(self, await open_segment(path, size_bytes, threads))


class _CountedFile:
    def __init__(self, disk: _CountedDisk, file: "SegmentFile") -> None:
        self._disk = disk
        self._file = file

    async def write(self, data: bytes) -> None:
        self._disk.appends += 1
        await self._file.write(data)

    async def sync(self) -> None:
        self._disk.syncs += 1
        await self._file.sync()

    async def close(self) -> None:
        await self._file.close()


def _journal_alone(directory: Path, line_bytes: int) -> dict[str, float]:
    """One line after the other into a journal that is released when full, and the same with write(2)."""
    from service.archive.journal import open_journal

    line = b"x" * line_bytes
    journal = open_journal(directory, 4_194_304)
    began_s = time.perf_counter()
    for number in range(JOURNAL_RECORDS):
        while journal.append(b"signals", number, line, use_reserve=False) < 0:
            journal.release(journal.end)
    mapped_s = time.perf_counter() - began_s
    journal.close()
    handle = os.open(directory / "written", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    longest_s, began_s = 0.0, time.perf_counter()
    try:
        for _ in range(JOURNAL_RECORDS):
            before_s = time.perf_counter()
            os.write(handle, line)
            longest_s = max(longest_s, time.perf_counter() - before_s)
    finally:
        os.close(handle)
    written_s = time.perf_counter() - began_s
    return {
        "mapped_us": mapped_s / JOURNAL_RECORDS * 1e6,
        "written_us": written_s / JOURNAL_RECORDS * 1e6,
        "written_longest_ms": longest_s * 1e3,
    }


def example_signal() -> "Signal":
    """Of the size and shape the founding strategy makes: five scores and all features."""
    from service.analysis.features import FEATURE_NAMES
    from service.records import PositionSide, Signal

    return Signal(
        signal_id="ict_smc:1000PEPEUSDT:1767607800000",
        strategy="ict_smc",
        symbol="1000PEPEUSDT",
        position_side=PositionSide.LONG,
        candle_close_ms=1_767_607_800_000,
        entry=0.0047123,
        stop=0.0046811,
        target=0.0047747,
        atr=0.0000156123,
        confidence=0.6733333333333333,
        scores=dict.fromkeys(
            ("trend", "structure", "position", "momentum", "volatility"), 0.6666666666666666
        ),
        features={name: 1.2345678901234567 + i for i, name in enumerate(FEATURE_NAMES)},
    )


def _disk_alone(path: Path, size_bytes: int, records: int) -> dict[str, float]:
    """The bytes of one run in pieces of one buffer each, appended and synced one after the other."""
    syncs = -(-records // BUFFER_RECORDS)
    piece = b"x" * (size_bytes // syncs)
    began_s = time.perf_counter()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for _ in range(syncs):
            os.write(handle, piece)
            os.fsync(handle)
    finally:
        os.close(handle)
    seconds = time.perf_counter() - began_s
    return {"records_per_s": records / seconds, "seconds": seconds, "syncs": syncs}


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
