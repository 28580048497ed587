"""The guard performs the plan: each reaction once, undone when the level falls."""

from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from service.clock import WallClock
from service.daemon import OpenDaemon
from service.monitor.budget import Level
from service.monitor.guard import MEMORY_CRITICAL, MemoryGuard, trim
from service.monitor.memory import MemorySampler
from service.monitor.performance import PerformanceMonitor
from service.records import Load
from service.settings import MonitorSettings, Settings

SETTINGS = MonitorSettings(memory_levels=(0.7, 0.8, 0.9), memory_calm_s=0.0, memory_growth_hours=0.05)


class Machine(MemorySampler):
    """A machine whose memory is what the test says."""

    def __init__(self) -> None:
        super().__init__(100)
        self.fraction = self.group = self.foreign = 0.0

    def sample(self) -> Load:
        self.pss_mb_last = self.fraction * self.limit_mb
        return Load(memory_fraction=self.fraction, cpu_fraction=0.25)

    def group_fraction(self) -> float:
        return self.group

    def foreign_fraction(self) -> float:
        return self.foreign

    def pressure_pct(self) -> float | None:
        return None


class Acts:
    """What the guard did, in order; it is the workers too."""

    workers = 4

    def __init__(self) -> None:
        self.done: list[tuple[str, object]] = []

    def resize(self, workers: int) -> None:
        self.done.append(("resize", workers))

    def replace_workers(self, reason: str) -> None:
        self.done.append(("replace", reason))


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def acts() -> Acts:
    return Acts()


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def guard(machine: Machine, acts: Acts, now: list[float]) -> MemoryGuard:
    return MemoryGuard(
        SETTINGS,
        machine,
        PerformanceMonitor(SETTINGS, WallClock()),
        workers=acts,
        shrink=lambda on: acts.done.append(("shrink", on)),
        flush_early=lambda on: acts.done.append(("flush early", on)),
        quiet=lambda on: acts.done.append(("quiet", on)),
        stop=lambda reason: acts.done.append(("stop", reason)),
        monotonic_s=lambda: now[0],
    )


def test_the_levels_act_in_order_and_each_once(guard: MemoryGuard, machine: Machine, acts: Acts) -> None:
    machine.fraction = 0.95
    for _ in range(5):
        guard.sample()
    assert acts.done == [
        ("shrink", True),
        ("flush early", True),
        ("resize", 2),
        ("replace", "memory high"),
        ("quiet", True),
        ("stop", MEMORY_CRITICAL),
    ]
    assert guard.level is Level.CRITICAL
    assert "high" in guard.entries_off


def test_what_a_level_did_is_undone_when_it_falls(guard: MemoryGuard, machine: Machine, acts: Acts) -> None:
    machine.fraction = 0.85
    guard.sample()
    guard.sample()
    assert guard.entries_off
    assert guard.upkeep_deferred == "memory elevated: 85% of the limit in use"
    acts.done.clear()
    machine.fraction = 0.3
    guard.sample()
    guard.sample()
    assert acts.done == [("quiet", False), ("resize", 4), ("flush early", False), ("shrink", False)]
    assert guard.entries_off == ""
    assert guard.upkeep_deferred == ""
    assert guard.in_force == []


def test_the_archives_upkeep_waits_for_as_long_as_the_reaction_says(
    guard: MemoryGuard, machine: Machine
) -> None:
    daemon = SimpleNamespace(guard=guard, memory=machine, settings=Settings())
    machine.limit_mb = 1_000.0
    guard.sample()
    assert OpenDaemon._calm(daemon, False)
    machine.fraction = 0.75
    guard.sample()
    assert "archive upkeep and training deferred" in guard.in_force
    assert not OpenDaemon._calm(daemon, True)
    machine.fraction = 0.1
    guard.sample()
    assert OpenDaemon._calm(daemon, True)


def test_each_level_and_reaction_is_logged_once_with_its_reason(guard: MemoryGuard, machine: Machine) -> None:
    machine.fraction = 0.75
    with capture_logs() as lines:
        guard.sample()
        guard.sample()
    assert [(line["event"], line.get("memory_level") or line["reaction"]) for line in lines] == [
        ("memory level", "elevated"),
        ("memory reaction", "smaller batches"),
        ("memory reaction", "smaller caches"),
        ("memory reaction", "early archive flush"),
        ("memory reaction", "free memory handed back"),
        ("memory reaction", "archive upkeep and training deferred"),
    ]
    assert {line["reason"] for line in lines} == {"75% of the limit in use"}


def test_smaller_batches_are_asked_for_by_a_full_load(guard: MemoryGuard, machine: Machine) -> None:
    machine.fraction = 0.5
    guard.sample()
    assert guard.load == Load(memory_fraction=0.5, cpu_fraction=0.25)
    machine.fraction = 0.75
    guard.sample()
    assert guard.load.memory_fraction == 1.0


def test_the_control_group_counts_when_it_is_nearer_to_its_limit(
    guard: MemoryGuard, machine: Machine
) -> None:
    machine.fraction, machine.group = 0.2, 0.72
    guard.sample()
    assert guard.level is Level.ELEVATED
    assert guard.used_fraction == 0.72


def test_a_control_group_that_others_fill_keeps_entries_off_and_gives_nothing_up(
    guard: MemoryGuard, machine: Machine, acts: Acts
) -> None:
    with capture_logs() as lines:
        for machine.foreign in (0.89, 0.97, 0.99, 0.86, 0.97):
            guard.sample()
    assert [(line["log_level"], line["event"]) for line in lines] == [
        ("warning", "others fill the control group, no new entries")
    ]
    assert guard.entries_off == "97% of the control group's memory limit in use, most of it by others"
    assert (guard.level, acts.done, guard.in_force) == (Level.NORMAL, [], [])
    machine.foreign = 0.84
    with capture_logs() as lines:
        guard.sample()
    assert [line["event"] for line in lines] == ["others no longer fill the control group, entries again"]
    assert guard.entries_off == ""


def test_the_level_and_the_others_keep_entries_off_each_for_itself(
    guard: MemoryGuard, machine: Machine
) -> None:
    machine.fraction, machine.foreign = 0.85, 0.95
    guard.sample()
    guard.sample()
    assert guard.entries_off == "memory high: 85% of the limit in use"
    machine.fraction = 0.3
    guard.sample()
    assert "by others" in guard.entries_off
    machine.foreign = 0.0
    guard.sample()
    assert guard.entries_off == ""


def test_what_ends_is_told_even_while_info_lines_are_dropped(guard: MemoryGuard, machine: Machine) -> None:
    machine.fraction = 0.95
    for _ in range(3):
        guard.sample()
    machine.fraction = 0.3
    with capture_logs() as critical_to_high:
        guard.sample()
    with capture_logs() as high_to_elevated:
        guard.sample()
    assert {line["log_level"] for line in critical_to_high} == {"warning"}  # info is dropped still
    assert [line["memory_level"] for line in critical_to_high if "memory_level" in line] == ["high"]
    assert {line["log_level"] for line in high_to_elevated} == {"info"}  # and is no longer


def test_growth_over_hours_is_told(guard: MemoryGuard, machine: Machine, now: list[float]) -> None:
    with capture_logs() as lines:
        for minute in range(5):
            now[0] = minute * 60.0
            machine.fraction = 0.1 + minute * 0.01  # 60 MB an hour of a limit of 100 MB
            guard.sample()
    assert [line["event"] for line in lines] == ["memory grows"]
    assert lines[0]["mb_per_hour"] == pytest.approx(60.0)
    assert guard.growth_mb_per_hour == pytest.approx(60.0)


def test_handing_memory_back_never_fails() -> None:
    assert trim() in (True, False)
