from decimal import Decimal

import msgspec
import pytest

from service.records import Bracket, RefusalReason
from service.settings import RiskSettings, TradingSettings
from service.trading.decide import as_decision, decide
from service.trading.leverage import TradeStatistics
from service.trading.ranking import Refused, rank_signals
from service.trading.risk import (
    DAY_MS,
    EquityMarks,
    Limits,
    RiskContext,
    after_entry,
    assess,
    marks_after,
    opening_marks,
)
from service.trading.sizing import Approved
from tests.samples import instrument, signal

LIMITS = Limits(trading=TradingSettings(), risk=RiskSettings())
STATISTICS = TradeStatistics(trades=0, expectancy_pct=0.0, profit_factor=0.0, win_fraction=0.0, loss_streak=0)
CALM = RiskContext(
    equity=1000.0,
    available_balance=1000.0,
    marks=EquityMarks(day=0, day_start=1000.0, peak=1000.0, deposits=1000.0),
    statistics=STATISTICS,
    open_positions=0,
    held_symbols=frozenset(),
)
SIGNAL = signal()


def with_(**changes: object) -> RiskContext:
    return msgspec.structs.replace(CALM, **changes)


def marks(**changes: object) -> EquityMarks:
    assert CALM.marks is not None
    return msgspec.structs.replace(CALM.marks, **changes)


def test_a_calm_account_lets_a_signal_pass():
    assert assess(SIGNAL, CALM, LIMITS) is None


@pytest.mark.parametrize(
    ("context", "reason", "words"),
    [
        (with_(entries_off="archive unwritable"), RefusalReason.ENTRIES_OFF, ("archive unwritable",)),
        (with_(equity=None), RefusalReason.BALANCE_UNKNOWN, ()),
        (with_(available_balance=None), RefusalReason.BALANCE_UNKNOWN, ()),
        (
            with_(halt=Refused(reason=RefusalReason.FINAL_STOP, detail="drawdown 0.31, limit 0.3")),
            RefusalReason.FINAL_STOP,
            ("0.31", "0.3"),
        ),
        (with_(marks=marks(peak=1250.0)), RefusalReason.DRAWDOWN_BREAKER, ("0.2000", "0.2")),
        (with_(marks=marks(day_start=1040.0)), RefusalReason.CAUTION, ("0.0385", "0.03")),
        (with_(stale_symbols=frozenset({"AUSDT"})), RefusalReason.STALE_DATA, ()),
        (with_(held_symbols=frozenset({"AUSDT"})), RefusalReason.SYMBOL_HELD, ()),
        (with_(cooling={"AUSDT": 12.34}), RefusalReason.COOLDOWN, ("12.3", "60")),
        (with_(open_positions=3), RefusalReason.MAX_POSITIONS, ("3",)),
    ],
)
def test_each_rule_refuses_with_its_reason_value_and_limit(context, reason, words):
    refused = assess(SIGNAL, context, LIMITS)
    assert refused is not None
    assert refused.reason is reason
    assert all(word in refused.detail for word in words)


def test_a_weak_signal_is_refused_with_its_confidence():
    refused = assess(msgspec.structs.replace(SIGNAL, confidence=0.44), CALM, LIMITS)
    assert refused is not None
    assert refused.reason is RefusalReason.LOW_CONFIDENCE
    assert "0.4400" in refused.detail
    assert "0.45" in refused.detail


@pytest.mark.parametrize(
    ("confidence", "wins", "passes"), [(0.7, 0.6, True), (0.69, 0.6, False), (0.7, 0.59, False)]
)
def test_caution_after_six_losses_lets_only_strong_signals_on_a_winning_record_pass(confidence, wins, passes):
    context = with_(statistics=msgspec.structs.replace(STATISTICS, loss_streak=6, win_fraction=wins))
    refused = assess(msgspec.structs.replace(SIGNAL, confidence=confidence), context, LIMITS)
    assert (refused is None) is passes


def test_five_losses_are_not_yet_caution():
    context = with_(statistics=msgspec.structs.replace(STATISTICS, loss_streak=5))
    assert assess(SIGNAL, context, LIMITS) is None


def test_a_new_utc_day_begins_at_the_equity_of_then():
    start = opening_marks(1000.0, 1000.0, 5)
    fallen = marks_after(start, 850.0, 1000.0, DAY_MS - 1)
    next_day = marks_after(fallen, 840.0, 1000.0, DAY_MS)
    assert [(m.day, m.day_start) for m in (start, fallen, next_day)] == [(0, 1000), (0, 1000), (1, 840)]


def test_a_withdrawal_is_no_loss_and_a_deposit_no_peak():
    start = opening_marks(1000.0, 1000.0, 0)
    withdrawn = marks_after(start, 600.0, 600.0, 1)
    paid_in = marks_after(withdrawn, 1600.0, 1600.0, 2)
    assert (withdrawn.peak, withdrawn.day_start) == (600.0, 600.0)
    assert (paid_in.peak, paid_in.day_start) == (1600.0, 1600.0)


def test_the_peak_rises_and_never_falls():
    now = opening_marks(100.0, 100.0, 0)
    for equity in (120.0, 90.0, 110.0):
        now = marks_after(now, equity, 100.0, 1)
    assert now.peak == 120.0


def test_an_approval_takes_its_place_symbol_and_margin():
    after = after_entry(CALM, "AUSDT", 50.0)
    assert (after.open_positions, after.available_balance) == (1, 950.0)
    assert "AUSDT" in after.held_symbols


INSTRUMENT = instrument(
    tick_size=Decimal("0.01"),
    min_price=Decimal("0.01"),
    market_max_quantity=Decimal(100),
    multiplier_up=Decimal("1.15"),
    multiplier_down=Decimal("0.85"),
)
BRACKETS = (
    Bracket(
        notional_floor=Decimal(0),
        notional_cap=Decimal(10000),
        max_leverage=50,
        maintenance_margin_fraction=Decimal("0.01"),
        maintenance_amount=Decimal(0),
    ),
)


def test_a_decision_names_size_and_leverage_or_reason_and_rank():
    second = msgspec.structs.replace(SIGNAL, signal_id="s2", confidence=0.5)
    best, other = rank_signals([SIGNAL, second], max_signals=1)
    fee = Decimal("0.0005")
    yes = decide(best, CALM, LIMITS, INSTRUMENT, BRACKETS, fee)
    no = decide(other, CALM, LIMITS, INSTRUMENT, BRACKETS, fee)
    assert isinstance(yes, Approved)
    assert isinstance(no, Refused)
    accepted = as_decision(best, yes, cycle=7, now_ms=9)
    refused = as_decision(other, no, cycle=7, now_ms=9)
    assert (accepted.outcome, accepted.leverage, accepted.cycle) == ("accepted", 3, 7)
    assert accepted.quantity > 0
    assert (refused.outcome, refused.reason, refused.rank) == ("refused", "not_in_top", 2)


def test_a_rule_names_the_refusal_before_the_ranking_does():
    weak = msgspec.structs.replace(SIGNAL, signal_id="s2", confidence=0.1)
    _, other = rank_signals([SIGNAL, weak], max_signals=1)
    answer = decide(other, CALM, LIMITS, INSTRUMENT, BRACKETS, Decimal(0))
    assert isinstance(answer, Refused)
    assert answer.reason is RefusalReason.LOW_CONFIDENCE
