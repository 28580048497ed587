"""Segments after they ended: sealed, compacted, verified, queried, pruned; and what damage does to them."""
# ruff: noqa: PT012 - what is under test is the end of a block

import asyncio
import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.archive import compaction, quarantine, schema, verification
from service.archive import segments as archive_segments
from service.archive.archiver import archiving
from service.archive.catalog import catalog, pruned_until
from service.archive.compaction import CompactionFailed, compact, compact_one
from service.archive.duck import connected
from service.archive.lock import only_upkeep
from service.archive.manifest import manifest_path, read_manifest
from service.archive.numbers import LAST_NAME, write_numbers
from service.archive.query import ONCE, QueryFailed, query
from service.archive.retention import mark_seen, plan, prune
from service.archive.schema import Change, SchemaNewer
from service.archive.segments import parquets, recover, segment_path, segments
from service.archive.tail import ConditionInvalid, condition, tail
from service.archive.verification import StreamReport, verify
from service.bench.archive import example_signal
from service.cli import run_command
from service.clock import ManualClock
from service.errors import EXIT_DATA_DIRECTORY, EXIT_OK, DataDirectoryUnusable, SettingsInvalid
from service.records import (
    Adjustment,
    Decision,
    DecisionOutcome,
    Position,
    PositionSide,
    Record,
    ShadowPosition,
)
from service.settings import ArchiveSettings

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "archive.md").read_text()
DAY_MS = 86_400_000
NOW_MS = 1_760_000_000_000


def adjustment(number: int, **fields: Any) -> Adjustment:
    defaults = {"kind": "funding", "symbol": "BTCUSDT", "amount": Decimal("0.10"), "reason": "", "at_ms": 7}
    return Adjustment(adjustment_id=str(number), **{**defaults, **fields})


async def record(directory: Path, days: int = 3, each: int = 20, stream: str = "adjustments") -> None:
    """`each` records on every one of `days` days: as many segments, the last unfinished."""
    clock = ManualClock(DAY_MS)
    settings = ArchiveSettings(flush_after_s=1e6, journal_bytes=65_536, buffer_records=each)
    for day in range(1, days + 1):
        clock = ManualClock(day * DAY_MS)
        async with archiving(directory, settings, clock, drain_limit_s=5) as archive:
            for number in range(each):
                await archive.put(stream, adjustment((day - 1) * each + number))


def leftovers(directory: Path) -> list[Path]:
    return list(directory.rglob("*.new"))


def report(directory: Path, stream: str = "adjustments") -> StreamReport:
    return next(one for one in verify(directory) if one.stream == stream)


def asked(directory: Path, sql: str, tmp_path: Path) -> list[dict[str, Any]]:
    out = tmp_path / "answer.json"
    query(directory, sql, format="json", out=out, memory_mb=256)
    return [json.loads(line) for line in out.read_text().splitlines()]


async def test_a_segment_that_ends_is_sealed_with_its_checksum_count_and_range(tmp_path: Path) -> None:
    settings = ArchiveSettings(flush_after_s=1e6, segment_bytes=4_096, buffer_records=10)
    async with archiving(tmp_path, settings, ManualClock(), drain_limit_s=5) as archive:
        for number in range(100):
            await archive.put("adjustments", adjustment(number))
    found = catalog(tmp_path, "adjustments")
    sealed = [segment for segment in found[:-1] if segment.manifest is not None]
    assert len(sealed) >= 2
    for segment in sealed:
        assert segment.manifest is not None
        assert segment.manifest.first == segment.first
        assert segment.manifest.records == segment.manifest.last - segment.first + 1
        assert segment.manifest.size_bytes == segment.size_bytes
    assert report(tmp_path).findings == []


async def test_compaction_keeps_every_record_typed_and_removes_the_lines(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    await record(directory)

    done = compact(directory)

    assert (done.segments, done.records, done.refused) == (2, 40, 0)
    assert len(segments(directory, "adjustments")) == 1, "the newest stays as lines"
    assert [path.parent.name for path in parquets(directory, "adjustments")] == ["1970-01-02", "1970-01-03"]
    whole = report(directory)
    assert (whole.records, whole.first, whole.last, whole.gaps, whole.findings) == (60, 1, 60, 0, [])
    rows = asked(
        directory,
        "SELECT seq, adjustment_id, typeof(amount) AS type, amount = 0.10 AS same FROM adjustments "
        "ORDER BY seq",
        tmp_path,
    )
    assert [row["seq"] for row in rows] == list(range(1, 61))
    assert [row["adjustment_id"] for row in rows] == [str(n) for n in range(60)]
    assert {(row["type"], row["same"]) for row in rows} == {("DECIMAL(38,18)", True)}
    async with archiving(directory, ArchiveSettings(), ManualClock(9 * DAY_MS), drain_limit_s=5) as archive:
        assert archive.statistics().streams["adjustments"].sequence == 60


def left_empty(directory: Path, day: str, first: int, content: bytes = b"") -> Path:
    """The newest segment as a crash leaves it: begun, and nothing whole in it."""
    path = segment_path(directory, "adjustments", day, first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b'{"v":1,"seq":5,"arch'])
@pytest.mark.parametrize("day", [1, 2, 3])  # that of the records before, of the empty segment, another
async def test_a_compaction_never_takes_the_segment_that_is_written_to(
    tmp_path: Path, content: bytes, day: int
) -> None:
    await record(tmp_path, days=1, each=4)
    left_empty(tmp_path, "1970-01-03", 5, content)
    settings = ArchiveSettings(flush_after_s=1e6, journal_bytes=65_536, buffer_records=2)
    async with archiving(tmp_path, settings, ManualClock(day * DAY_MS), drain_limit_s=5) as archive:
        await archive.put("adjustments", adjustment(5))
        await archive.put("adjustments", adjustment(6))
        async with asyncio.timeout(10):
            while archive.archived["adjustments"] < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert compact(tmp_path).records == 4
        for number in range(7, 11):
            await archive.put("adjustments", adjustment(number))
    compact(tmp_path, newest=True)
    whole = report(tmp_path)
    assert (whole.records, whole.first, whole.last, whole.findings) == (10, 1, 10, [])


async def test_numbers_go_on_behind_what_is_compacted_though_an_older_segment_is_not(tmp_path: Path) -> None:
    await record(tmp_path, days=2, each=10)
    first, second = segments(tmp_path, "adjustments")
    assert compact_one(tmp_path, second, "adjustments", 128) is not None
    left_empty(tmp_path, "1970-01-04", 21)
    assert first.exists()
    tail = recover(tmp_path, "adjustments")
    assert (tail.next_sequence, tail.size_bytes) == (21, 0)


def test_of_two_segments_with_one_number_the_empty_one_is_older(tmp_path: Path) -> None:
    for day, other in (("1970-01-03", "1970-01-09"), ("1970-01-09", "1970-01-03")):
        directory = tmp_path / day
        left_empty(directory, day, 1)
        written = left_empty(directory, other, 1, b'{"v":1,"seq":1,"archived_ms":0}\n')
        assert segments(directory, "adjustments")[-1] == written
        assert compaction.finished(directory, "adjustments") == [
            segment_path(directory, "adjustments", day, 1)
        ]


async def test_an_archive_that_is_all_compacted_goes_on_with_the_next_number(tmp_path: Path) -> None:
    await record(tmp_path)
    assert compact(tmp_path, newest=True).segments == 3
    assert segments(tmp_path, "adjustments") == []
    await record(tmp_path, days=1)
    whole = report(tmp_path)
    assert (whole.last, whole.gaps, whole.findings) == (80, 0, [])


async def test_features_and_scores_are_maps_that_sql_reads_by_name(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    for day in (1, 2):
        async with archiving(
            directory, ArchiveSettings(), ManualClock(day * DAY_MS), drain_limit_s=5
        ) as archive:
            await archive.put("signals", example_signal())
    compact(directory)
    rows = asked(directory, "SELECT features['rsi'] AS rsi, scores['trend'] AS trend FROM signals", tmp_path)
    signal = example_signal()
    assert rows == [{"rsi": signal.features["rsi"], "trend": signal.scores["trend"]}] * 2


@pytest.mark.parametrize("moment", ["renamed, no manifest", "renamed, manifest, lines still there"])
async def test_a_compaction_killed_at_its_end_is_finished_by_the_next_and_counts_nothing_twice(
    tmp_path: Path, moment: str
) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    first = segments(directory, "adjustments")[0]
    lines, manifest = first.read_bytes(), None
    compact(directory)
    parquet = parquets(directory, "adjustments")[0]
    first.write_bytes(lines)
    if moment == "renamed, no manifest":
        manifest = manifest_path(parquet).read_bytes()
        manifest_path(parquet).unlink()
    assert asked(directory, "SELECT count(*) AS n FROM adjustments", tmp_path) == [{"n": 60}]

    compact(directory)

    assert not first.exists()
    assert report(directory).findings == []
    assert manifest is None or read_manifest(parquet) is not None


async def test_a_segment_that_is_compacted_while_files_are_listed_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(tmp_path)
    original, calls = archive_segments._named, 0

    def listed(*arguments: Any) -> list[Path]:
        nonlocal calls
        found = original(*arguments)
        calls += 1
        if calls == 1:
            monkeypatch.setattr(archive_segments, "_named", original)
            first = segments(tmp_path, "adjustments")[0]
            compact_one(tmp_path, first, "adjustments", 128)
        return found

    monkeypatch.setattr(archive_segments, "_named", listed)
    assert [segment.first for segment in catalog(tmp_path, "adjustments")] == [1, 21, 41]
    assert calls == 1


async def test_a_segment_that_is_sealed_while_files_are_read_is_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(tmp_path)
    original = verification.missing_ranges

    def meanwhile(*arguments: Any) -> Any:
        write_numbers(tmp_path / LAST_NAME, {"adjustments": 80})
        return original(*arguments)

    monkeypatch.setattr(verification, "missing_ranges", meanwhile)
    found = next(one for one in verify(tmp_path) if one.stream == "adjustments")
    assert (found.last, found.findings) == (60, [])


async def test_what_was_written_wrongly_never_replaces_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(tmp_path)
    original = compaction.parquet_rows
    monkeypatch.setattr(
        compaction, "parquet_rows", lambda *a: f"SELECT * FROM ({original(*a)}) WHERE seq > 1"
    )
    with pytest.raises(CompactionFailed, match="19"):
        compact_one(tmp_path, segments(tmp_path, "adjustments")[0], "adjustments", 128)
    assert parquets(tmp_path, "adjustments") == []
    assert leftovers(tmp_path) == []
    assert report(tmp_path).records == 60


async def test_a_field_without_a_column_keeps_its_segment_as_lines(tmp_path: Path) -> None:
    await record(tmp_path)
    first = segments(tmp_path, "adjustments")[0]
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    first.write_text("".join(json.dumps({**line, "surprise": 1}) + "\n" for line in lines))
    assert compact(tmp_path).refused == 1
    assert first.exists()


async def test_nan_infinity_and_huge_strings_survive_compaction(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    signal = example_signal()
    odd = {"nan": float("nan"), "inf": float("inf"), "one": 1.0}
    long = "x" * 3_000_000
    for day in (1, 2):
        async with archiving(
            directory, ArchiveSettings(), ManualClock(day * DAY_MS), drain_limit_s=5
        ) as archive:
            changed = {name: getattr(signal, name) for name in signal.__struct_fields__} | {"features": odd}
            await archive.put("signals", type(signal)(**changed))
            await archive.put("adjustments", adjustment(day, reason=long))
    done = compact(directory)
    assert (done.segments, done.refused) == (2, 0)
    (row, _) = asked(directory, "SELECT features FROM signals", tmp_path)
    assert row["features"] in (
        {"nan": None, "inf": None, "one": 1.0},
        {"key": ["nan", "inf", "one"], "value": [None, None, 1.0]},
    )
    assert asked(directory, "SELECT DISTINCT length(reason) AS n FROM adjustments", tmp_path) == [
        {"n": len(long)}
    ]


# -- damage


def damage(path: Path, sequences: range) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for sequence in sequences:
        index = next(i for i, line in enumerate(lines) if f'"seq":{sequence},'.encode() in line)
        lines[index] = b"\0" * (len(lines[index]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))


async def test_a_corrupted_middle_is_named_by_its_range_and_the_rest_is_still_read(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    first = segments(directory, "adjustments")[0]
    damage(first, range(5, 9))

    found = report(directory)

    assert [f.gap for f in found.findings if f.gap] == [(5, 8)]
    assert "records 5 to 8 (4) are missing" in next(f.words for f in found.findings if f.gap)
    assert asked(directory, "SELECT count(*) AS n FROM adjustments", tmp_path) == [{"n": 56}]


async def test_compaction_sets_a_damaged_segment_aside_whole_and_keeps_what_can_be_read(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    first = segments(directory, "adjustments")[0]
    damage(first, range(5, 9))
    damaged = first.read_bytes()

    done = compact(directory)

    assert (done.segments, done.records, done.refused) == (2, 36, 0)
    assert (directory / "quarantine" / first.name).read_bytes() == damaged
    found = report(directory)
    assert [f.gap for f in found.findings] == [(5, 8)]
    assert "set aside in quarantine" in found.findings[0].what
    assert found.records == 56


@pytest.mark.parametrize("step", ["write_manifest", "sync_directory", "describe"])
async def test_what_is_set_aside_stays_whole_when_the_run_is_killed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed in front of each call of one step in turn, the last time behind the rename."""
    await record(tmp_path)
    first = segments(tmp_path, "adjustments")[0]
    damage(first, range(5, 9))
    damaged = first.read_bytes()
    original = getattr(quarantine, step)
    for allowed in range(2):
        left = [allowed]

        def killed(*arguments: Any, left: list[int] = left) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(quarantine, step, killed)
            compact(tmp_path)
    assert compact(tmp_path).refused == 0
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [damaged]
    found = report(tmp_path)
    assert [f.gap for f in found.findings] == [(5, 8)]
    assert "set aside in quarantine" in found.findings[0].what


async def test_a_segment_that_is_damaged_again_is_set_aside_under_another_name(tmp_path: Path) -> None:
    await record(tmp_path)
    first = segments(tmp_path, "adjustments")[0]
    found: list[bytes] = []
    for sequences in (range(5, 9), range(12, 13)):
        damage(first, sequences)
        found.append(first.read_bytes())
        quarantine.set_aside(tmp_path, first, "adjustments", quarantine.missing_ranges(first))
    kept = tmp_path / "quarantine"
    assert [(kept / f"{first.name}{end}").read_bytes() for end in ("", ".2")] == found


async def test_a_value_changed_in_a_sealed_segment_is_found_by_its_checksum_and_never_compacted(
    tmp_path: Path,
) -> None:
    await record(tmp_path)
    compact(tmp_path)  # seals and compacts the first two
    await record(tmp_path, days=2)
    later = segments(tmp_path, "adjustments")[0]
    compaction.seal(later, "adjustments")
    later.write_bytes(later.read_bytes().replace(b'"funding"', b'"fundinG"', 1))
    assert any("differs from its checksum" in finding.what for finding in report(tmp_path).findings)
    assert compact(tmp_path).refused == 1
    assert later.exists()


async def test_a_changed_parquet_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    await record(tmp_path)
    compact(tmp_path)
    path = parquets(tmp_path, "adjustments")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    assert any("differs from its checksum" in finding.what for finding in report(tmp_path).findings)


@pytest.mark.parametrize("compacted", [False, True])
async def test_a_deleted_segment_is_a_gap_with_a_name(tmp_path: Path, compacted: bool) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    if compacted:
        compact(directory)
    catalog(directory, "adjustments")[1].path.unlink()
    found = report(directory)
    assert [f.gap for f in found.findings] == [(21, 40)]
    assert found.gaps == 1
    if compacted:
        assert "adjustments-000000000021-000000000040 is gone" in found.findings[0].what
    assert asked(directory, "SELECT count(*) AS n FROM adjustments", tmp_path) == [{"n": 40}]


async def test_a_deleted_newest_segment_is_a_gap_and_its_numbers_are_not_used_again(tmp_path: Path) -> None:
    await record(tmp_path)
    segments(tmp_path, "adjustments")[-1].unlink()
    assert [f.gap for f in report(tmp_path).findings] == [(41, 60)]
    await record(tmp_path, days=1)
    found = report(tmp_path)
    assert ([f.gap for f in found.findings], found.last) == ([(41, 60)], 80)


async def test_two_compactions_at_once_are_refused(tmp_path: Path) -> None:
    with only_upkeep(tmp_path), pytest.raises(DataDirectoryUnusable, match="another process compacts"):
        with only_upkeep(tmp_path):
            pass


async def test_a_torn_last_line_is_no_fault_and_not_a_record(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    with segments(directory, "adjustments")[-1].open("ab") as file:
        file.write(b'{"v":1,"seq":61,"archi')
    found = report(directory)
    assert (found.records, found.findings) == (60, [])
    assert "torn line of 22 bytes" in found.notes[0]
    assert asked(directory, "SELECT count(*) AS n FROM adjustments", tmp_path) == [{"n": 60}]


# -- schema versions


class GrownAdjustment(Record, frozen=True, kw_only=True):
    """The adjustment of a later perpd: one field more, one renamed."""

    adjustment_id: str
    type: str
    symbol: str
    amount: Decimal
    reason: str
    at_ms: int
    weight: float


@contextmanager
def later_schema() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        change = Change(added={"weight": "1.5"}, renamed={"type": "kind"})
        patch.setitem(schema.CHANGES, "adjustments", (change,))
        patch.setitem(schema.STREAMS, "adjustments", GrownAdjustment)
        patch.setitem(ONCE, "adjustments", "adjustment_id")  # it names the column that is renamed
        yield


async def put_grown(directory: Path, day: int) -> None:
    grown = GrownAdjustment(
        adjustment_id="new", type="correction", symbol="", amount=Decimal(2), reason="", at_ms=0, weight=3.0
    )
    async with archiving(directory, ArchiveSettings(), ManualClock(day * DAY_MS), drain_limit_s=5) as archive:
        await archive.put("adjustments", grown)


async def test_lines_and_parquet_of_an_older_schema_are_read_in_the_present_one(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    await record(directory, days=2, each=1)
    compact(directory)  # one Parquet file and one segment of lines in the first version
    with later_schema():
        await put_grown(directory, 3)
        await put_grown(directory, 4)
        assert compact(directory).segments == 2  # of an older and of the present version
        rows = asked(directory, "SELECT seq, v, type, weight FROM adjustments ORDER BY seq", tmp_path)
        assert report(directory).findings == []
    assert [(row["v"], row["type"], row["weight"]) for row in rows] == [
        (2, "funding", 1.5),
        (2, "funding", 1.5),
        (2, "correction", 3.0),
        (2, "correction", 3.0),
    ]


@pytest.mark.parametrize("compacted", [False, True])
async def test_a_newer_schema_is_refused_by_writer_and_readers_in_words(
    tmp_path: Path, compacted: bool
) -> None:
    with later_schema():
        await put_grown(tmp_path, 1)
        if compacted:
            compact(tmp_path, newest=True)
    words = "written by a newer perpd: stream adjustments has version 2, this one reads up to 1"
    with pytest.raises(SchemaNewer, match=words):
        verify(tmp_path)
    with pytest.raises(SchemaNewer, match=words):
        query(tmp_path, "SELECT 1", format="table", out=None, memory_mb=256)
    with pytest.raises(DataDirectoryUnusable, match=words):
        await record(tmp_path)


async def test_a_newer_schema_is_seen_behind_an_empty_newest_segment(tmp_path: Path) -> None:
    with later_schema():
        await put_grown(tmp_path, 1)
        compact(tmp_path, newest=True)
    left_empty(tmp_path, "1970-01-03", 2)
    with pytest.raises(DataDirectoryUnusable, match="written by a newer perpd"):
        await record(tmp_path)


# -- full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
async def test_a_disk_that_fills_up_in_the_middle_of_compaction_loses_nothing(tmp_path: Path) -> None:
    """On a tmpfs of 1 MB, mounted here."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(  # noqa: ASYNC221
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        await record(place / "archive", each=100)
        filler = place / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError) as full:
            while True:
                file.write(b"x" * 4_096)
        assert full.value.errno == errno.ENOSPC
        assert compact(place / "archive").refused == 2
        assert report(place / "archive").records == 300
        assert leftovers(place) == []
        filler.unlink()
        assert compact(place / "archive").segments == 2
        assert report(place / "archive").findings == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)  # noqa: ASYNC221


# -- retention


async def test_retention_removes_the_oldest_by_age_and_size_but_never_the_newest(tmp_path: Path) -> None:
    await record(tmp_path, days=5)
    compact(tmp_path)
    by_age = plan(tmp_path, {"default": 1.5}, {}, now_ms=NOW_MS)
    assert [removal.segment.first for removal in by_age] == [1, 21]
    by_size = plan(tmp_path, {}, {"adjustments": 0.000001}, now_ms=NOW_MS)
    assert [removal.segment.first for removal in by_size] == [1, 21, 41, 61]
    assert plan(tmp_path, {}, {}, now_ms=NOW_MS) == []
    prune(tmp_path, by_age)
    found = report(tmp_path)
    assert (found.first, found.records, found.gaps, found.findings) == (41, 60, 0, [])


async def test_what_training_has_not_seen_is_never_removed(tmp_path: Path) -> None:
    directory = tmp_path
    settings = ArchiveSettings(flush_after_s=1e6)
    for day in range(1, 6):
        async with archiving(directory, settings, ManualClock(day * DAY_MS), drain_limit_s=5) as archive:
            await archive.put("signals", example_signal())
    compact(directory)
    assert plan(directory, {"default": 0.1}, {}, now_ms=NOW_MS) == []
    mark_seen(directory, {"signals": 2})
    mark_seen(directory, {"decisions": 9})  # a mark never goes back
    assert [removal.segment.first for removal in plan(directory, {"default": 0.1}, {}, now_ms=NOW_MS)] == [
        1,
        2,
    ]


async def test_a_retention_for_an_unknown_stream_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match=r"archive\.keep_days.*'signls'"):
        plan(tmp_path, {"signls": 1.0}, {}, now_ms=NOW_MS)


# -- reading


async def test_the_documented_comparison_measures_the_risk_at_the_entry_and_counts_no_signal_twice(
    tmp_path: Path,
) -> None:
    """A stop that trailed beyond the entry, one of a record without its first stop, and a traded twin; and
    all of it told again, as after an older state was restored.
    """
    directory = tmp_path / "archive"
    sides: dict[str, Any] = {"symbol": "AUSDT", "position_side": PositionSide.LONG}
    async with archiving(directory, ArchiveSettings(), ManualClock(), drain_limit_s=5) as archive:
        for name, stop, first_stop in (("trailed", 105, 90), ("older", 90, 0)):
            decision = Decision(
                **sides,
                **{"signal_id": name, "reason": "", "detail": "", "rank": 1, "cycle": 1, "decided_ms": 0},
                outcome=DecisionOutcome.ACCEPTED,
                quantity=Decimal(1),
            )
            position = Position(
                **sides,
                **{"position_id": name, "signal_id": name, "leverage": 1, "opened_ms": 1, "closed_ms": 2},
                **{"quantity": Decimal(0), "entry_price": Decimal(100), "target": Decimal(120)},
                **{"margin": Decimal(100), "stop": Decimal(stop), "first_stop": Decimal(first_stop)},
                realised_pnl=Decimal(5),
            )
            again = msgspec.structs.replace(position, close_reason="manual")
            for twice in (position, again):
                await archive.put("decisions", decision)
                await archive.put("positions", twice)
        for name, traded in (("trailed", True), ("alone", False)):
            shadow = ShadowPosition(
                **sides,
                **{"position_id": name, "signal_id": name, "entry": 100.0, "stop": 90.0, "target": 120.0},
                **{"opened_ms": 1, "checked_ms": 2, "closed_ms": 2, "outcome_r": -1.0, "traded": traded},
            )
            for _ in range(2):
                await archive.put("shadow_outcomes", shadow)
    (sql,) = documented("mean_r")
    rows = {row["kind"]: (row["trades"], row["mean_r"]) for row in asked(directory, sql, tmp_path)}
    assert rows == {"real": (2, 0.5), "shadow": (1, -1.0)}
    (sql,) = documented("sum(realised_pnl)")
    [made] = asked(directory, sql, tmp_path)
    assert (made["trades"], float(made["realised"])) == (2, 10.0)
    newest = asked(directory, "SELECT DISTINCT close_reason FROM positions_once", tmp_path)
    assert newest == [{"close_reason": "manual"}]


def documented(words: str) -> list[str]:
    """The questions of the documentation that hold these words."""
    blocks = [found.split("```")[0] for found in DOCUMENTED.split("```sql\n")[1:]]
    return [sql for sql in blocks if words in sql]


async def test_a_payment_told_by_the_stream_and_the_history_is_counted_once(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    hour_ms = 3_600_000
    async with archiving(directory, ArchiveSettings(), ManualClock(), drain_limit_s=5) as archive:
        for number, at_ms in ((1, 8 * hour_ms + 5), (2, 8 * hour_ms), (3, 16 * hour_ms)):
            await archive.put("adjustments", adjustment(number, at_ms=at_ms))
        for _ in range(2):
            await archive.put("adjustments", adjustment(9, kind="settlement", symbol=""))
    found = asked(directory, "SELECT adjustment_id FROM adjustments_once ORDER BY seq", tmp_path)
    assert [row["adjustment_id"] for row in found] == ["2", "3", "9"]


async def test_a_query_that_is_wrong_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(QueryFailed, match="nowhere"):
        query(tmp_path, "SELECT * FROM nowhere", format="table", out=None, memory_mb=256)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("COPY (SELECT 1 AS seq) TO '{file}'", "COPY is not allowed"),
        ("EXPLAIN ANALYZE COPY (SELECT 1 AS seq) TO '{file}'", "COPY is not allowed"),
        ("EXPLAIN (ANALYZE) COPY (SELECT 1 AS seq) TO '{file}'", "COPY is not allowed"),
        ("EXPLAIN /* */ ANALYZE COPY (SELECT 1 AS seq) TO '{file}'", "Parser Error|not allowed"),
        ("COPY (PIVOT range(3) ON range) TO '{file}'", "not allowed"),
        ("SELECT 1) TO '{file}' --", "Parser Error"),
        ("SELECT 1; COPY (SELECT 1 AS seq) TO '{file}'", "2 statements"),
        ("WITH c AS (COPY (SELECT 1 AS seq) TO '{file}') SELECT * FROM c", "COPY statement"),
        ("EXPLAIN ANALYZE WITH c AS (COPY (SELECT 1 AS seq) TO '{file}') SELECT * FROM c", "COPY statement"),
        ("WITH c AS (COPY (SELECT 1) TO '{file}') PIVOT range(3) ON range", "not allowed"),
        ("ATTACH '{file}' AS other", "ATTACH is not allowed"),
        ("EXPORT DATABASE '{file}'", "EXPORT is not allowed"),
        ("INSTALL httpfs", "LOAD is not allowed"),
        ("CREATE TABLE t (n INT)", "CREATE is not allowed"),
        ("INSERT INTO t VALUES (1)", "INSERT is not allowed"),
        ("PRAGMA threads = 1", "SET is not allowed"),
        ("PREPARE p AS SELECT 1", "PREPARE is not allowed"),
        ("", "the query is empty"),
        (" ; ", "the query is empty"),
        ("-- nothing", "the query is empty"),
    ],
)
def test_a_query_that_does_more_than_read_is_refused_and_writes_nothing(
    tmp_path: Path, sql: str, words: str
) -> None:
    directory = tmp_path / "archive"
    directory.mkdir()
    file = directory / "kept.parquet"
    file.write_bytes(b"a segment")
    for out in (None, tmp_path / "answer.csv"):
        with pytest.raises(QueryFailed, match=words):
            query(directory, sql.format(file=file), format="csv", out=out, memory_mb=256)
    assert list(tmp_path.rglob("*.*")) == [file]
    assert file.read_bytes() == b"a segment"


@pytest.mark.parametrize(
    "sql",
    [
        "WITH one AS (SELECT 1) SELECT * FROM one -- a remark",
        "DESCRIBE fills",
        "SUMMARIZE fills",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM fills",
        "EXPLAIN ANALYZE SELECT * FROM fills",
        "FROM fills",
        "SELECT 'copy' AS word FROM fills ORDER BY seq",
        "PIVOT range(3) ON range",
    ],
)
def test_every_statement_that_reads_is_answered(
    tmp_path: Path, sql: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query(tmp_path, sql, format="csv", out=None, memory_mb=256)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM read_text('{archive}/../secret.csv')",
        "SELECT * FROM read_text('{archive}/link.csv')",
        "SELECT * FROM glob('{root}/*')",
        "SELECT * FROM read_csv('http://127.0.0.1:9/secret.csv')",
    ],
)
async def test_a_query_reads_the_archive_and_no_other_file(tmp_path: Path, sql: str) -> None:
    archive, file = tmp_path / "archive", tmp_path / "secret.csv"
    await record(archive, days=1)
    file.write_text("word\nhush\n")
    (archive / "link.csv").symlink_to(file)
    asked = sql.format(file=file, archive=archive, root=tmp_path)
    with pytest.raises(QueryFailed, match=r"reads the archive at .* and nothing else"):
        query(archive, asked, format="table", out=None, memory_mb=256)


async def test_an_archive_behind_a_link_is_read_and_written_out_by_a_relative_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(tmp_path / "elsewhere", days=3)
    compact(tmp_path / "elsewhere")
    (tmp_path / "archive").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for name in ("out.csv", "out.parquet", "out.json"):
        query(Path("archive"), "SELECT seq FROM adjustments", format=name[4:], out=Path(name), memory_mb=256)
        assert (tmp_path / name).stat().st_size
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 61


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("nowhere/x", "there is no directory"),
        (".", "is a directory"),
        ("archive/fills.x", "is inside the archive"),
        ("/proc/x", "/proc/x: cannot be written"),
    ],
)
@pytest.mark.parametrize("format", ["table", "csv", "parquet"])
def test_an_output_that_cannot_be_written_is_one_message_and_makes_nothing(
    tmp_path: Path, out: str, words: str, format: str
) -> None:
    directory = tmp_path / "archive"
    directory.mkdir()
    with pytest.raises(DataDirectoryUnusable, match=words):
        query(directory, "SELECT 1 AS seq", format=format, out=tmp_path / out, memory_mb=256)
    assert list(tmp_path.rglob("*")) == [directory]


async def test_a_view_of_a_stream_without_records_is_empty_and_typed(tmp_path: Path) -> None:
    directory = tmp_path / "archive"
    directory.mkdir()
    assert asked(directory, "SELECT count(*) AS n, sum(fee) AS fees FROM fills", tmp_path) == [
        {"n": 0, "fees": None}
    ]


@pytest.mark.parametrize("format", ["csv", "parquet", "json", "table"])
async def test_an_answer_is_written_in_each_format(tmp_path: Path, format: str) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    out = tmp_path / f"answer.{format}"
    query(directory, "SELECT seq FROM adjustments ORDER BY seq;", format=format, out=out, memory_mb=256)
    if format == "parquet":
        with connected(256) as reader:
            assert reader.execute(f"SELECT count(*) FROM read_parquet('{out}')").fetchall() == [(60,)]
    else:
        assert len(out.read_text().splitlines()) == {"csv": 61, "json": 60, "table": 62}[format]


@pytest.mark.parametrize(
    ("name", "more", "queried", "exported"),
    [
        ("a.csv", [], b"seq,symbol\n", b"v,seq,"),
        ("a.JSON", [], b'{"seq":', b'{"v":'),
        ("a.jsonl", [], b'{"seq":', b'{"v":'),
        ("a.parquet", [], b"PAR1", b"PAR1"),
        ("a.txt", [], b"seq  symbol", b"PAR1"),
        ("a.txt", ["--format", "json"], b'{"seq":', b'{"v":'),
        ("a.csv", ["--format", "json"], b'{"seq":', b'{"v":'),
    ],
)
async def test_the_suffix_says_the_format_unless_a_flag_does(
    tmp_path: Path, name: str, more: list[str], queried: bytes, exported: bytes
) -> None:
    await record(tmp_path / "archive", days=1, each=2)
    out = tmp_path / name
    for asked_for, start in (
        (["query", "SELECT seq, symbol FROM adjustments"], queried),
        (["export", "--stream", "adjustments"], exported),
    ):
        code = run_command(["archive", *asked_for, "--data-dir", str(tmp_path), "--out", str(out), *more])
        assert code == EXIT_OK
        assert out.read_bytes().startswith(start)


async def test_a_tail_shows_the_last_records_that_match(tmp_path: Path) -> None:
    await record(tmp_path)
    conditions = [condition("symbol=BTCUSDT"), condition("seq >= 55"), condition("adjustment_id!=57")]
    shown = tail(tmp_path, ["adjustments"], conditions, 3, follow=False, warn=pytest.fail)
    assert [record["adjustment_id"] for record in shown] == ["56", "58", "59"]


async def test_a_tail_follows_into_new_segments(tmp_path: Path) -> None:
    await record(tmp_path, days=1, each=2)
    following = tail(tmp_path, ["adjustments"], [], 1, follow=True, warn=pytest.fail)
    assert next(following)["seq"] == 2
    await record(tmp_path, days=3, each=2)
    assert [next(following)["seq"] for _ in range(6)] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("features.rsi>70", True),
        ("features.rsi<=70", False),
        ("reason~marg", True),
        ("reason~Marg", False),
        ("symbol='BTCUSDT'", True),
        ("nothing=1", False),
        ("nothing!=1", True),
        ("amount>=9", True),
    ],
)
def test_a_condition_compares_numbers_as_numbers_and_looks_into_maps(text: str, matches: bool) -> None:
    record = {"features": {"rsi": 71}, "reason": "margin", "symbol": "BTCUSDT", "amount": "10.5"}
    assert condition(text).matches(record) is matches


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("symbol=NONE", []),
        ("stream=signals", []),
        ("features.rsi>1000", []),
        (
            "confidance>0.7",
            ["no record so far has a field 'confidance'; there are stream, v, seq, archived_ms"],
        ),
        ("features.rsii>1", ["no record so far has a field 'features.rsii'; there are features."]),
        ("symbol.x=1", ["no record so far has a field 'symbol.x'; there are stream, v,"]),
    ],
)
async def test_a_tail_says_once_which_field_no_record_has(
    tmp_path: Path, where: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "archive"
    signal = example_signal()
    async with archiving(directory, ArchiveSettings(), ManualClock(), drain_limit_s=5) as archive:
        await archive.put("signals", msgspec.structs.replace(signal, features={"rsi": 50.0, "atr": 1.0}))
    tailing = ["archive", "tail", "--no-follow", "--stream", "signals", "--data-dir", str(tmp_path)]
    assert run_command([*tailing, "--where", where, "--where", where]) == EXIT_OK
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("--where: " + words) for line, words in zip(told, expected, strict=True)] == [
        True for _ in expected
    ]


def test_a_condition_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConditionInvalid, match="FIELD OP VALUE"):
        condition("just words")


async def test_a_record_stamped_in_the_future_makes_no_other_old(tmp_path: Path) -> None:
    await record(tmp_path, days=2, each=1, stream="cycles")
    for day in (3, 50_000, 4):
        async with archiving(
            tmp_path, ArchiveSettings(), ManualClock(day * DAY_MS), drain_limit_s=5
        ) as archive:
            await archive.put("cycles", adjustment(day))
    await record(tmp_path, days=3, each=1)
    compact(tmp_path, newest=True)
    assert plan(tmp_path, {"default": 3.5}, {}, now_ms=4 * DAY_MS) == []
    removals = plan(tmp_path, {"default": 1.5}, {}, now_ms=4 * DAY_MS)
    assert [(one.segment.stream, one.segment.first) for one in removals] == [
        ("adjustments", 1),
        ("cycles", 1),
        ("cycles", 2),
    ]


async def test_a_plan_that_is_carried_out_late_never_takes_back_what_was_pruned(tmp_path: Path) -> None:
    await record(tmp_path, days=4, each=1)
    compact(tmp_path)
    early = plan(tmp_path, {"default": 2.5}, {}, now_ms=NOW_MS)
    later = plan(tmp_path, {"default": 1.5}, {}, now_ms=NOW_MS)
    assert (len(early), len(later)) == (0, 1)
    both = plan(tmp_path, {"default": 0.5}, {}, now_ms=NOW_MS)
    prune(tmp_path, both)
    prune(tmp_path, later)
    assert pruned_until(tmp_path, "adjustments") == len(both)
    assert report(tmp_path).findings == []


async def test_prune_plans_only_what_it_may_remove(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await record(tmp_path / "archive", days=3, each=1)
    compact(tmp_path / "archive")
    config = tmp_path / "config.toml"
    config.write_text("[archive]\nkeep_days = { default = 0.5 }\n")
    argv = ["archive", "prune", "--config", str(config), "--data-dir", str(tmp_path)]
    with only_upkeep(tmp_path / "archive"):
        assert run_command(argv) == EXIT_DATA_DIRECTORY
        assert "older than" not in capsys.readouterr().out
        assert run_command([*argv, "--dry-run"]) == EXIT_OK
        assert "would remove 1 segments" in capsys.readouterr().out
    assert run_command(argv) == EXIT_OK
    assert "removed 1 segments" in capsys.readouterr().out
