"""The tape of the generated market: one truth for every timeframe, moment and client."""

from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest

from service.exchange.simulated.contracts import brackets
from service.exchange.simulated.generator import generate
from service.exchange.simulated.tape import STEP_MS, Tape
from service.records import TIMEFRAME_MS

HOUR = 3_600_000
DAY = 24 * HOUR


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate(1, 60)


def merged(rows: np.ndarray, span_ms: int) -> np.ndarray:
    """Candles aggregated by definition, one by one."""
    groups: dict[float, list[np.ndarray]] = {}
    for row in rows:
        groups.setdefault(row[0] // span_ms * span_ms, []).append(row)
    return np.array(
        [
            (at, r[0][1], max(x[2] for x in r), min(x[3] for x in r), r[-1][4], *np.sum(r, axis=0)[5:])
            for at, r in groups.items()
        ]
    )


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [("1m", "3m"), ("1m", "5m"), ("3m", "15m"), ("1m", "15m"), ("5m", "15m"), ("15m", "30m"), ("5m", "1h"),
     ("1h", "2h"), ("1h", "4h"), ("2h", "6h"), ("4h", "8h"), ("6h", "12h"), ("1h", "1d"), ("1m", "1d")],
)  # fmt: skip
@pytest.mark.parametrize("late_ms", [0, 15_000, 137_000, 300_000, 481_000])
def test_any_two_timeframes_agree_even_while_a_candle_forms(tape, fine, coarse, late_ms):
    day = tape.start_ms // DAY * DAY
    now = day + 11 * HOUR + late_ms
    small = tape.candles(3, fine, day - DAY, now, now)
    large = tape.candles(3, coarse, day - DAY, now, now)
    expected = merged(small, TIMEFRAME_MS[coarse])
    assert (large[:, :5] == expected[:, :5]).all()
    assert large[:, 5:] == pytest.approx(expected[:, 5:], rel=1e-12)


@pytest.mark.parametrize("timeframe", list(TIMEFRAME_MS))
@pytest.mark.parametrize("late_ms", [0, 15_000, 44_999, 250_000, 300_000, 599_000])
def test_the_streamed_forming_candle_is_the_one_that_rest_serves(tape, timeframe, late_ms):
    now = tape.start_ms // HOUR * HOUR + late_ms
    forming = tape.forming(timeframe, now)
    for index in (0, 7, 49):
        last = tape.candles(index, timeframe, now - TIMEFRAME_MS[timeframe] + 1, now, now)[-1]
        assert forming[index, :5].tolist() == last[:5].tolist()
        assert forming[index, 5:] == pytest.approx(last[5:], rel=1e-12)


def test_a_candle_ends_at_the_last_price_and_its_extremes_hold_all_step_prices(tape):
    begin = tape.start_ms // 300_000 * 300_000
    (candle,) = tape.candles(5, "5m", begin, begin, begin + 300_000)
    steps = [tape.last_prices(begin + k * STEP_MS)[5] for k in range(1, 21)]
    assert steps[-1] == candle[4]
    assert max([candle[1], *steps]) == candle[2]
    assert min([candle[1], *steps]) == candle[3]


def test_only_candles_within_the_asked_span_and_not_of_the_future_are_served(tape):
    now = tape.start_ms
    rows = tape.candles(0, "15m", now - 10 * HOUR, now + HOUR, now)
    assert rows[0, 0] >= now - 10 * HOUR
    assert rows[-1, 0] == now // 900_000 * 900_000
    assert (np.diff(rows[:, 0]) == 900_000).all()
    assert tape.candles(0, "15m", now + HOUR, now + 2 * HOUR, now).shape == (0, 7)
    assert len(tape.candles(0, "1h", 0, now, now)) > 500


def test_the_day_is_the_last_24_hours_of_5m_candles(tape):
    now = tape.start_ms + 77_000
    rows = tape.candles(2, "5m", now // 300_000 * 300_000 - DAY, now, now)
    assert tape.day(now)[2] == pytest.approx(merged(rows, 10**15)[0, 1:], rel=1e-12)


def test_the_mark_price_is_the_mean_of_the_last_four_steps(tape):
    now = tape.start_ms // 300_000 * 300_000 + 30_000
    steps = np.stack([tape.last_prices(now - k * STEP_MS) for k in range(4)])
    assert tape.mark_prices(now) == pytest.approx(steps.mean(axis=0), abs=1e-8)


def test_one_seed_gives_one_market_in_whatever_order_it_is_asked():
    early, late = generate(9, 12), generate(9, 12)
    now, then = early.start_ms + 6 * HOUR, early.start_ms + 5 * DAY
    first = [early.candles(i, tf, 0, now, now).tobytes() for i in range(12) for tf in ("5m", "1m", "1h")]
    late.last_prices(then)
    late.forming("1d", then)
    again = [
        late.candles(i, tf, 0, now, now).tobytes() for i in range(11, -1, -1) for tf in ("1h", "1m", "5m")
    ]
    assert first == again[::-1]
    assert early.day(then).tobytes() == late.day(then).tobytes()
    assert early.mark_prices(then).tobytes() == late.mark_prices(then).tobytes()
    assert [early.funding_rate(i, now) for i in range(12)] == [late.funding_rate(i, now) for i in range(12)]


def test_another_seed_gives_another_market():
    one, two = generate(1, 5), generate(2, 5)
    assert one.last_prices(one.start_ms).tobytes() != two.last_prices(two.start_ms).tobytes()


def test_generated_candles_are_whole_ticks_and_join_without_gaps(tape):
    now = tape.start_ms
    for index in (0, 1, 10, 59):
        tick, step = float(tape.instruments[index].tick_size), float(tape.instruments[index].step_size)
        rows = tape.candles(index, "5m", 0, now, now)[:-1]
        ticks = rows[:, 1:5] / tick
        assert np.abs(ticks - np.rint(ticks)).max() < 1e-4
        assert np.abs(rows[:, 5] / step - np.rint(rows[:, 5] / step)).max() < 1e-2
        assert (rows[:, 2] >= rows[:, [1, 4]].max(axis=1)).all()
        assert (rows[:, 3] <= rows[:, [1, 4]].min(axis=1)).all()
        assert np.abs(ticks[1:, 0] - ticks[:-1, 3]).max() < 1.01
        assert (rows[:, 5] > 0).all()


def test_rising_and_falling_are_equally_likely():
    trends = []
    for seed in range(24):
        tape = generate(seed, 40)
        rows = np.stack([tape.candles(i, "4h", 0, tape.start_ms, tape.start_ms)[:, 4] for i in range(40)])
        trends.append(np.sign(np.log(rows[:, -1] / rows[:, 0])).mean())
    # Symbols of one seed move together, so each seed counts once: standard error about 0.6 / sqrt(24).
    assert abs(np.mean(trends)) < 0.35


def test_at_any_time_some_symbols_rise_and_others_fall(tape):
    for hours in range(0, 96, 8):
        now = tape.start_ms + hours * HOUR
        rows = np.stack([tape.candles(i, "1h", now - 24 * HOUR, now, now)[:, 4] for i in range(60)])
        rising = (rows[:, -1] > rows[:, 0]).mean()
        assert 0.02 < rising < 0.98


def test_symbols_are_unique_liquid_first_and_one_is_not_ascii():
    tape = generate(3, 650)
    assert len(set(tape.symbols)) == 650
    assert sum(not symbol.isascii() for symbol in tape.symbols) == 1
    turnover = tape.day(tape.start_ms)[:, 5]
    assert turnover[:10].mean() > 10 * turnover[100:200].mean() > 10 * turnover[600:].mean() / 2
    assert [i.symbol for i in tape.instruments] == list(tape.symbols)


@pytest.mark.parametrize("turnover", [1e10, 1e9, 1e8, 1e6])
def test_maintenance_margin_is_continuous_between_brackets(turnover):
    rows = brackets(turnover)
    assert rows[0].notional_floor == rows[0].maintenance_amount == 0
    for lower, upper in pairwise(rows):
        at = upper.notional_floor
        assert at == lower.notional_cap
        assert upper.max_leverage < lower.max_leverage
        assert (
            at * lower.maintenance_margin_fraction - lower.maintenance_amount
            == at * upper.maintenance_margin_fraction - upper.maintenance_amount
        )


def test_instruments_admit_orders_at_the_market(tape):
    prices = tape.last_prices(tape.start_ms)
    for instrument, price in zip(tape.instruments, prices.tolist(), strict=True):
        assert instrument.min_price < Decimal(price) < instrument.max_price
        assert Decimal(price) * instrument.market_max_quantity > 100 * instrument.min_notional
        assert instrument.market_max_quantity % instrument.step_size == 0
        assert Decimal(price) * instrument.step_size < instrument.min_notional * 5
