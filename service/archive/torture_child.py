"""The process that `torture` kills: producers on an archive of their own, or the whole daemon.

Both report each record before it is put and after `put` returned. Argument: one JSON object.
"""

import json
import os
import random
import sys
from typing import Any, NoReturn

from service.archive.torture import ABOUT_TO_PUT, ACKNOWLEDGED, DIGEST_BYTES, READY, digest

JOURNAL_BYTES = (131_072, 4_194_304)
SEGMENT_BYTES = 1_000_000  # small, so that kills meet the change from one to the next

COMPACTING = {  # as often as it may, so that kills meet it
    "PERPD_ARCHIVE__SEGMENT_BYTES": "65536",
    "PERPD_ARCHIVE__FLUSH_AFTER_S": "0.2",
    "PERPD_ARCHIVE__COMPACT_EVERY_S": "1.0",
    "PERPD_ANALYSIS__CPU_THRESHOLDS": "[1.0, 1.0]",  # however busy the machine is
}


def main(spec: dict[str, Any]) -> None:
    os.set_inheritable(spec["pipe"], False)
    if spec["kind"] == "archive":
        _archive(spec)
    else:
        _daemon(spec)


def report_puts(pipe: int) -> None:
    """From now on every put of this process is reported."""
    import msgspec

    from service.archive.archiver import DataArchiver
    from service.records import Record

    original = DataArchiver.put

    async def put(self: DataArchiver, stream: str, record: Record) -> None:
        name = digest(msgspec.json.encode(record))
        os.write(pipe, ABOUT_TO_PUT + name)
        await original(self, stream, record)
        os.write(pipe, ACKNOWLEDGED + name)

    DataArchiver.put = put  # type: ignore[method-assign]


def _archive(spec: dict[str, Any]) -> None:
    import asyncio

    report_puts(spec["pipe"])
    asyncio.run(_produce(spec))


async def _produce(spec: dict[str, Any]) -> NoReturn:
    """Put into every stream as fast as it goes, in bursts of random length."""
    import asyncio
    from pathlib import Path

    from service.archive.archiver import archiving
    from service.archive.schema import STREAMS
    from service.clock import WallClock
    from service.settings import ArchiveSettings

    chance = random.Random(spec["seed"])
    settings = ArchiveSettings(
        journal_bytes=chance.choice(JOURNAL_BYTES), segment_bytes=SEGMENT_BYTES, flush_after_s=0.02
    )
    async with archiving(Path(spec["directory"]), settings, WallClock(), drain_limit_s=5) as archive:
        os.write(spec["pipe"], READY + bytes(DIGEST_BYTES))
        while True:
            async with asyncio.TaskGroup() as tasks:
                for stream in STREAMS:
                    tasks.create_task(_burst(archive, stream, chance), name=stream)


async def _burst(archive: Any, stream: str, chance: random.Random) -> None:
    import asyncio
    from decimal import Decimal

    from service.records import Adjustment

    for _ in range(chance.randrange(1, 200)):
        adjustment = Adjustment(
            adjustment_id=f"{chance.getrandbits(64):016x}",
            kind="correction",
            symbol="BTCUSDT",
            amount=Decimal(1),
            reason="x" * chance.choice((0, 40, 400, 4_000, 40_000)),
            at_ms=0,
        )
        await archive.put(stream, adjustment)
    await asyncio.sleep(chance.choice((0, 0, 0.005)))


def _daemon(spec: dict[str, Any]) -> None:
    """`perpd run`, unchanged but for the reports."""
    from service.analysis import nursery
    from service.cli import run_command

    os.environ["PERPD_SIM__URL"] = spec["url"]
    os.environ.update(COMPACTING)
    start_nursery = nursery.start_nursery

    def start() -> nursery.Nursery:
        started = start_nursery()  # before the daemon's imports, as always
        report_puts(spec["pipe"])
        _report_start(spec["pipe"])
        return started

    nursery.start_nursery = start
    sys.exit(run_command(spec["argv"]))


def _report_start(pipe: int) -> None:
    """Ready is when cycles begin."""
    import service.cycle as cycle
    import service.daemon as daemon

    run_cycle = cycle.run_cycle

    async def reported(*arguments: Any) -> Any:
        os.write(pipe, READY + bytes(DIGEST_BYTES))
        return await run_cycle(*arguments)

    vars(daemon)["run_cycle"] = reported


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
