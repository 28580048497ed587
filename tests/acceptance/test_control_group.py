"""The daemon and its workers in a control group with a memory limit, the simulated exchange outside it.

Where no group may be made the setting stands in for it: the levels are the same, only nobody kills.
"""

from pathlib import Path

import psutil
import pytest

from service.errors import EXIT_RESTART, EXIT_SETTINGS

STRATEGIES = Path(__file__).with_name("greedy.py")
TOLD = ("memory level", "memory reaction")
ELEVATED = [
    "elevated",
    "smaller batches",
    "smaller caches",
    "early archive flush",
    "free memory handed back",
    "archive upkeep and training deferred",
]
HIGH = [
    "high",
    "workers recycled and reduced",
    "debug and info logs dropped",
    "no new entries",
]
CRITICAL = ["critical", "drained restart"]


def strategy(name: str, **options: float) -> dict[str, str]:
    """The environment that sets one of the greedy strategies."""
    pairs = ", ".join(f"{key} = {value}" for key, value in options.items())
    return {
        "PERPD_STRATEGY__NAME": f"{STRATEGIES}:{name}",
        "PERPD_STRATEGY__OPTIONS": f"{{ {pairs} }}",
    }


@pytest.fixture
def limited(perpd, control_groups):
    """Start a daemon within a limit, beside an exchange without one; returns the run and its group."""

    def start(limit_mb: float, *arguments: str, speed: int, symbols: int = 200, **environment: str):
        market = ("--symbols", str(symbols), "--speed", str(speed))
        exchange = perpd("sim", "--port", "0", "--seed", "1", *market)
        url = exchange.read_until("simulated exchange ready")["rest_url"]
        group = control_groups(limit_mb)
        if group is None:
            environment["PERPD_MONITOR__MEMORY_LIMIT_MB"] = str(limit_mb)
        command = ("run", "--data-dir", "data", *market, *arguments)
        return perpd(*command, group=group, PERPD_SIM__URL=url, **environment), group

    return start


def told(run) -> list[str]:
    """Levels and reactions as they came."""
    lines = [line for line in run.lines if line["message"] in TOLD]
    return [line.get("memory_level") or line["reaction"] for line in lines]


def kills(group) -> int:
    return 0 if group is None else group.kills


@pytest.mark.slow(about_s=90)
def test_200_symbols_run_500_cycles_in_120_mb(limited) -> None:
    run, group = limited(120, "--cycles", "500", speed=1_200)
    assert run.finish(300) == 0
    assert run.summary["cycles"] == 500
    assert run.summary["symbols"] == 200
    assert run.summary["exit_reason"] == "cycles done"
    assert run.summary["accepted"] > 0
    assert run.summary["equity"] == pytest.approx(run.summary["exchange_equity"], abs=0.01)
    assert told(run) in ([], ELEVATED)  # it trades to the end
    assert kills(group) == 0


@pytest.mark.slow(about_s=10)
def test_in_90_mb_the_levels_come_in_order_and_what_is_given_back_keeps_it_alive(limited) -> None:
    run, group = limited(90, "--cycles", "60", speed=2_400)
    assert run.finish(200) in (0, EXIT_RESTART)
    assert told(run)[: len(ELEVATED)] == ELEVATED
    assert (ELEVATED + HIGH + CRITICAL)[: len(told(run))] == told(run)
    assert run.summary["exit_reason"] in ("cycles done", "memory critical")
    assert kills(group) == 0


@pytest.mark.slow(about_s=11)
def test_in_90_mb_a_leak_in_the_daemon_is_drained_for_before_the_kernel_kills(limited) -> None:
    leak = strategy("Leaking", kb_a_symbol=6)
    often = {"PERPD_MONITOR__SAMPLE_S": "1"}  # as the market is faster
    run, group = limited(90, speed=900, PERPD_ANALYSIS__WORKERS="0", **often, **leak)
    assert run.finish(200) == EXIT_RESTART
    assert told(run) == ELEVATED + HIGH + CRITICAL
    assert all("of the limit in use" in line["reason"] for line in run.lines if line["message"] in TOLD)
    assert run.summary["exit_reason"] == "memory critical"
    assert run.summary["equity"] == pytest.approx(run.summary["exchange_equity"], abs=0.01)
    assert run.failure["rule"] == "memory"
    assert kills(group) == 0


def test_a_group_below_what_start_up_needs_is_refused_with_the_figure(perpd, control_groups) -> None:
    group = control_groups(60)
    setting = {} if group else {"PERPD_MONITOR__MEMORY_LIMIT_MB": "60"}
    run = perpd("run", "--symbols", "30", "--data-dir", "data", group=group, **setting)
    assert run.finish() == EXIT_SETTINGS
    assert "the memory limit is 60 MB and start-up needs 77 MB with 2 workers" in run.failure["message"]
    assert kills(group) == 0


@pytest.mark.slow(about_s=7)
def test_workers_that_leak_50_mb_a_batch_are_recycled_and_the_budget_is_held(limited) -> None:
    leak = strategy("Leaking", kb_a_symbol=50 * 1024 / 8)  # 8 symbols a batch with 2 workers
    # no level is reached, or the lines that are looked at below are dropped
    every = {"PERPD_MONITOR__SAMPLE_S": "0.1", "PERPD_MONITOR__MEMORY_LEVELS": "[0.9, 0.95, 0.99]"}
    run, group = limited(300, "--cycles", "30", speed=300, symbols=40, **every, **leak)
    assert run.finish(200) == 0
    assert run.summary["cycles"] == 30
    assert run.summary["pss_mb_peak"] < 300
    cycles = [line for line in run.lines if line["message"] == "cycle"]
    assert {line["failed"] for line in cycles} == {0}
    assert not run.at_level("error")  # no symbol is in quarantine
    replaced = [line for line in run.lines if line["message"] == "worker replaced"]
    assert len(replaced) >= 5
    assert kills(group) == 0


@pytest.mark.slow(about_s=6)
def test_a_worker_killed_by_the_kernel_for_memory_costs_no_symbol_and_not_the_daemon(
    perpd, control_groups
) -> None:
    group = control_groups(40)
    if group is None:
        pytest.skip("no control group may be made here")
    run = perpd(
        *("run", "--symbols", "12", "--speed", "60", "--data-dir", "data"), **strategy("Hungry", mb=60)
    )
    run.read_until("cycle")
    [nursery] = [p for p in psutil.Process(run.process.pid).children() if p.name() == "perpd-nursery"]
    worker = nursery.children()[0]
    group.entrance.write_text(str(worker.pid))
    line = run.read_until("worker lost")
    assert line["pid"] == worker.pid
    for _ in range(3):
        run.read_until("cycle")
    run.process.terminate()
    assert run.finish(40) == 0
    assert group.kills == 1
    cycles = [line for line in run.lines if line["message"] == "cycle"]
    assert {line["failed"] for line in cycles} == {0}  # a slow machine may shed some, counted apart
    assert not run.at_level("error")  # none is in quarantine
