from decimal import Decimal

import msgspec
import pytest

from service.records import Position, PositionSide, RefusalReason
from service.settings import KillSettings, RiskSettings
from service.trading.killswitch import (
    Level,
    Readings,
    Rule,
    Switch,
    effect,
    looked,
    losses_in_a_row,
    resumed,
    standing,
    tripped,
)
from service.trading.risk import DAY_MS, EquityMarks

KILL, RISK = KillSettings(), RiskSettings()
MARKS = EquityMarks(day=0, day_start=1000.0, peak=1000.0, deposits=1000.0)
CALM = Readings(equity=1000.0, marks=MARKS)


def with_(**changes: object) -> Readings:
    return msgspec.structs.replace(CALM, **changes)


def after(*readings: Readings, kill: KillSettings = KILL, at_ms: int = 5) -> Switch:
    switch = Switch()
    for now in readings:
        switch = looked(switch, now, kill, RISK, at_ms)
    return switch


def closed(realised: str, closed_ms: int = 5) -> Position:
    return Position(
        position_id=realised,
        signal_id="s",
        symbol="AUSDT",
        position_side=PositionSide.LONG,
        quantity=Decimal(0),
        entry_price=Decimal(1),
        stop=Decimal(1),
        target=Decimal(1),
        leverage=1,
        margin=Decimal(1),
        opened_ms=1,
        closed_ms=closed_ms,
        exit_price=Decimal(1),
        realised_pnl=Decimal(realised),
    )


def test_a_calm_account_trips_nothing():
    assert after(CALM, CALM) == Switch()
    assert Switch().refusal() is None


@pytest.mark.parametrize(
    ("readings", "rule", "value", "limit"),
    [
        (with_(equity=850.0), Rule.DAY_LOSS, 0.15, 0.15),
        (with_(equity=900.0, marks=msgspec.structs.replace(MARKS, day_start=900.0, peak=1300.0)),
         Rule.DRAWDOWN, 400 / 1300, 0.3),
        (with_(losses_in_a_row=15), Rule.LOSS_STREAK, 15, 15),
        (with_(orders=20, order_errors=10), Rule.ORDER_ERRORS, 0.5, 0.5),
        (with_(stale_fraction=0.6, stale_s=300.0), Rule.STALE_DATA, 300, 300),
        (with_(unprotected_s=60.0), Rule.UNPROTECTED, 60, 60),
        (with_(clock_moved_ms=-5_000.0), Rule.CLOCK_OFFSET, 5_000, 5_000),
        (with_(memory_critical=True), Rule.MEMORY, 1, 1),
        (with_(unexplained=-0.5), Rule.UNEXPLAINED, 0.5, 0.01),
    ],
)  # fmt: skip
def test_each_rule_trips_at_its_limit_and_states_value_and_limit(readings, rule, value, limit):
    [trip] = after(readings).trips
    assert (trip.rule, trip.level, trip.by) == (rule, Level.NO_ENTRIES, "rule")
    assert (trip.value, trip.limit) == (pytest.approx(value), limit)
    assert "limit" in trip.words or rule is Rule.MEMORY


@pytest.mark.parametrize(
    "readings",
    [
        with_(equity=851.0),
        with_(losses_in_a_row=14),
        with_(orders=20, order_errors=9),
        with_(orders=19, order_errors=19),
        with_(stale_fraction=0.6, stale_s=299.0),
        with_(unprotected_s=59.9),
        with_(clock_moved_ms=4_999.0),
        Readings(),  # nothing can be read
    ],
)
def test_below_the_limit_nothing_trips(readings):
    assert after(readings).trips == ()


def test_a_limit_of_zero_is_off():
    off = KillSettings(
        loss_streak=0,
        order_error_fraction=0.0,
        stale_s=0.0,
        unprotected_s=0.0,
        clock_offset_ms=0.0,
        memory=False,
    )
    wild = with_(
        losses_in_a_row=99, orders=20, order_errors=20, stale_s=9e9, unprotected_s=9e9, clock_moved_ms=9e9,
        memory_critical=True,
    )  # fmt: skip
    assert after(wild, kill=off).trips == ()


def test_a_trip_is_latched_when_its_cause_is_gone():
    switch = after(with_(unprotected_s=61.0), CALM)
    assert [trip.rule for trip in switch.trips] == [Rule.UNPROTECTED]
    assert after(with_(unprotected_s=61.0), with_(unprotected_s=99.0)) == after(with_(unprotected_s=61.0))


def test_the_days_loss_ends_with_the_utc_day_and_the_drawdown_does_not():
    switch = after(with_(equity=650.0), at_ms=DAY_MS - 1)
    assert {trip.rule for trip in switch.trips} == {Rule.DAY_LOSS, Rule.DRAWDOWN}
    before_the_marks_move = looked(switch, with_(equity=650.0), KILL, RISK, DAY_MS)
    assert [trip.rule for trip in before_the_marks_move.trips] == [Rule.DRAWDOWN]
    moved = msgspec.structs.replace(MARKS, day=1, day_start=650.0)
    next_day = looked(before_the_marks_move, with_(equity=650.0, marks=moved), KILL, RISK, DAY_MS + 1)
    assert [trip.rule for trip in next_day.trips] == [Rule.DRAWDOWN]
    lost_again = looked(next_day, with_(equity=500.0, marks=moved), KILL, RISK, DAY_MS + 2)
    assert {trip.rule for trip in lost_again.trips} == {Rule.DAY_LOSS, Rule.DRAWDOWN}


@pytest.mark.parametrize(
    ("readings", "stays"),
    [
        (with_(stale_fraction=0.6, stale_s=301.0), False),
        (with_(clock_moved_ms=60_000.0), False),
        (with_(memory_critical=True), False),
        (with_(unprotected_s=61.0), True),
        (with_(losses_in_a_row=20), True),
    ],
)
def test_faults_of_the_surroundings_may_end_with_their_cause_where_that_is_set(readings, stays):
    kill = KillSettings(latch_faults=False)
    assert bool(after(readings, readings, kill=kill).trips)
    assert bool(after(readings, CALM, kill=kill).trips) is stays


def test_levels_are_set_for_losses_and_for_faults_and_the_severest_counts():
    kill = KillSettings(loss_level="flatten", fault_level="reduce_only")
    switch = after(with_(equity=800.0, unprotected_s=61.0), kill=kill)
    assert {trip.rule: trip.level for trip in switch.trips} == {
        Rule.DAY_LOSS: Level.FLATTEN,
        Rule.UNPROTECTED: Level.REDUCE_ONLY,
    }
    assert switch.level is Level.FLATTEN


@pytest.mark.parametrize(
    ("readings", "reason"),
    [
        (with_(equity=800.0), RefusalReason.DAILY_LOSS),
        (with_(equity=650.0), RefusalReason.FINAL_STOP),
        (with_(unprotected_s=99.0), RefusalReason.ENTRIES_OFF),
    ],
)
def test_a_signal_is_refused_with_the_trips_reason_value_and_limit(readings, reason):
    refused = after(readings).refusal()
    assert refused is not None
    assert refused.reason is reason
    assert "kill switch no_entries" in refused.detail


def test_by_hand_a_severer_word_counts_and_a_rules_trip_stays():
    switch = tripped(after(with_(unprotected_s=61.0)), Level.NO_ENTRIES, "news", "me", 6)
    switch = tripped(switch, Level.REDUCE_ONLY, "", "me", 7)
    assert [(trip.rule, trip.level, trip.tripped_ms) for trip in switch.trips] == [
        (Rule.BY_HAND, Level.REDUCE_ONLY, 7),
        (Rule.UNPROTECTED, Level.NO_ENTRIES, 5),
    ]
    assert "no reason given" in switch.words


@pytest.mark.parametrize("asked", list(Level))
@pytest.mark.parametrize("known", list(Level))
def test_by_hand_only_a_severer_word_replaces_level_reason_and_time(known: Level, asked: Level):
    before = tripped(Switch(), known, "emergency", "me", 6)
    switch = tripped(before, asked, "cron", "you", 7)
    if asked.severity > known.severity:
        assert (switch.level, switch.trips[0].tripped_ms) == (asked, 7)
        assert standing(before, asked) == ""
    else:
        assert switch == before
        already = " already" if asked is known else ""
        assert standing(before, asked).startswith(
            f"{known} is set{already} since 1970-01-01 00:00:00 UTC (by hand"
        )
        assert "emergency" in standing(before, asked)
        assert ("resume first" in standing(before, asked)) is (asked is not known)


def test_beside_a_severer_trip_of_a_rule_a_word_is_kept_and_told_of_it():
    before = after(with_(equity=800.0), kill=KillSettings(loss_level="flatten"))
    assert "flatten is set since" in standing(before, Level.NO_ENTRIES)
    assert tripped(before, Level.NO_ENTRIES, "cron", "me", 6).by_hand is not None


def test_resuming_lifts_all_of_it_and_says_who_and_why():
    switch = resumed(after(with_(equity=650.0)), "looked at it", "me", 9)
    assert (switch.trips, switch.level) == ((), None)
    assert (switch.resumed_ms, switch.resumed_by, switch.resumed_reason) == (9, "me", "looked at it")


def test_it_survives_being_written_and_read():
    switch = tripped(after(with_(equity=650.0)), Level.FLATTEN, "news", "me", 6)
    assert msgspec.json.decode(msgspec.json.encode(switch), type=Switch) == switch


def test_losses_count_back_to_the_last_win_or_resume():
    history = [closed("-1", 9), closed("-1", 8), closed("0", 7), closed("-1", 6)]
    assert losses_in_a_row(history, 0) == 2
    assert losses_in_a_row(history, 8) == 1
    assert losses_in_a_row([], 0) == 0


def test_the_effect_names_the_positions():
    held = (closed("1"),)
    assert "AUSDT" in effect(Level.FLATTEN, held)
    assert "none" in effect(Level.NO_ENTRIES, ())
