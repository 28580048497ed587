"""The keeper with its real process: when it starts upkeep, when not, and when it gives way."""

import asyncio
from decimal import Decimal
from pathlib import Path

import pytest

from service.archive.archiver import archiving
from service.archive.keeper import Keeper
from service.archive.lock import only_upkeep
from service.archive.segments import parquets, segments
from service.archive.verification import verify
from service.clock import ManualClock
from service.records import Adjustment
from service.settings import ArchiveSettings
from tests.recorder import Recorder

DAY_MS = 86_400_000


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    """Two finished segments and an unfinished one."""
    for day in (1, 2, 3):
        async with archiving(
            tmp_path / "archive", ArchiveSettings(), ManualClock(day * DAY_MS), drain_limit_s=5
        ) as archive:
            adjustment = Adjustment(
                adjustment_id=str(day), kind="", symbol="", amount=Decimal(1), reason="", at_ms=0
            )
            await archive.put("adjustments", adjustment)
    return tmp_path / "archive"


async def kept(directory: Path, settings: ArchiveSettings, answers: list[bool]) -> tuple[Keeper, Recorder]:
    """Run a keeper once. Args: answers: whether it is calm, asked in order; the last one holds."""
    counts = Recorder()
    asked = iter(answers)
    keeper = Keeper(directory, settings, counts, calm=lambda running: next(asked, answers[-1]))
    keeping = asyncio.create_task(keeper.run())
    async with asyncio.timeout(60):
        while not keeper.looks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    return keeper, counts


async def test_finished_segments_are_compacted_and_the_disk_is_measured(directory: Path) -> None:
    keeper, counts = await kept(directory, ArchiveSettings(), [True])
    assert len(parquets(directory, "adjustments")) == 2
    assert counts.counts["archive.compacted_segments"] == 2
    assert keeper.disk_bytes > 4_194_304  # the journal alone
    assert keeper.disk_free_bytes > 0


@pytest.mark.parametrize(
    ("settings", "calm"), [(ArchiveSettings(compact=False), True), (ArchiveSettings(), False)]
)
async def test_nothing_starts_when_it_is_switched_off_or_not_calm(
    directory: Path, settings: ArchiveSettings, calm: bool
) -> None:
    keeper, _ = await kept(directory, settings, [calm])
    assert keeper.runs == 0
    assert len(segments(directory, "adjustments")) == 3


async def test_upkeep_that_runs_when_memory_becomes_scarce_is_ended_and_nothing_is_lost(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.archive.keeper._POLL_S", 0.02)
    keeper, counts = await kept(directory, ArchiveSettings(), [True, False])
    assert keeper.runs == 1
    assert counts.counts["archive.upkeep_failures"] == 1
    assert all(report.findings == [] for report in verify(directory))
    assert sum(report.records for report in verify(directory)) == 3


async def test_upkeep_that_fails_is_told_and_tried_again_later(directory: Path) -> None:
    with only_upkeep(directory):
        _, counts = await kept(directory, ArchiveSettings(), [True])
    assert counts.counts["archive.upkeep_failures"] == 1
    _, counts = await kept(directory, ArchiveSettings(), [True])
    assert counts.counts["archive.compacted_segments"] == 2
