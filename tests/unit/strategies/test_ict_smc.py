"""The founding strategy."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.analysis.features import FEATURE_NAMES
from service.analysis.series import SeriesMemo
from service.analysis.structure import Zone
from service.errors import SettingsInvalid
from service.records import TIMEFRAME_MS, PositionSide
from service.strategies.base import Candles, MarketView, checked_signal
from service.strategies.ict_smc import (
    IctSmc,
    direction,
    nearest_block,
    position_score,
    possible_direction,
    volatility_score,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "candles"
CLOSE_MS = 1_760_000_400_000
GRID = 2.0**-20  # prices on a binary grid are mirrored without rounding


def view_of(series, symbol="TESTUSDT"):
    return MarketView(symbol, CLOSE_MS, series.__getitem__)


def random_market(seed, drift=0.0, size=200):
    """Candles of three timeframes; independent walks that end at nearly the same price."""
    random = np.random.default_rng(seed)
    series = {}
    for timeframe in ("5m", "15m", "1h"):
        wide = 0.4 * (TIMEFRAME_MS[timeframe] / 300_000) ** 0.5
        steps = random.normal(drift * wide, wide, size)
        close = 200.0 + np.cumsum(steps) - steps.sum() * random.random()
        close = np.round(close / GRID) * GRID
        open_ = np.concatenate((close[:1], close[:-1]))
        high = np.maximum(open_, close) + np.round(random.exponential(wide / 2, size) / GRID) * GRID
        low = np.minimum(open_, close) - np.round(random.exponential(wide / 2, size) / GRID) * GRID
        volume = random.exponential(100.0, size)
        times = CLOSE_MS - TIMEFRAME_MS[timeframe] * np.arange(size, 0, -1)
        series[timeframe] = Candles(times, open_, high, low, close, volume)
    return series


def mirror(series):
    """The same market upside down about the entry, the price at which percentages stay what they are."""
    twice = 2 * float(series["5m"].close[-1])
    return {
        timeframe: Candles(
            c.open_ms, twice - c.open, twice - c.low, twice - c.high, twice - c.close, c.volume
        )
        for timeframe, c in series.items()
    }


def assert_mirrored(draft, other):
    if draft is None:
        assert other is None
        return
    assert {draft.position_side, other.position_side} == set(PositionSide)
    assert draft.confidence == other.confidence
    assert draft.scores == other.scores
    assert draft.entry == other.entry
    assert draft.stop + other.stop == pytest.approx(2 * draft.entry, rel=1e-12)
    assert draft.target + other.target == pytest.approx(2 * draft.entry, rel=1e-12)
    for name in FEATURE_NAMES:
        expected = -draft.features[name] if name == "side" else draft.features[name]
        assert other.features[name] == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), drift=st.sampled_from([-0.3, -0.1, 0.0, 0.1, 0.3]))
def test_a_mirrored_market_gives_the_mirrored_signal_with_equal_confidence(seed, drift):
    series = random_market(seed, drift)
    strategy = IctSmc({})
    assert_mirrored(strategy.analyse(view_of(series)), strategy.analyse(view_of(mirror(series))))


class RememberingView(MarketView):
    """A view of series with these versions, by timeframe, and what is remembered of them."""

    def __init__(self, series, versions, memo):
        super().__init__("TESTUSDT", CLOSE_MS, series.__getitem__)
        self.versions, self.memo = versions, memo

    def remember(self, timeframe, compute, *arguments):
        return self.memo.recall(0, self.versions[timeframe], self.candles, timeframe, compute, arguments)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), drift=st.sampled_from([-0.3, 0.0, 0.3]), step=st.integers(-20, 20))
def test_a_mirrored_market_gives_the_mirrored_signal_also_when_15m_and_1h_are_remembered(seed, drift, step):
    series, strategy, memo = random_market(seed, drift), IctSmc({}), SeriesMemo()
    versions = dict.fromkeys(series, 1)
    strategy.analyse(RememberingView(series, versions, memo))
    five = series["5m"]
    price = five.close[-1] + step * GRID * 2**16
    newest = (five.open_ms[-1] + 300_000, five.close[-1], max(price, five.close[-1]) + 1.0)
    newest = (*newest, min(price, five.close[-1]) - 1.0, price, 100.0)
    moved = Candles(*(np.append(values[1:], value) for values, value in zip(five, newest, strict=True)))
    later = {**series, "5m": moved}
    versions["5m"] += 1
    draft = strategy.analyse(RememberingView(later, versions, memo))
    assert draft == IctSmc({}).analyse(view_of(later))
    assert_mirrored(draft, IctSmc({}).analyse(view_of(mirror(later))))
    assert memo.take_counts()[0] >= 1


def test_both_directions_and_silence_occur():
    strategy = IctSmc({})
    drafts = [strategy.analyse(view_of(random_market(seed))) for seed in range(60)]
    sides = {draft.position_side if draft else None for draft in drafts}
    assert sides == {PositionSide.LONG, PositionSide.SHORT, None}


def test_every_draft_is_a_sound_signal_with_the_29_features_in_order():
    strategy = IctSmc({})
    views = [view_of(random_market(seed, 0.2)) for seed in range(40)]
    signals = [s for v in views if (s := checked_signal("ict_smc", v, strategy.analyse(v)))]
    assert signals
    for signal in signals:
        assert tuple(signal.features) == FEATURE_NAMES
        assert len(FEATURE_NAMES) == 29
        weights = {"trend": 0.4, "structure": 0.2, "position": 0.2, "momentum": 0.1, "volatility": 0.1}
        assert signal.confidence == pytest.approx(sum(weights[k] * v for k, v in signal.scores.items()))
        sign = signal.position_side.sign
        assert (signal.entry - signal.stop) * sign == pytest.approx(2 * signal.atr)
        assert (signal.target - signal.entry) * sign == pytest.approx(4 * signal.atr)
        assert signal.signal_id == f"ict_smc:TESTUSDT:{CLOSE_MS}:{signal.position_side}"


@pytest.mark.parametrize(
    ("hour", "fifteen", "five", "structure", "expected"),
    [
        (1, 1, -1, 0, 1),
        (1, 1, 0, 1, 1),
        (1, 1, 1, -1, 0),
        (1, 0, 1, 1, 1),
        (1, 0, 1, 0, 0),
        (1, 0, 0, 1, 0),
        (1, -1, 1, 1, 0),
        (0, 1, 1, 1, 0),
    ],
)
def test_direction_follows_the_founding_rule_and_its_mirror_image(hour, fifteen, five, structure, expected):
    assert direction(hour, fifteen, five, structure) == expected
    assert direction(-hour, -fifteen, -five, -structure) == -expected


def test_15m_alone_rules_out_all_directions_but_one():
    for fifteen, structure in itertools.product((-1, 0, 1), repeat=2):
        found = {direction(h, fifteen, f, structure) for h, f in itertools.product((-1, 0, 1), repeat=2)}
        possible = possible_direction(fifteen, structure)
        assert found == {0, possible}


@pytest.mark.parametrize(
    ("distance", "score"),
    [
        (0.0, 1.0),
        (0.5, 1.0),
        (0.51, 0.8),
        (1.0, 0.8),
        (1.5, 0.6),
        (2.0, 0.4),
        (2.01, 0.2),
        (-0.1, 0.3),
        (None, 0.2),
    ],
)
def test_the_price_scores_by_its_distance_to_the_order_block(distance, score):
    assert position_score(distance) == score


def test_the_distance_counts_from_the_near_side_and_turns_negative_past_the_block():
    block = [Zone(90.0, 95.0)]
    assert nearest_block(block, 97.0, 2.0, 1) == 1.0
    assert nearest_block(block, 93.0, 2.0, 1) == 0.0
    assert nearest_block(block, 88.0, 2.0, 1) == -1.0
    assert nearest_block(block, 88.0, 2.0, -1) == 1.0
    assert nearest_block([*block, Zone(96.0, 96.5)], 97.0, 2.0, 1) == 0.25
    assert nearest_block([], 97.0, 2.0, 1) is None


def test_the_middle_half_of_the_band_widths_scores_best():
    assert [volatility_score(r) for r in (0.0, 0.24, 0.25, 0.75, 0.76, 1.0)] == [0.6, 0.6, 1.0, 1.0, 0.4, 0.4]


def test_a_market_that_does_not_move_gives_no_signal():
    still = {
        timeframe: Candles(np.arange(200), *(np.full(200, 5.0) for _ in range(4)), np.zeros(200))
        for timeframe in ("5m", "15m", "1h")
    }
    assert IctSmc({}).analyse(view_of(still)) is None


def test_candles_that_are_given_are_never_written():
    series = random_market(3, 0.3)
    for candles in series.values():
        for values in candles[1:]:
            values.flags.writeable = False
    IctSmc({}).analyse(view_of(series))


def test_levels_below_zero_give_no_signal():
    strategy = IctSmc({"stop_atr": 500.0})
    assert all(strategy.analyse(view_of(random_market(seed))) is None for seed in range(40))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop_atrs": 2.0}, ["stop_atrs", "stop_atr"]),
        ({"weight_trend": 1.5}, ["weight_trend", "1.5", "<= 1.0"]),
        ({"fast_period": 1}, ["fast_period", ">= 2"]),
        ({"fast_period": 20.5}, ["fast_period"]),
    ],
)
def test_an_unknown_or_impossible_option_is_named_with_what_is_allowed(options, words):
    with pytest.raises(SettingsInvalid) as caught:
        IctSmc(options)
    assert all(word in str(caught.value) for word in words)


def test_options_given_as_floats_serve_as_periods():
    assert IctSmc({"close_period_1h": 120.0}).candles == 121


def real_files():
    return sorted((REAL / "BINANCE_USDM_2025-10").glob("*-5m.parquet"))


def rolled_up(rows, step_ms):
    """5m candles as candles of a longer timeframe; whole ones only."""
    times = rows[:, 0] // step_ms
    starts = np.flatnonzero(np.diff(times, prepend=times[0] - 1))
    spans = zip(starts, [*starts[1:], len(rows)], strict=True)
    whole = [rows[a:b] for a, b in spans if b - a == step_ms // 300_000]

    def pick(of):
        return np.array([of(part) for part in whole])

    return Candles(
        pick(lambda r: r[0, 0]),
        pick(lambda r: r[0, 1]),
        pick(lambda r: r[:, 2].max()),
        pick(lambda r: r[:, 3].min()),
        pick(lambda r: r[-1, 4]),
        pick(lambda r: r[:, 5].sum()),
    )


@pytest.mark.skipif(not REAL.is_dir(), reason="the recorded market data is not on this machine")
def test_on_recorded_markets_mirrored_signals_match_and_neither_side_is_favoured():
    duckdb = pytest.importorskip("duckdb")
    strategy = IctSmc({})
    sides = {PositionSide.LONG: 0, PositionSide.SHORT: 0}
    for file in real_files()[:8]:
        columns = duckdb.sql(
            f"select ts, open, high, low, close, volume from '{file}' order by ts"
        ).fetchnumpy()
        rows = np.column_stack(
            [columns[n].astype(float) for n in ("ts", "open", "high", "low", "close", "volume")]
        )
        for end in range(2_880, len(rows), 1_440):
            end -= int(rows[end - 1, 0] // 300_000 + 1) % 12  # a full hour
            part = rows[:end]
            series = {tf: rolled_up(part[-12 * 210 :], TIMEFRAME_MS[tf]) for tf in ("5m", "15m", "1h")}
            series = {tf: Candles(*(np.ascontiguousarray(v[-200:]) for v in c)) for tf, c in series.items()}
            draft, other = strategy.analyse(view_of(series)), strategy.analyse(view_of(mirror(series)))
            assert (draft is None) == (other is None)
            if draft is not None:
                assert draft.confidence == other.confidence
                sides[draft.position_side] += 1
    assert min(sides.values()) > 0
