"""Levels, hysteresis and the plan of reactions."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import EXIT_SETTINGS, LimitTooLow, SettingsInvalid
from service.monitor.budget import GRADES, GrowthAlarm, Level, MemoryBudget, Reaction, needed_mb, plan, step
from service.monitor.guard import within_limit
from service.settings import AnalysisSettings, MarketSettings, MonitorSettings, Settings, load

SETTINGS = MonitorSettings(memory_levels=(0.7, 0.8, 0.9), memory_hysteresis=0.05, memory_calm_s=60.0)


def levels_of(budget: MemoryBudget, *samples: tuple[float, float]) -> list[Level]:
    """The level after each sample of (seconds, fraction)."""
    found = []
    for now_s, fraction in samples:
        budget.update(fraction, None, now_s)
        found.append(budget.level)
    return found


def test_each_level_begins_at_its_threshold() -> None:
    budget = MemoryBudget(SETTINGS)
    found = levels_of(budget, (0, 0.69), (1, 0.70), (2, 0.79), (3, 0.80), (4, 0.90))
    assert found == [Level.NORMAL, Level.ELEVATED, Level.ELEVATED, Level.HIGH, Level.CRITICAL]


def test_a_jump_climbs_one_level_a_sample_and_asks_to_be_looked_at_soon() -> None:
    budget = MemoryBudget(SETTINGS)
    seen = []
    for now_s in range(4):
        budget.update(0.95, None, now_s)
        seen.append((budget.level, budget.rising))
    assert seen == [
        (Level.ELEVATED, True),
        (Level.HIGH, True),
        (Level.CRITICAL, False),
        (Level.CRITICAL, False),
    ]


def test_a_level_falls_only_below_its_threshold_less_the_hysteresis_and_after_the_calm_time() -> None:
    budget = MemoryBudget(SETTINGS)
    assert levels_of(budget, (0, 0.75)) == [Level.ELEVATED]
    assert levels_of(budget, (1, 0.66), (100, 0.66), (200, 0.66)) == [Level.ELEVATED] * 3  # within hysteresis
    assert levels_of(budget, (201, 0.60), (260, 0.60)) == [Level.ELEVATED] * 2  # 59 s of calm
    assert levels_of(budget, (261, 0.60)) == [Level.NORMAL]


def test_a_peak_begins_the_calm_time_anew() -> None:
    budget = MemoryBudget(SETTINGS)
    found = levels_of(budget, (0, 0.75), (1, 0.5), (50, 0.68), (51, 0.5), (110, 0.5), (111, 0.5))
    assert found == [*[Level.ELEVATED] * 5, Level.NORMAL]


def test_it_falls_one_level_after_the_other() -> None:
    budget = MemoryBudget(SETTINGS)
    assert levels_of(budget, (0, 0.85), (1, 0.85))[-1] is Level.HIGH
    assert levels_of(budget, (2, 0.1), (62, 0.1), (121, 0.1), (122, 0.1)) == [
        Level.HIGH,
        Level.ELEVATED,
        Level.ELEVATED,
        Level.NORMAL,
    ]


def test_stalls_make_the_level_elevated_and_no_higher() -> None:
    budget = MemoryBudget(SETTINGS)
    change = budget.update(0.1, 50.0, 0)
    assert change is not None
    assert change.reason == "memory stalls 50 % of the time"
    assert budget.update(0.1, 90.0, 100) is None
    assert budget.update(0.1, 0.0, 200) is None
    assert budget.update(0.1, 0.0, 260) is not None
    assert budget.level is Level.NORMAL


def test_stalls_are_ignored_when_the_setting_is_zero() -> None:
    budget = MemoryBudget(msgspec.structs.replace(SETTINGS, memory_pressure_pct=0.0))
    assert budget.update(0.1, 100.0, 0) is None


def test_every_reaction_belongs_to_one_level_and_lasts_above_it() -> None:
    graded = [reaction for grade in GRADES.values() for reaction in grade]
    assert sorted(graded) == sorted(Reaction)
    assert plan(Level.NORMAL) == ()
    for lower, higher in ((Level.NORMAL, Level.ELEVATED), (Level.ELEVATED, Level.HIGH)):
        assert plan(higher)[: len(plan(lower))] == plan(lower)
    assert Reaction.NO_ENTRIES in plan(Level.CRITICAL)


def test_a_change_begins_the_mildest_first_and_undoes_the_strongest_first() -> None:
    assert step(Level.NORMAL, Level.HIGH, "").begin == plan(Level.HIGH)
    assert step(Level.HIGH, Level.NORMAL, "").undo == plan(Level.HIGH)[::-1]


@given(st.lists(st.floats(0.0, 2.0), max_size=60))
def test_reactions_in_force_are_always_those_of_the_level(fractions: list[float]) -> None:
    budget = MemoryBudget(SETTINGS)
    in_force: set[Reaction] = set()
    for index, fraction in enumerate(fractions):
        change = budget.update(fraction, None, index * 40.0)
        if change is not None:
            assert not in_force & set(change.begin)
            assert set(change.undo) <= in_force
            in_force = in_force - set(change.undo) | set(change.begin)
        assert in_force == set(plan(budget.level))


def test_growth_is_told_once_when_the_window_is_filled_and_once_when_it_is_over() -> None:
    alarm = GrowthAlarm(limit_mb_per_hour=4.0, hours=1.0)
    used_mb, told = 100.0, []
    for minute in range(241):
        used_mb += 0.1 if minute < 120 else 0.0  # 6 MB an hour, then none
        told.append((minute, alarm.add(minute * 60.0, used_mb)))
    changes = [(minute, change) for minute, change in told if change is not None]
    assert [change for _, change in changes] == [True, False]
    assert changes[0][0] == 60
    assert 120 < changes[1][0] < 180
    assert alarm.slope_mb_per_hour == pytest.approx(0.0, abs=1e-9)


def test_a_short_peak_is_no_growth() -> None:
    alarm = GrowthAlarm(limit_mb_per_hour=4.0, hours=1.0)
    told = {alarm.add(minute * 60.0, 130.0 if minute == 30 else 100.0) for minute in range(61)}
    assert told == {None}
    assert not math.isnan(alarm.slope_mb_per_hour)


def test_no_growth_limit_never_alarms() -> None:
    alarm = GrowthAlarm(limit_mb_per_hour=0.0, hours=1.0)
    assert {alarm.add(minute * 60.0, minute * 100.0) for minute in range(200)} == {None}


def test_what_start_up_needs_grows_with_workers_symbols_and_candles() -> None:
    small = needed_mb(AnalysisSettings(workers=0), MarketSettings(symbols=10))
    assert small < needed_mb(AnalysisSettings(workers=1), MarketSettings(symbols=10))
    assert small < needed_mb(AnalysisSettings(workers=0), MarketSettings(symbols=500))
    wide = needed_mb(AnalysisSettings(workers=0), MarketSettings(symbols=500, candles=1_000))
    assert wide > needed_mb(AnalysisSettings(workers=0), MarketSettings(symbols=500))


def test_a_limit_below_what_start_up_needs_is_refused_with_the_figure() -> None:
    settings = Settings()
    needed = needed_mb(settings.analysis, settings.market)
    within_limit(settings, needed)
    with pytest.raises(LimitTooLow, match=f"start-up needs {needed:.0f} MB with 2 workers") as caught:
        within_limit(settings, needed - 1)
    assert caught.value.exit_code == EXIT_SETTINGS


def test_a_worker_may_grow_to_its_setting_where_there_is_room_and_to_its_share_where_there_is_not() -> None:
    settings = Settings()
    assert within_limit(settings, 8_000) == settings.analysis
    limits = [within_limit(settings, mb).worker_memory_limit_mb for mb in (300, 200, 150, 90)]
    assert limits == sorted(limits, reverse=True)
    assert limits[1] < settings.analysis.worker_memory_limit_mb
    assert limits[2] > limits[3] > 20.0  # never so little that a fresh worker is too large
    needed = needed_mb(settings.analysis, settings.market)
    grown = settings.analysis.workers * (limits[1] - 20.0)
    assert needed + grown == pytest.approx(200 * settings.monitor.memory_levels[1])


def test_levels_that_do_not_rise_are_refused() -> None:
    with pytest.raises(SettingsInvalid, match=r"monitor\.memory_levels: .* must rise"):
        load(None, {"PERPD_MONITOR__MEMORY_LEVELS": "[0.8, 0.7, 0.9]"})
