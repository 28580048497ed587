"""`perpd archive` as a user runs it: after a run, and beside a running daemon that compacts by itself."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STREAMS = {
    "signals",
    "decisions",
    "orders",
    "fills",
    "positions",
    "adjustments",
    "shadow_outcomes",
    "cycles",
}
DOCUMENTED = (ROOT / "docs" / "archive.md").read_text()


def archive(*arguments: str, cwd: Path, code: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "service", "archive", *arguments, "--data-dir", "data"],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


def answers(sql: str, cwd: Path) -> list[dict]:
    return [json.loads(line) for line in archive("query", sql, "--format", "json", cwd=cwd)]


def documented_queries() -> list[str]:
    """The SQL of docs/archive.md, in its order."""
    return [block.split("```")[0] for block in DOCUMENTED.split("```sql\n")[1:]]


def test_a_run_can_be_verified_and_asked_the_documented_questions(perpd, tmp_path):
    run = perpd("run", "--symbols", "60", "--speed", "600", "--cycles", "50", "--data-dir", "data")
    assert run.finish() == 0
    summary = run.summary

    reports = [json.loads(line) for line in archive("verify", "--json", cwd=tmp_path)]
    assert {report["stream"] for report in reports} == STREAMS
    assert all(report["gaps"] == report["faults"] == 0 for report in reports)
    assert {report["stream"]: report["records"] for report in reports} == summary["archived"]

    refusals, results, slowest = (answers(sql, tmp_path) for sql in documented_queries()[:3])
    assert {row["reason"]: row["refusals"] for row in refusals} == summary["refused"]
    assert {row["kind"] for row in results} <= {"real", "shadow"}
    shadows = sum(row["trades"] for row in results if row["kind"] == "shadow")
    (kept,) = answers("SELECT count(*) AS n FROM shadow_outcomes WHERE NOT traded", tmp_path)
    assert shadows == kept["n"]
    assert len(slowest) == 10
    (made,) = answers(documented_queries()[-1], tmp_path)
    assert made["trades"] == summary["positions_closed"]
    assert sorted((row["seconds"] for row in slowest), reverse=True) == [row["seconds"] for row in slowest]

    assert "the archive is whole" in archive("verify", cwd=tmp_path)[-1]
    assert any(line.startswith("signals") for line in archive("ls", cwd=tmp_path))


def test_a_fault_is_exit_code_65_and_a_missing_archive_73(perpd, tmp_path):
    run = perpd("run", "--symbols", "20", "--speed", "600", "--cycles", "3", "--data-dir", "data")
    assert run.finish() == 0
    (segment,) = (tmp_path / "data" / "archive" / "cycles").rglob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"seq":2,', b'"seq"?2,'))
    lines = archive("verify", cwd=tmp_path, code=65)
    assert any("cycles: records 2 to 2 (1) are missing" in line for line in lines)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "there is no archive" in archive("ls", cwd=elsewhere, code=73)[0]


def test_a_daemon_compacts_by_itself_while_others_read(perpd, tmp_path):
    run = perpd(
        *("run", "--symbols", "60", "--speed", "600", "--data-dir", "data"),
        PERPD_ARCHIVE__SEGMENT_BYTES="65536",
        PERPD_ARCHIVE__COMPACT_EVERY_S="1",
        PERPD_ARCHIVE__FLUSH_AFTER_S="0.2",
        PERPD_ARCHIVE__KEEP_MB="{ cycles = 0.000001 }",
        PERPD_ANALYSIS__CPU_THRESHOLDS="[1.0, 1.0]",  # this machine may be busy with other tests
    )
    served = run.read_until("serving health, readiness and metrics")
    compacted = run.read_until("archive compacted")
    assert compacted["segments"] > 0
    assert compacted["refused"] == 0
    assert 0 < compacted["parquet_bytes"] < compacted["json_bytes"]

    reports = [json.loads(line) for line in archive("verify", "--json", cwd=tmp_path)]
    assert all(report["faults"] == 0 for report in reports), reports
    (row,) = answers("SELECT count(*) AS n, max(seq) - min(seq) + 1 AS span FROM signals", tmp_path)
    assert row["n"] == row["span"] > 0
    shown = archive("tail", "--no-follow", "-n", "1", "--stream", "cycles", cwd=tmp_path)
    assert json.loads(shown[0])["stream"] == "cycles"
    with urllib.request.urlopen(f"http://127.0.0.1:{served['port']}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert "perpd_archive_disk_bytes" in metrics
    assert "perpd_archive_writable 1" in metrics

    run.process.send_signal(signal.SIGTERM)
    assert run.finish(60) == 0
    assert not run.at_level("error"), run.at_level("error")


def test_a_tail_follows_a_running_daemon(perpd, tmp_path):
    run = perpd("run", "--symbols", "20", "--speed", "600", "--data-dir", "data")
    run.read_until("cycle")
    following = subprocess.Popen(
        [sys.executable, "-m", "service", "archive", "tail", "--stream", "cycles", "--data-dir", "data"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert following.stdout is not None
        until_s = time.monotonic() + 60
        numbers: list[int] = []
        while len(numbers) < 3 and time.monotonic() < until_s:
            numbers.append(json.loads(following.stdout.readline())["number"])
        assert numbers == list(range(numbers[0], numbers[0] + 3))
    finally:
        following.kill()
        following.communicate()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(60) == 0
