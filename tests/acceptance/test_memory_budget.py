"""The memory budget of a running daemon: refused, reacted to, drained for."""

import json
import signal
from pathlib import Path

import pytest

from service.errors import EXIT_RESTART, EXIT_SETTINGS, EXIT_UNAVAILABLE

SMALL = ("run", "--symbols", "30", "--speed", "120", "--data-dir", "data")


def test_a_limit_below_what_start_up_needs_is_refused_with_the_figure(perpd, tmp_path: Path) -> None:
    run = perpd(*SMALL, PERPD_MONITOR__MEMORY_LIMIT_MB="40")
    assert run.finish() == EXIT_SETTINGS
    assert "the memory limit is 40 MB and start-up needs 77 MB with 2 workers" in run.failure["message"]
    assert "monitor.memory_limit_mb" in run.failure["advice"]


def test_near_the_limit_levels_and_reactions_come_in_order_and_it_drains(perpd, tmp_path: Path) -> None:
    run = perpd(
        *SMALL,
        PERPD_MONITOR__MEMORY_LIMIT_MB="80",
        PERPD_MONITOR__MEMORY_LEVELS="[0.4, 0.5, 0.6]",
        PERPD_MONITOR__SAMPLE_S="0.5",
    )
    assert run.finish(60) == EXIT_RESTART
    told = [line for line in run.lines if line["message"] in ("memory level", "memory reaction")]
    assert [line.get("memory_level") or line["reaction"] for line in told] == [
        "elevated",
        "smaller batches",
        "smaller caches",
        "early archive flush",
        "free memory handed back",
        "archive upkeep and training deferred",
        "high",
        "workers recycled and reduced",
        "debug and info logs dropped",
        "no new entries",
        "critical",
        "drained restart",
    ]
    assert all("of the limit in use" in line["reason"] for line in told)
    assert run.summary["exit_reason"] == "memory critical"
    assert run.failure["rule"] == "memory", "what is started anew opens nothing until a person resumes"


def test_the_level_high_keeps_trading_without_entries(perpd, tmp_path: Path) -> None:
    run = perpd(
        *SMALL,
        "--cycles",
        "6",
        PERPD_MONITOR__MEMORY_LIMIT_MB="200",
        PERPD_MONITOR__MEMORY_LEVELS="[0.1, 0.15, 0.99]",
        PERPD_MONITOR__SAMPLE_S="0.2",
    )
    assert run.finish(60) == 0
    assert run.summary["cycles"] == 6
    assert run.summary["refused"].get("entries_off", 0) > 0
    assert [line["reaction"] for line in run.lines if line["message"] == "memory reaction"][-1] == (
        "no new entries"
    )


@pytest.mark.slow(about_s=12)
def test_the_command_explains_nine_tenths_of_the_memory_of_a_running_daemon(perpd, tmp_path: Path) -> None:
    run = perpd(*SMALL)
    for _ in range(20):
        run.read_until("cycle")
    asked = perpd("memory", "--data-dir", "data", "--json", "--trace", "1")
    stdout, stderr = asked.process.communicate(timeout=60)
    assert stderr == ""
    answer = json.loads(stdout)
    assert answer["pss_bytes"] / 2**20 > 0.95 * answer["budget"]["pss_mb"]
    assert answer["explained_fraction"] >= 0.9
    own, *others = answer["processes"]
    assert own["explained_fraction"] >= 0.9
    assert {process["name"] for process in others} == {"perpd-nursery", "perpd-worker"}
    for process in others:
        assert sum(process["parts"].values()) == process["pss_bytes"]
    named = sum(own["parts"].values())
    assert named + answer["unexplained_bytes"] == own["pss_bytes"]
    assert min(own["parts"][part] for part in ("candle store", "feature cache", "shadow book", "SQLite")) > 0
    # What no part owns was measured while the daemon started, and is small beside its imports.
    assert (
        own["parts"]["start-up, beyond the parts"] < 0.25 * own["parts"]["interpreter and imported modules"]
    )
    assert answer["trace"]["lines"]
    run.process.send_signal(signal.SIGTERM)
    assert run.finish(40) == 0
    assert not (tmp_path / "data" / "control.sock").exists()


def test_the_command_without_a_daemon_says_so(perpd, tmp_path: Path) -> None:
    asked = perpd("memory", "--data-dir", "nowhere")
    assert asked.finish() == EXIT_UNAVAILABLE
    assert "is it running?" in asked.failure["message"]
