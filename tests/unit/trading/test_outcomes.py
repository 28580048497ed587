import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import FundingRate, PositionSide, Resolution, ShadowPosition
from service.trading.outcomes import CANDLE_MS, Costs, advance, shadow_of
from tests.samples import signal

LONG, SHORT = PositionSide.LONG, PositionSide.SHORT
HOUR_MS = 3_600_000
MINUTE_MS = 60_000
FREE = Costs(0.0, 96 * HOUR_MS)


def candle(n: int, open_: float, high: float, low: float, close: float):
    return (n * CANDLE_MS, open_, high, low, close, 1.0)


def minutes(*rows):
    return [(n * MINUTE_MS, *row, 1.0) for n, row in enumerate(rows)]


def ended(side: PositionSide, *candles, fee: float = 0.0, life_h: float = 96) -> ShadowPosition:
    """The shadow after the candles; where one touches stop and target, no 1m candles exist."""
    none = {row[0]: [] for row in candles}
    costs = Costs(fee, int(life_h * HOUR_MS))
    return advance(shadow_of(signal(side=side)), candles, costs, finer=none).shadow


@pytest.mark.parametrize(
    ("side", "rows", "price", "reason", "result"),
    [
        (LONG, [(100, 102.5, 99.5, 101)], 102.0, "target", 2.0),
        (LONG, [(100, 100.5, 98.5, 99)], 99.0, "stop", -1.0),
        (LONG, [(100, 102.5, 98.5, 101)], 99.0, "stop", -1.0),  # both, and nothing tells: the stop
        (LONG, [(102.5, 103, 98.5, 101)], 102.0, "target", 2.0),  # both, but it opens beyond the target
        (LONG, [(100, 101, 99.5, 100), (97, 98, 96, 97)], 97.0, "stop", -3.0),  # gap: at the open
        (LONG, [(100, 101, 99.5, 100), (105, 106, 104, 105)], 102.0, "target", 2.0),
        (SHORT, [(100, 100.5, 97.5, 99)], 98.0, "target", 2.0),
        (SHORT, [(100, 101.5, 97.5, 99)], 101.0, "stop", -1.0),
        (SHORT, [(100, 100.5, 99.5, 100), (103, 104, 102, 103)], 103.0, "stop", -3.0),
    ],
)
def test_a_shadow_ends_as_the_assumptions_say(side, rows, price, reason, result):
    shadow = ended(side, *(candle(n, *row) for n, row in enumerate(rows)))
    assert (shadow.exit_price, shadow.close_reason) == (price, reason)
    assert shadow.outcome_r == pytest.approx(result)
    assert shadow.closed_ms == len(rows) * CANDLE_MS


def test_it_expires_at_the_close_of_the_candle_that_ends_its_life():
    quiet = [candle(n, 100, 100.5, 99.5, 100.4) for n in range(20)]
    shadow = ended(LONG, *quiet, life_h=1)
    assert (shadow.close_reason, shadow.exit_price) == ("expired", 100.4)
    assert shadow.closed_ms == HOUR_MS


def test_fees_are_paid_on_both_sides():
    shadow = ended(LONG, candle(0, 100, 102.5, 99.5, 101), fee=0.001)
    assert shadow.outcome_r == pytest.approx(2 - 0.202)
    assert shadow.pnl_fraction == pytest.approx((2 - 0.202) / 100)


def test_excursions_are_kept_in_r():
    shadow = ended(LONG, candle(0, 100, 101.5, 99.2, 100), candle(1, 100, 100.1, 99.9, 100))
    assert shadow.favourable_excursion == pytest.approx(1.5)
    assert shadow.adverse_excursion == pytest.approx(0.8)
    assert shadow.closed_ms == 0


def test_candles_that_were_seen_or_are_older_than_the_signal_do_not_count():
    shadow = ended(LONG, candle(-1, 100, 103, 90, 100), candle(0, 100, 100.5, 99.5, 100))
    again = advance(shadow, [candle(0, 100, 103, 90, 100)], FREE)
    assert again.shadow is shadow


prices = st.floats(95, 105)


@given(st.lists(st.tuples(prices, prices, prices), min_size=1, max_size=12), st.integers(0, 12))
def test_outcomes_do_not_depend_on_how_candles_are_delivered_nor_on_the_mirror(rows, cut):
    candles = [candle(n, o, max(o, a, b), min(o, a, b), a) for n, (o, a, b) in enumerate(rows)]
    whole = ended(LONG, *candles)
    first = ended(LONG, *candles[:cut])
    none = {row[0]: [] for row in candles}
    parts = first if first.closed_ms else advance(first, candles[cut:], FREE, finer=none).shadow
    assert parts == whole
    mirrored = [(t, 200 - o, 200 - lo, 200 - hi, 200 - c, v) for t, o, hi, lo, c, v in candles]
    other = ended(SHORT, *mirrored)
    assert other.close_reason == whole.close_reason
    assert other.outcome_r == pytest.approx(whole.outcome_r, abs=1e-9)
    assert other.adverse_excursion == pytest.approx(whole.adverse_excursion, abs=1e-9)


def test_a_candle_that_touches_both_waits_for_its_minutes():
    candles = [candle(0, 100, 100.5, 99.5, 100), candle(1, 100, 102.5, 98.5, 101)]
    held, undecided_ms = advance(shadow_of(signal()), candles, FREE)
    assert (held.checked_ms, undecided_ms) == (CANDLE_MS, CANDLE_MS)
    assert held.closed_ms == 0


@pytest.mark.parametrize(
    ("rows", "reason", "resolution"),
    [
        (
            [(100, 100.5, 99.5, 100), (100, 102.5, 99.5, 102), (102, 102, 98.5, 99)],
            "target",
            Resolution.FINER,
        ),
        ([(100, 100.5, 98.9, 99), (99, 102.5, 99, 101)], "stop", Resolution.FINER),
        ([(100, 102.5, 98.5, 101)], "stop", Resolution.ASSUMED),  # one minute touches both
        ([(100, 100.5, 99.5, 100)], "stop", Resolution.ASSUMED),  # the minutes contradict the candle
    ],
)
def test_minutes_tell_which_came_first_and_else_the_stop_counts(rows, reason, resolution):
    both = candle(0, 100, 102.5, 98.5, 101)
    shadow = advance(shadow_of(signal()), [both], FREE, finer={0: minutes(*rows)}).shadow
    assert (shadow.close_reason, shadow.resolution) == (reason, resolution)


def settled(at_ms: int, rate: float, mark_price: float = 0.0) -> dict[int, FundingRate]:
    return {at_ms: FundingRate(symbol="AUSDT", at_ms=at_ms, rate=rate, mark_price=mark_price)}


@pytest.mark.parametrize(("side", "paid"), [(LONG, -0.0011), (SHORT, 0.0011)])
def test_funding_is_paid_on_the_notional_at_the_mark_price_of_its_settlement(side, paid):
    quiet = [candle(n, 100, 100.5, 99.5, 100) for n in range(14)]
    funding = settled(HOUR_MS, 0.001, mark_price=110.0)
    shadow = advance(
        shadow_of(signal(side=side)), quiet, Costs(0.0, HOUR_MS + 2 * CANDLE_MS), funding=funding
    ).shadow
    assert shadow.funding_fraction == pytest.approx(paid)
    assert shadow.close_reason == "expired"
    assert shadow.pnl_fraction == pytest.approx(paid)
    assert shadow.outcome_r == pytest.approx(paid * 100)  # the stop is 1 % away


def test_a_settlement_at_the_opening_is_not_ours_and_one_in_the_last_candle_is():
    at_opening = advance(
        shadow_of(signal(close_ms=HOUR_MS)),
        [candle(12, 100, 100.5, 99.5, 100)],
        FREE,
        funding=settled(HOUR_MS, 0.001),
    )
    assert at_opening.shadow.funding_fraction == 0.0
    in_the_last = advance(
        shadow_of(signal()), [candle(12, 100, 102.5, 99.5, 100)], FREE, funding=settled(HOUR_MS, 0.001)
    )
    assert in_the_last.shadow.closed_ms
    assert in_the_last.shadow.funding_fraction == pytest.approx(-0.001)


def test_what_came_after_the_stop_is_no_favourable_excursion():
    shadow = ended(LONG, candle(0, 100, 101.9, 98.5, 101))
    assert shadow.favourable_excursion == 0.0
    assert shadow.adverse_excursion == pytest.approx(1.0)
