"""A few kills of what 500 do in `perpd archive torture`."""

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.archive.archiver import archiving
from service.archive.compaction import compact
from service.archive.torture import _Ledger, digest, torture
from service.bench.archive import example_signal
from service.clock import ManualClock
from service.records import Adjustment
from service.settings import ArchiveSettings


@pytest.mark.parametrize(("kind", "kills"), [("archive", 12), ("daemon", 3)])
def test_no_acknowledged_record_is_lost_or_repeated_by_a_kill(kind: str, kills: int, tmp_path: Path) -> None:
    found = torture(kind, kills, 7, tmp_path)
    assert (found.lost, found.duplicated, found.misnumbered, found.faults) == (0, 0, 0, 0)
    assert found.kills == kills
    assert found.acknowledged > 100
    assert found.kept >= found.acknowledged


def test_a_lost_a_repeated_and_a_misnumbered_record_are_each_counted(tmp_path: Path) -> None:
    day = tmp_path / "orders" / "2025-10-10"
    day.mkdir(parents=True)
    records = [msgspec.json.encode({"name": name}) for name in ("kept", "repeated", "repeated")]
    lines = [
        b'{"v":1,"seq":%d,"archived_ms":0,' % number + record[1:] + b"\n"
        for number, record in zip((1, 2, 4), records, strict=True)
    ]
    (day / "orders-000000000001.jsonl").write_bytes(b"".join(lines))
    ledger = _Ledger(tmp_path)
    for record in (*records[:2], b'{"name":"lost"}'):
        ledger.put[digest(record)] += 1
        ledger.acknowledged[digest(record)] += 1

    ledger.settle()
    found = ledger.found(1, 0.0)

    assert (found.lost, found.duplicated, found.misnumbered, found.kept) == (1, 1, 1, 3)


@pytest.mark.parametrize(
    "name", ["1234e567890123456789", "9e999999999999999999", "NaN", "sNaN", "Infinity", "-"]
)
def test_a_name_that_looks_like_a_number_is_told_from_others(name: str) -> None:
    assert digest(msgspec.json.encode({"id": name})) != digest(msgspec.json.encode({"id": name + "x"}))


async def put_signals(directory: Path, day: int, ledger: _Ledger) -> None:
    signal = msgspec.structs.replace(
        example_signal(), signal_id=f"day {day}", features={"nan": float("nan"), "one": 1.0, "tiny": 1e-17}
    )
    amount = Decimal("0.10") / 3  # more digits than Parquet keeps
    adjustment = Adjustment(
        adjustment_id=str(day), kind="funding", symbol="A", amount=amount, reason="", at_ms=day
    )
    async with archiving(
        directory, ArchiveSettings(), ManualClock(day * 86_400_000), drain_limit_s=5
    ) as archive:
        for stream, record in (("signals", signal), ("adjustments", adjustment)):
            await archive.put(stream, record)
            ledger.put[digest(msgspec.json.encode(record))] += 1
            ledger.acknowledged[digest(msgspec.json.encode(record))] += 1


async def test_records_that_were_compacted_before_they_were_compared_count_as_the_same(
    tmp_path: Path,
) -> None:
    ledger = _Ledger(tmp_path)
    for days in ((1, 2), (3, 4, 5)):
        for day in days:
            await put_signals(tmp_path, day, ledger)
        compact(tmp_path)
        await asyncio.to_thread(ledger.settle)
    compact(tmp_path, newest=True)
    ledger.acknowledged[digest(b'{"name":"lost"}')] += 1
    await asyncio.to_thread(ledger.settle)
    ledger.verify(compacted=True)

    found = ledger.found(1, 0.0)

    assert (found.lost, found.duplicated, found.misnumbered, found.faults) == (1, 0, 0, 0)
    assert (found.kept, found.compacted) == (10, 6)
