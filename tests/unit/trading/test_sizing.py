from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import Bracket, PositionSide, RefusalReason, Signal
from service.settings import RiskSettings
from service.trading.ranking import Refused
from service.trading.sizing import (
    Approved,
    Levels,
    liquidation_estimate,
    loss_at_stop,
    margin_fraction,
    size_position,
    venue_levels,
)
from tests.samples import instrument, signal

RISK = RiskSettings()
FEE = Decimal("0.0005")
INSTRUMENT = instrument(
    tick_size=Decimal("0.01"),
    min_price=Decimal("0.01"),
    market_max_quantity=Decimal(1000),
    multiplier_up=Decimal("1.5"),
    multiplier_down=Decimal("0.5"),
)


def bracket(cap: int, leverage: int, fraction: str = "0.01") -> Bracket:
    return Bracket(
        notional_floor=Decimal(0),
        notional_cap=Decimal(cap),
        max_leverage=leverage,
        maintenance_margin_fraction=Decimal(fraction),
        maintenance_amount=Decimal(0),
    )


BRACKETS = (bracket(5_000, 50), bracket(1_000_000, 10, "0.05"))


def size(wish: Signal, **changes: object) -> Approved | Refused:
    arguments: dict[str, object] = {
        "instrument": INSTRUMENT,
        "brackets": BRACKETS,
        "equity": Decimal(1000),
        "available": Decimal(1000),
        "leverage": 10,
        "taker_fee_fraction": FEE,
        "risk": RISK,
    }
    return size_position(wish, **(arguments | changes))


def reason_of(answer: Approved | Refused) -> RefusalReason:
    assert isinstance(answer, Refused)
    return answer.reason


@given(
    equity=st.decimals(100, 1_000_000, places=2),
    entry=st.floats(0.5, 50_000),
    gap=st.floats(0.0005, 0.2),
    reward=st.floats(0.5, 4),
    confidence=st.floats(0, 1),
    leverage=st.integers(3, 20),
    fee=st.decimals(0, "0.002", places=5),
    long=st.booleans(),
)
def test_the_loss_at_the_stop_with_both_fees_stays_within_the_budget(
    equity, entry, gap, reward, confidence, leverage, fee, long
):
    side = PositionSide.LONG if long else PositionSide.SHORT
    wish = signal(
        position_side=side,
        entry=entry,
        stop=entry * (1 - side.sign * gap),
        target=entry * (1 + side.sign * min(gap * reward, 0.9)),
        confidence=confidence,
    )
    answer = size(wish, equity=equity, available=equity, leverage=leverage, taker_fee_fraction=fee)
    if isinstance(answer, Refused):
        assert any(character.isdigit() for character in answer.detail)
        return
    assert answer.risk_amount <= equity * Decimal("0.01")
    assert answer.margin <= equity * Decimal("0.13")
    assert answer.quantity % INSTRUMENT.market_step_size == 0
    assert answer.stop % INSTRUMENT.tick_size == 0
    assert answer.target % INSTRUMENT.tick_size == 0
    assert answer.quantity * answer.entry >= INSTRUMENT.min_notional
    assert (answer.entry - answer.stop) * side.sign > 0
    assert (answer.target - answer.entry) * side.sign > 0


@pytest.mark.parametrize(("confidence", "fraction"), [(0.6, "0.06"), (0.1, "0.03"), (1.0, "0.10")])
def test_margin_follows_confidence_within_its_bounds(confidence, fraction):
    assert margin_fraction(confidence, RISK) == Decimal(fraction)


def test_margin_decides_where_the_stop_is_near():
    answer = size(signal(stop=99.9))
    assert isinstance(answer, Approved)
    assert answer.margin == Decimal("60")
    assert answer.quantity == Decimal("6.000")


def test_the_loss_budget_decides_where_the_stop_is_far():
    answer = size(signal(stop=95.0))
    assert isinstance(answer, Approved)
    assert answer.quantity == Decimal("1.961")  # 10 / (5 + 195 x 0.0005), floored


def test_levels_are_rounded_towards_the_entry_on_both_sides():
    long = venue_levels(signal(stop=98.994, target=102.006), INSTRUMENT)
    short = venue_levels(signal(position_side=PositionSide.SHORT, stop=101.006, target=97.994), INSTRUMENT)
    assert isinstance(long, Levels)
    assert isinstance(short, Levels)
    assert (long.stop, long.target) == (Decimal("99.00"), Decimal("102.00"))
    assert (short.stop, short.target) == (Decimal("101.00"), Decimal("98.00"))


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": 99.999},  # rounds onto the entry
        {"stop": 101.0},
        {"target": 99.5},
        {"stop": 40.0},  # beyond PERCENT_PRICE
        {"target": 160.0},
        {"stop": float("nan")},
        {"entry": 0.0},
        {"target": float("inf")},
    ],
)
def test_levels_that_the_venue_would_refuse_are_refused_first(changes):
    assert reason_of(size(signal(**changes))) is RefusalReason.STOP_INVALID


def test_a_stop_beyond_liquidation_is_refused():
    assert reason_of(size(signal(stop=89.0), leverage=10)) is RefusalReason.STOP_INVALID


def test_a_budget_below_the_least_order_is_refused_with_value_and_limit():
    answer = size(signal(), equity=Decimal(5), available=Decimal(5))
    assert reason_of(answer) is RefusalReason.BELOW_MINIMUM
    assert "at least 5" in answer.detail
    rules = msgspec.structs.replace(INSTRUMENT, market_min_quantity=Decimal(50))
    assert reason_of(size(signal(), instrument=rules)) is RefusalReason.BELOW_MINIMUM


def test_margin_beyond_the_available_balance_is_refused():
    assert reason_of(size(signal(), available=Decimal(10))) is RefusalReason.MARGIN_INSUFFICIENT


def test_the_notional_stays_within_the_bracket_of_the_leverage():
    answer = size(signal(stop=99.9), equity=Decimal(100_000), available=Decimal(100_000), leverage=20)
    assert isinstance(answer, Approved)
    assert answer.notional == Decimal(5_000)


def test_the_venue_may_grant_less_leverage_but_not_less_than_the_least():
    answer = size(signal(), brackets=(bracket(1_000_000, 5),))
    assert isinstance(answer, Approved)
    assert answer.leverage == 5
    assert reason_of(size(signal(), brackets=(bracket(1_000_000, 2),))) is RefusalReason.ABOVE_BRACKET
    assert reason_of(size(signal(), brackets=())) is RefusalReason.ABOVE_BRACKET


def test_the_largest_market_order_caps_the_quantity():
    rules = msgspec.structs.replace(INSTRUMENT, market_max_quantity=Decimal("0.5"))
    answer = size(signal(), instrument=rules)
    assert isinstance(answer, Approved)
    assert answer.quantity == Decimal("0.5")


def test_liquidation_leaves_exactly_the_maintenance_margin():
    entry, quantity, margin = Decimal(100), Decimal(2), Decimal(20)
    for side in PositionSide:
        price = liquidation_estimate(side, entry, quantity, margin, BRACKETS[0])
        left = margin + side.sign * quantity * (price - entry)
        assert abs(left - quantity * price * Decimal("0.01")) < Decimal("1e-20")


def test_the_loss_counts_both_fees():
    levels = Levels(entry=Decimal(100), stop=Decimal(90), target=Decimal(120))
    assert loss_at_stop(Decimal(2), levels, Decimal("0.001")) == Decimal("20.38")
