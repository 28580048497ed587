import os
import sqlite3
from pathlib import Path

import pytest

from service.check import here
from service.check.result import Check, Verdict, failures, lines
from service.settings import AnalysisSettings, MonitorSettings, Settings

MOUNTS = """22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:20 / /dev/shm rw - tmpfs tmpfs rw
24 22 0:21 / /data rw - overlay overlay rw
25 24 0:22 / /data/disk\\040one rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/dev/shm/x", "tmpfs"), ("/data/x", "overlay"), ("/data/disk one/x", "xfs"), ("/home", "ext4")],
)
def test_the_innermost_mount_tells_the_file_system(tmp_path: Path, path: str, kind: str):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert here.file_system(Path(path), mounts) == kind
    assert here.file_system(Path(path), tmp_path / "absent") == ""


def test_a_directory_that_a_restart_empties_fails_live_and_warns_else(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(here, "file_system", lambda where: "tmpfs")
    live = here.data_directory(tmp_path / "new", live=True, environment={})
    other = here.data_directory(tmp_path / "new", live=False, environment={})
    assert (live.verdict, other.verdict) == (Verdict.FAIL, Verdict.WARN)
    assert "which a restart empties" in live.found
    assert list(tmp_path.iterdir()) == []  # a check leaves nothing behind


def test_a_container_without_a_volume_fails(tmp_path: Path):
    found = here.data_directory(tmp_path, live=False, environment={"RAILWAY_SERVICE_ID": "x"})
    assert found.verdict is Verdict.FAIL
    assert "attach a volume" in found.advice
    volume = {"RAILWAY_SERVICE_ID": "x", "RAILWAY_VOLUME_MOUNT_PATH": str(tmp_path)}
    assert "no volume" not in here.data_directory(tmp_path, live=False, environment=volume).found


def test_without_a_volume_only_the_archive_is_lost_when_state_is_in_a_database(tmp_path: Path) -> None:
    found = here.data_directory(
        tmp_path, live=True, environment={"RAILWAY_SERVICE_ID": "x"}, state_elsewhere=True
    )
    assert found.verdict is Verdict.WARN
    assert "archive" in found.found


def test_a_directory_that_cannot_be_written_fails(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    found = here.data_directory(tmp_path / "file", live=False, environment={})
    assert found.verdict is Verdict.FAIL
    assert "Not a directory" in found.found


@pytest.mark.parametrize(("free_mb", "verdict"), [(100, "fail"), (1_000, "warn"), (10_000, "pass")])
def test_a_full_disk_is_seen_before_it_is_full(monkeypatch, tmp_path: Path, free_mb: int, verdict: str):
    real = os.statvfs(tmp_path)
    blocks = free_mb * 1024 * 1024 // real.f_frsize

    class Room:
        f_bavail, f_frsize = blocks, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Room())
    assert here.disk_space(tmp_path).verdict == verdict


def test_a_newer_state_and_a_damaged_one_fail(tmp_path: Path):
    newer = tmp_path / "newer"
    with sqlite3.connect(newer) as database:
        database.execute("create table t (x)")
        database.execute("pragma user_version = 99")
    database.close()
    assert "schema 99, this perpd knows" in here.state(newer).found
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"SQLite format 3\0" + os.urandom(8_000))
    assert here.state(damaged).verdict is Verdict.FAIL
    assert here.state(tmp_path / "absent").verdict is Verdict.PASS


@pytest.mark.parametrize(("limit_mb", "verdict"), [(50.0, "fail"), (85.0, "warn"), (400.0, "pass")])
def test_the_memory_limit_is_held_against_what_start_up_needs(limit_mb: float, verdict: str):
    settings = Settings(
        monitor=MonitorSettings(memory_limit_mb=limit_mb), analysis=AnalysisSettings(workers=2)
    )
    assert here.memory(settings).verdict == verdict


def test_what_was_not_looked_at_counts_as_a_failure_and_a_warning_does_not():
    checks = [Check(v.value, v, "found", "do this") for v in Verdict]
    assert [check.name for check in failures(checks)] == ["fail", "skip"]
    text = "\n".join(lines(checks))
    assert "-> do this" in text
    assert text.endswith("1 pass, 1 warn, 1 fail, 1 skip")
