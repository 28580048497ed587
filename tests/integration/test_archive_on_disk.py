"""The archive against real files: what is accepted is on disk, whatever happens."""
# ruff: noqa: PT012, ASYNC110 - what is under test is the end of a block, and a state is polled, not an event

import asyncio
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from service.archive.archiver import DataArchiver, archiving
from service.archive.schema import STREAMS
from service.archive.segments import SegmentFile, Threads, open_segment, segments
from service.clock import ManualClock, WallClock
from service.errors import ArchiveNotDrained, DataDirectoryUnusable
from service.records import Adjustment, Record
from service.settings import ArchiveSettings

DAY_MS = 86_400_000
NEVER_BY_AGE = ArchiveSettings(flush_after_s=3_600.0)


def adjustment(number: int, reason: str = "") -> Adjustment:
    return Adjustment(
        adjustment_id=str(number),
        kind="funding",
        symbol="BTCUSDT",
        amount=Decimal("0.10"),
        reason=reason,
        at_ms=7,
    )


def lines(directory: Path, stream: str = "adjustments") -> list[dict[str, object]]:
    return [
        json.loads(line) for path in segments(directory, stream) for line in path.read_text().splitlines()
    ]


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


class Disk:
    """A file layer that refuses, tears or hangs when told; otherwise the real one."""

    def __init__(self) -> None:
        self.fault: str = ""
        self.writes: list[int] = []
        self.syncs = 0
        self.gate = asyncio.Event()

    async def open(self, path: Path, size_bytes: int, threads: Threads) -> SegmentFile:
        return FaultyFile(self, await open_segment(path, size_bytes, threads), path)


class FaultyFile:
    def __init__(self, disk: Disk, file: SegmentFile, path: Path) -> None:
        self._disk = disk
        self._file = file
        self._path = path

    async def write(self, data: bytes) -> None:
        if self._disk.fault == "hang":
            await self._disk.gate.wait()
        if self._disk.fault == "full":
            with self._path.open("ab") as file:  # a part of it lands, as on a real full disk
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await self._file.write(data)
        self._disk.writes.append(data.count(b"\n"))

    async def sync(self) -> None:
        if self._disk.fault == "hang sync":
            await self._disk.gate.wait()
        if self._disk.fault == "sync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        await self._file.sync()
        self._disk.syncs += 1

    async def close(self) -> None:
        await self._file.close()


async def test_a_record_is_one_numbered_json_line_of_its_stream_and_day(tmp_path: Path) -> None:
    clock = ManualClock(3 * DAY_MS)

    async with archiving(tmp_path, NEVER_BY_AGE, clock, drain_limit_s=5) as archive:
        await archive.put("adjustments", adjustment(1))

    assert [path.relative_to(tmp_path).as_posix() for path in segments(tmp_path, "adjustments")] == [
        "adjustments/1970-01-04/adjustments-000000000001.jsonl"
    ]
    assert lines(tmp_path) == [
        {
            "v": 1,
            "seq": 1,
            "archived_ms": 3 * DAY_MS,
            "adjustment_id": "1",
            "kind": "funding",
            "symbol": "BTCUSDT",
            "amount": "0.10",
            "reason": "",
            "at_ms": 7,
        }
    ]


async def test_a_full_buffer_is_written_with_one_append(tmp_path: Path) -> None:
    disk = Disk()
    async with archiving(
        tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        for number in range(120):
            await archive.put("adjustments", adjustment(number))
        await until(lambda: archive.archived["adjustments"] == 100)
        assert archive.statistics().streams["adjustments"].depth == 20

    assert disk.writes == [50, 50, 20]
    assert [line["seq"] for line in lines(tmp_path)] == list(range(1, 121))
    assert [line["adjustment_id"] for line in lines(tmp_path)] == [str(n) for n in range(120)]


async def test_a_buffer_that_is_not_full_is_written_when_its_oldest_record_is_old(tmp_path: Path) -> None:
    settings = ArchiveSettings(flush_after_s=0.01)
    async with archiving(tmp_path, settings, WallClock(), drain_limit_s=5) as archive:
        await archive.put("signals", adjustment(1))
        await until(lambda: archive.archived["signals"] == 1)
        await archive.put("signals", adjustment(2))
        await until(lambda: archive.archived["signals"] == 2)
        assert len(lines(tmp_path, "signals")) == 2


async def test_an_early_flush_writes_what_waits_and_what_comes_until_it_is_undone(tmp_path: Path) -> None:
    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        await archive.put("signals", adjustment(1))
        archive.flush_early(True)
        await until(lambda: archive.archived["signals"] == 1)
        await archive.put("signals", adjustment(2))
        await until(lambda: archive.archived["signals"] == 2)
        archive.flush_early(False)
        await archive.put("signals", adjustment(3))
        assert archive.statistics().streams["signals"].depth == 1


async def test_a_buffer_never_holds_more_than_its_size_while_the_disk_hangs(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "hang"
    async with (
        archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open) as archive,
        asyncio.TaskGroup() as tasks,
    ):
        producers = [tasks.create_task(archive.put("fills", adjustment(n))) for n in range(200)]
        await until(lambda: archive.statistics().streams["fills"].depth == 50)
        for _ in range(20):
            await asyncio.sleep(0)
        assert archive.statistics().streams["fills"].received == 50
        assert sum(producer.done() for producer in producers) == 50
        disk.fault = ""
        disk.gate.set()

    assert [line["adjustment_id"] for line in lines(tmp_path, "fills")] == [str(n) for n in range(200)]


async def test_all_buffers_together_hold_no_more_bytes_than_set_and_the_largest_is_written_first(
    tmp_path: Path,
) -> None:
    disk = Disk()
    disk.fault = "hang"
    limit = 2_000
    settings = ArchiveSettings(flush_after_s=1e6, buffers_bytes=limit)
    async with (
        archiving(tmp_path, settings, ManualClock(), drain_limit_s=5, open_segment=disk.open) as archive,
        asyncio.TaskGroup() as tasks,
    ):
        await archive.put("orders", adjustment(0))
        fills = [tasks.create_task(archive.put("fills", adjustment(n))) for n in range(40)]
        for _ in range(20):
            await asyncio.sleep(0)
        accepted = sum(producer.done() for producer in fills)
        late = tasks.create_task(archive.put("orders", adjustment(1)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not late.done()  # its own buffer holds one record; the bytes are all streams'
        disk.fault = ""
        disk.gate.set()
        await until(late.done)
        await until(lambda: archive.archived["fills"] >= accepted)
        assert archive.archived["orders"] == 0  # the largest went, and that made room

    assert [line["adjustment_id"] for line in lines(tmp_path, "fills")] == [str(n) for n in range(40)]
    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == ["0", "1"]
    written = [
        path.read_bytes().splitlines(keepends=True)
        for path in (*segments(tmp_path, "fills"), *segments(tmp_path, "orders"))
    ]
    held = [len(line) for line in [*written[0][:accepted], written[1][0]]]
    assert sum(held) - held[-2] < limit <= sum(held)


async def test_a_disk_that_refuses_while_the_buffers_are_full_of_bytes_loses_nothing(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "full"
    settings = ArchiveSettings(flush_after_s=1e6, buffers_bytes=2_000)
    async with archiving(
        tmp_path, settings, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        for number in range(60):
            for stream in ("orders", "fills", "signals"):
                await archive.put(stream, adjustment(number))
        assert not archive.writable
        disk.fault = ""
        await until(lambda: archive.writable)
        await archive.put("fills", adjustment(60))

    for stream, count in (("orders", 60), ("fills", 61), ("signals", 60)):
        assert [line["adjustment_id"] for line in lines(tmp_path, stream)] == [str(n) for n in range(count)]


async def test_numbers_continue_after_a_restart_and_in_the_same_segment(tmp_path: Path) -> None:
    for number in range(3):
        async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
            await archive.put("orders", adjustment(number))

    assert [line["seq"] for line in lines(tmp_path, "orders")] == [1, 2, 3]
    assert len(segments(tmp_path, "orders")) == 1


async def test_a_segment_ends_with_its_day_and_a_clock_set_back_repeats_no_number(tmp_path: Path) -> None:
    for day in (5, 6, 2):
        async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(day * DAY_MS), drain_limit_s=5) as archive:
            await archive.put("orders", adjustment(day))

    found = [path.relative_to(tmp_path / "orders").as_posix() for path in segments(tmp_path, "orders")]
    assert found == [
        "1970-01-06/orders-000000000001.jsonl",
        "1970-01-07/orders-000000000002.jsonl",
        "1970-01-03/orders-000000000003.jsonl",
    ]


async def test_a_segment_ends_at_its_size(tmp_path: Path) -> None:
    settings = ArchiveSettings(flush_after_s=3_600.0, buffer_records=10, segment_bytes=4_096)
    async with archiving(tmp_path, settings, ManualClock(), drain_limit_s=5) as archive:
        for number in range(100):
            await archive.put("orders", adjustment(number, reason="x" * 100))

    found = segments(tmp_path, "orders")
    assert len(found) > 2
    assert all(path.stat().st_size < 4_096 + 10 * 400 for path in found)
    assert [line["seq"] for line in lines(tmp_path, "orders")] == list(range(1, 101))


@pytest.mark.parametrize(
    "torn", [b'{"v":1,"seq":3,"archi', b"\0" * 4_096, b"\0\0\n\0", b"not json\n", b"\xff\xfe\n{", b"{}\n"]
)
async def test_a_torn_end_is_cut_kept_aside_and_its_number_used_again(tmp_path: Path, torn: bytes) -> None:
    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        await archive.put("orders", adjustment(1))
        await archive.put("orders", adjustment(2))
    (path,) = segments(tmp_path, "orders")
    with path.open("ab") as file:
        file.write(torn)

    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        assert archive.statistics().torn_bytes == len(torn)
        await archive.put("orders", adjustment(3))

    assert [line["seq"] for line in lines(tmp_path, "orders")] == [1, 2, 3]
    assert path.with_name(path.name + ".torn").read_bytes() == torn


async def test_a_segment_that_a_crash_left_empty_repeats_no_number(tmp_path: Path) -> None:
    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(DAY_MS), drain_limit_s=5) as archive:
        await archive.put("orders", adjustment(1))
    empty = tmp_path / "orders" / "1970-01-03" / "orders-000000000002.jsonl"
    empty.parent.mkdir()
    empty.write_bytes(b'{"v":1,"se')

    for number in (2, 3):
        async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(3 * DAY_MS), drain_limit_s=5) as archive:
            await archive.put("orders", adjustment(number))

    assert [line["seq"] for line in lines(tmp_path, "orders")] == [1, 2, 3]


@pytest.mark.parametrize("fault", ["full", "sync"])
async def test_a_disk_that_refuses_loses_and_repeats_nothing_once_it_takes_again(
    tmp_path: Path, fault: str
) -> None:
    disk = Disk()
    async with archiving(
        tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        await put_many(archive, range(50))
        await until(lambda: archive.archived["orders"] == 50)
        disk.fault = fault
        async with asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(put_many(archive, range(50, 170)))
            await until(lambda: not archive.writable)
            await until(lambda: archive.statistics().errors >= 2)
            await producing  # the journal has room for what ends the positions
            assert archive.statistics().streams["orders"].depth == 0
            disk.fault = ""
        await until(lambda: archive.writable)

    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == [str(n) for n in range(170)]
    assert [line["seq"] for line in lines(tmp_path, "orders")] == list(range(1, 171))


async def put_many(archive: DataArchiver, numbers: range) -> None:
    for number in numbers:
        await archive.put("orders", adjustment(number))


async def test_a_stream_whose_files_refuse_does_not_stop_the_others(tmp_path: Path) -> None:
    settings = ArchiveSettings(flush_after_s=0.01)
    (tmp_path / "signals").write_text("a file where a directory belongs")
    with pytest.raises(ArchiveNotDrained, match="1 records are in the journal only: signals 1"):
        async with archiving(tmp_path, settings, WallClock(), drain_limit_s=0.2) as archive:
            await archive.put("signals", adjustment(1))
            await until(lambda: not archive.writable)
            await archive.put("orders", adjustment(2))
            await until(lambda: archive.archived["orders"] == 1)
            assert not archive.writable


async def test_records_left_at_the_drain_limit_are_counted_by_stream(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "full"
    with pytest.raises(ArchiveNotDrained, match="4 records are in the journal only: orders 3, fills 1"):
        async with archiving(
            tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=0.1, open_segment=disk.open
        ) as archive:
            await put_many(archive, range(3))
            await archive.put("fills", adjustment(9))


async def test_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "hang"
    with pytest.raises(ArchiveNotDrained):
        async with archiving(
            tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=0.05, open_segment=disk.open
        ) as archive:
            await archive.put("orders", adjustment(1))


async def test_a_producer_that_waits_when_the_drain_fails_learns_it(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "hang"
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(ArchiveNotDrained):
            async with archiving(
                tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=0.05, open_segment=disk.open
            ) as archive:
                await put_many(archive, range(50))
                late = tasks.create_task(expect_refusal(archive))
                await asyncio.sleep(0)
    assert late.result() == "refused"


async def expect_refusal(archive: DataArchiver) -> str:
    with pytest.raises(ArchiveNotDrained):
        await archive.put("orders", adjustment(50))
    return "refused"


async def test_a_producer_that_waits_when_the_drain_begins_is_still_written(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "hang"
    async with asyncio.TaskGroup() as tasks:
        async with archiving(
            tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
        ) as archive:
            tasks.create_task(put_many(archive, range(130)))
            await until(lambda: archive.statistics().streams["orders"].depth == 50)
            disk.fault = ""
            disk.gate.set()
    assert len(lines(tmp_path, "orders")) == 130


async def test_an_error_inside_the_block_still_drains_and_is_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
            await put_many(archive, range(3))
            raise ZeroDivisionError
    assert len(lines(tmp_path, "orders")) == 3


async def test_a_writer_that_fails_by_a_mistake_of_ours_is_not_silent(tmp_path: Path) -> None:
    async def broken(path: Path, size_bytes: int, threads: Threads) -> SegmentFile:
        raise RuntimeError("a mistake")

    with pytest.raises(ArchiveNotDrained) as caught:
        async with archiving(
            tmp_path, ArchiveSettings(flush_after_s=0.01), WallClock(), drain_limit_s=5, open_segment=broken
        ) as archive:
            await archive.put("orders", adjustment(1))
            await until(lambda: not archive.writable)
            with pytest.raises(ArchiveNotDrained):
                await archive.put("orders", adjustment(2))
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_two_writers_are_refused(tmp_path: Path) -> None:
    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5):
        with pytest.raises(DataDirectoryUnusable, match="another process"):
            async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5):
                pass
    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        assert archive.writable


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryUnusable, match="cannot be written"):
        async with archiving(tmp_path / "file" / "archive", NEVER_BY_AGE, ManualClock(), drain_limit_s=5):
            pass


async def test_an_unknown_stream_and_a_record_json_cannot_say_are_refused_and_use_no_number(
    tmp_path: Path,
) -> None:
    class Odd(Record, frozen=True, kw_only=True):
        what: object

    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        with pytest.raises(ValueError, match="no archive stream 'nonsense'"):
            await archive.put("nonsense", adjustment(1))
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            await archive.put("orders", Odd(what=object()))
        await archive.put("orders", adjustment(1))
        assert set(archive.archived) == set(STREAMS)
    assert [line["seq"] for line in lines(tmp_path, "orders")] == [1]


async def test_records_left_in_the_journal_are_written_by_the_next_start_once_and_in_order(
    tmp_path: Path,
) -> None:
    disk = Disk()
    with pytest.raises(ArchiveNotDrained, match="80 records are in the journal only"):
        async with archiving(
            tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=0.1, open_segment=disk.open
        ) as archive:
            await put_many(archive, range(50))
            await until(lambda: archive.archived["orders"] == 50)
            disk.fault = "full"
            await put_many(archive, range(50, 130))

    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        assert 30 <= archive.statistics().replayed <= 80, "whole lines that reached the file are not repeated"
        assert archive.statistics().journal_bytes == 0
        await put_many(archive, range(130, 132))

    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == [str(n) for n in range(132)]
    assert [line["seq"] for line in lines(tmp_path, "orders")] == list(range(1, 133))


async def test_what_a_segment_has_already_is_not_replayed(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "hang sync"  # written to the file, never reported as synced
    with pytest.raises(ArchiveNotDrained):
        async with archiving(
            tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=0.05, open_segment=disk.open
        ) as archive:
            await put_many(archive, range(50))
            await until(lambda: archive.statistics().streams["orders"].depth == 0)

    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        assert archive.statistics().replayed == 0
    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == [str(n) for n in range(50)]


async def test_while_the_disk_refuses_records_are_journalled_until_it_is_full_and_written_once_it_takes(
    tmp_path: Path,
) -> None:
    settings = ArchiveSettings(flush_after_s=3_600.0, journal_bytes=65_536)
    disk = Disk()
    disk.fault = "full"
    async with archiving(
        tmp_path, settings, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        async with asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(put_many(archive, range(1_000)))
            await until(lambda: not archive.writable)
            await until(lambda: archive.statistics().journal_bytes > 60_000)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not producing.done(), "beyond the journal the producer waits"
            assert archive.statistics().journal_bytes <= 65_536
            disk.fault = ""
        await until(lambda: archive.writable)

    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == [str(n) for n in range(1_000)]


async def test_a_disk_that_syncs_slowly_is_written_to_meanwhile_and_slows_the_producer(
    tmp_path: Path,
) -> None:
    settings = ArchiveSettings(flush_after_s=3_600.0, journal_bytes=65_536)
    disk = Disk()
    disk.fault = "hang sync"
    async with archiving(
        tmp_path, settings, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        async with asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(put_many(archive, range(1_000)))
            await until(lambda: archive.statistics().journal_bytes > 40_000)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not producing.done()
            assert archive.statistics().streams["orders"].depth <= 50
            assert archive.statistics().journal_bytes <= 65_536 * 3 // 4, (
                "the reserve is for a disk that refuses"
            )
            disk.fault = ""
            disk.gate.set()
    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == [str(n) for n in range(1_000)]


async def test_a_record_too_long_for_the_journal_is_durable_when_put_returns(tmp_path: Path) -> None:
    long = "é" * 3_000_000
    disk = Disk()
    async with archiving(
        tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        await put_many(archive, range(3))
        await archive.put("orders", adjustment(3, reason=long))
        assert archive.archived["orders"] == 4
        await archive.put("orders", adjustment(4))
        with pytest.raises(ValueError, match="more than is readable"):
            await archive.put("orders", adjustment(5, reason="x" * 17_000_000))
    kept = lines(tmp_path, "orders")
    assert [line["seq"] for line in kept] == [1, 2, 3, 4, 5]
    assert kept[3]["reason"] == long


async def test_a_long_record_waits_for_a_disk_that_refuses_and_keeps_its_place(tmp_path: Path) -> None:
    disk = Disk()
    disk.fault = "full"
    async with archiving(
        tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        async with asyncio.TaskGroup() as tasks:
            putting = tasks.create_task(archive.put("orders", adjustment(0, reason="x" * 2_000_000)))
            await until(lambda: archive.statistics().errors >= 2)
            assert not archive.writable, "not until the record is written"
            assert not putting.done()
            disk.fault = ""
        await put_many(archive, range(1, 3))
        await until(lambda: archive.writable)
    assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == ["0", "1", "2"]


@pytest.mark.parametrize("again", [True, False])
async def test_a_long_record_that_is_cancelled_leaves_nothing_and_its_number_to_the_next(
    tmp_path: Path, again: bool
) -> None:
    disk = Disk()
    async with archiving(
        tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5, open_segment=disk.open
    ) as archive:
        await archive.put("orders", adjustment(0, reason="x" * 2_000_000))
        disk.fault = "hang sync"
        putting = asyncio.create_task(archive.put("orders", adjustment(1, reason="x" * 2_000_000)))
        await until(lambda: len(disk.writes) == 2)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        disk.fault = ""
        assert [line["adjustment_id"] for line in lines(tmp_path, "orders")] == ["0"]
        if again:
            await archive.put("orders", adjustment(2, reason="x" * 2_000_000))
    kept = [(line["seq"], line["adjustment_id"]) for line in lines(tmp_path, "orders")]
    assert kept == [(1, "0"), (2, "2")][: 1 + again]


async def test_what_a_refused_sync_left_at_the_end_of_a_day_is_not_repeated_on_the_next(
    tmp_path: Path,
) -> None:
    clock, disk = ManualClock(DAY_MS), Disk()
    async with archiving(tmp_path, NEVER_BY_AGE, clock, drain_limit_s=5, open_segment=disk.open) as archive:
        await put_many(archive, range(50))
        await until(lambda: archive.archived["orders"] == 50)
        disk.fault = "sync"
        await put_many(archive, range(50, 100))
        await until(lambda: not archive.writable)
        clock.advance_to(2 * DAY_MS)
        disk.fault = ""
        await until(lambda: archive.writable)
    assert [line["seq"] for line in lines(tmp_path, "orders")] == list(range(1, 101))


async def test_nan_and_the_infinities_are_kept_as_null(tmp_path: Path) -> None:
    class Numbers(Record, frozen=True, kw_only=True):
        values: list[float]
        exact: Decimal

    async with archiving(tmp_path, NEVER_BY_AGE, ManualClock(), drain_limit_s=5) as archive:
        values = [float("nan"), float("inf"), float("-inf"), 1.5]
        await archive.put("orders", Numbers(values=values, exact=Decimal("NaN")))
    (line,) = lines(tmp_path, "orders")
    assert line["values"] == [None, None, None, 1.5]
    assert line["exact"] == "NaN"


async def test_a_clock_set_back_an_hour_loses_and_reorders_nothing(tmp_path: Path) -> None:
    hour_ms = 3_600_000
    clock = WallClock()
    async with archiving(tmp_path, NEVER_BY_AGE, clock, drain_limit_s=5) as archive:
        await put_many(archive, range(60))
        clock.offset_ms = -hour_ms
        await put_many(archive, range(60, 120))
    kept = lines(tmp_path, "orders")
    assert [line["adjustment_id"] for line in kept] == [str(n) for n in range(120)]
    assert [line["seq"] for line in kept] == list(range(1, 121))
    assert min(int(str(line["archived_ms"])) for line in kept[60:]) < int(str(kept[59]["archived_ms"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_full_file_system_stops_nothing_but_entries_and_resumes_when_space_returns(
    tmp_path: Path,
) -> None:
    """On a tmpfs of 1 MB, mounted here."""
    with mounted_tmpfs(tmp_path / "small", "1m") as directory:
        settings = ArchiveSettings(flush_after_s=0.01, journal_bytes=65_536)
        async with archiving(directory, settings, WallClock(), drain_limit_s=5) as archive:
            await put_many(archive, range(10))
            await until(lambda: archive.archived["orders"] == 10)
            filler = directory / "filler"
            fill(filler)
            async with asyncio.TaskGroup() as tasks:
                producing = tasks.create_task(put_many(archive, range(10, 400)))
                await until(lambda: not archive.writable)
                await until(lambda: archive.statistics().journal_bytes > 60_000 or producing.done())
                assert archive.statistics().streams["orders"].received > 100, "the journal took them"
                filler.unlink()
            await until(lambda: archive.writable)
        kept = lines(directory, "orders")
    assert [line["adjustment_id"] for line in kept] == [str(n) for n in range(400)]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_read_only_or_full_directory_is_refused_at_the_start_and_named(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "1m") as directory:
        fill(directory / "filler")
        with pytest.raises(DataDirectoryUnusable, match="No space left"):
            async with archiving(directory, ArchiveSettings(), WallClock(), drain_limit_s=5):
                pass
        (directory / "filler").unlink()
        remounted_read_only(directory)
        with pytest.raises(DataDirectoryUnusable, match="Read-only file system"):
            async with archiving(directory, ArchiveSettings(), WallClock(), drain_limit_s=5):
                pass


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_file_system_that_turns_read_only_stops_entries_and_not_the_process(tmp_path: Path) -> None:
    """On an ext4 of 16 MB in a file, mounted here, that meets an error."""
    with mounted_ext4(tmp_path) as (directory, trigger):
        settings = ArchiveSettings(flush_after_s=0.01, journal_bytes=65_536)
        with pytest.raises(ArchiveNotDrained, match="are in the journal only: orders"):
            async with archiving(directory, settings, WallClock(), drain_limit_s=0.2) as archive:
                await put_many(archive, range(10))
                await until(lambda: archive.archived["orders"] == 10)
                trigger.write_text("1")
                await put_many(archive, range(10, 100))
                await until(lambda: not archive.writable)
                await put_many(archive, range(100, 200))
                assert archive.statistics().streams["orders"].received == 200
        with pytest.raises(DataDirectoryUnusable, match="Read-only file system"):
            async with archiving(directory, settings, WallClock(), drain_limit_s=0.2):
                pass


@contextmanager
def mounted_ext4(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A mount, and the file into which a 1 makes its file system find an error and turn read-only."""
    image, place = directory / "image", directory / "small"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * 1024 * 1024)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True)
    options = ["-o", "loop,errors=remount-ro"]
    if made.returncode or subprocess.run(["mount", *options, image, place], capture_output=True).returncode:
        pytest.skip("no ext4 can be mounted here")
    try:
        device = os.stat(place).st_dev
        name = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").rpartition("/")[2]
        trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel offers no way to make ext4 find an error")
        yield place, trigger
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def mounted_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remounted_read_only(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4_096)
