"""A damaged archive at a start: told once, nothing changed, and recorded on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.archive.archiver import archiving
from service.archive.compaction import compact
from service.archive.damage import SHOWN, tell
from service.archive.manifest import manifest_path
from service.archive.segments import parquets, segments
from service.clock import ManualClock
from service.settings import ArchiveSettings
from tests.integration.test_archive_files import DAY_MS, adjustment, asked, record

STREAM = "adjustments"


def first_lines(directory: Path) -> Path:
    return segments(directory, STREAM)[0]


def cut_lines(directory: Path) -> tuple[Path, str]:
    path = first_lines(directory)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path, f"has {len(content) // 2} bytes, its manifest says {len(content)}"


def empty_parquet(directory: Path) -> tuple[Path, str]:
    compact(directory)
    path = sorted(parquets(directory, STREAM))[0]
    path.write_bytes(b"")
    return path, "is no whole Parquet file (0 bytes)"


def parquet_without_its_footer(directory: Path) -> tuple[Path, str]:
    compact(directory)
    path = sorted(parquets(directory, STREAM))[0]
    path.write_bytes(content := path.read_bytes()[:-1])
    return path, f"is no whole Parquet file ({len(content)} bytes)"


def unreadable_manifest(directory: Path) -> tuple[Path, str]:
    path = first_lines(directory)
    manifest_path(path).write_bytes(b"{")
    return path, f"{manifest_path(path).name} cannot be read"


@pytest.mark.parametrize(
    "damage", [cut_lines, empty_parquet, parquet_without_its_footer, unreadable_manifest]
)
async def test_a_start_tells_what_is_damaged_changes_nothing_and_records_on(
    tmp_path: Path, damage: Callable[[Path], tuple[Path, str]]
) -> None:
    directory = tmp_path / "archive"
    await record(directory)
    path, words = damage(directory)
    left = path.read_bytes()
    with capture_logs() as logged:
        async with archiving(
            directory, ArchiveSettings(), ManualClock(9 * DAY_MS), drain_limit_s=5
        ) as archive:
            await archive.put(STREAM, adjustment(900))
    [told] = [line for line in logged if line["event"] == "the archive is damaged"]
    assert told["first"] == [f"{path.relative_to(directory)}: {words}"]
    assert (told["log_level"], told["files"]) == ("error", 1)
    assert "perpd archive verify" in told["advice"]
    assert path.read_bytes() == left
    assert not (directory / "quarantine").exists()
    if path.suffix == ".jsonl":
        rows = asked(directory, "SELECT max(seq) AS newest FROM adjustments", tmp_path)
        assert rows == [{"newest": 61}]


async def test_a_whole_archive_is_started_without_a_word(tmp_path: Path) -> None:
    await record(tmp_path)
    compact(tmp_path)
    with capture_logs() as logged:
        for _ in range(2):
            async with archiving(
                tmp_path, ArchiveSettings(), ManualClock(9 * DAY_MS), drain_limit_s=5
            ) as archive:
                await archive.put(STREAM, adjustment(901))
    assert [line for line in logged if line["log_level"] == "error"] == []


async def test_of_many_damaged_files_the_first_are_named_and_all_are_counted(tmp_path: Path) -> None:
    await record(tmp_path, days=SHOWN + 3, each=1)
    sealed = segments(tmp_path, STREAM)[:-1]
    for path in sealed:
        manifest_path(path).write_bytes(b"")
    with capture_logs() as logged:
        tell(tmp_path)
    [told] = logged
    assert (told["files"], len(told["first"])) == (len(sealed), SHOWN)
