"""What a model sees."""

import pytest

from service.analysis.features import (
    FAR_ATR,
    FEATURE_NAMES,
    Reading,
    Surroundings,
    TimeframeReading,
    signal_features,
)

SUNDAY_ELEVEN_MS = 1_760_266_800_000  # 2025-10-12 11:00 UTC
SCORES = {"trend": 1.0, "structure": 0.5, "position": 0.2, "momentum": 0.6, "volatility": 0.4}
FRAME = TimeframeReading(trend=1, gap=3.0, distance=-1.0, atr=2.0)
READING = Reading(SUNDAY_ELEVEN_MS, 100.0, FRAME, FRAME, FRAME, 1, 60.0, 0.5, 0.3, 1.5, 2.0)


NEAR = Surroundings(0.5, 1.0, 2.0)


def features(sign=1, around=NEAR):
    return signal_features(READING, sign, SCORES, 0.7, around, 2.0)


def test_there_are_29_in_a_fixed_order_for_either_side():
    assert tuple(features(1)) == tuple(features(-1)) == FEATURE_NAMES
    assert len(set(FEATURE_NAMES)) == 29


def test_values_with_a_direction_are_turned_to_the_side_of_the_signal():
    long, short = features(1), features(-1)
    assert (long["ema_gap_5m"], short["ema_gap_5m"]) == (1.5, -1.5)
    assert (long["trend_1h"], short["trend_1h"]) == (1.0, -1.0)
    assert (long["rsi"], short["rsi"]) == (60.0, 40.0)


def test_the_time_is_that_of_the_candles_close_in_utc():
    assert (features()["hour_of_day"], features()["day_of_week"]) == (11.0, 6.0)


def test_what_does_not_exist_is_far_away_and_never_zero():
    none = features(around=Surroundings(None, None, None))
    assert [none[n] for n in ("order_block_distance", "liquidity_ahead", "liquidity_behind")] == [FAR_ATR] * 3
    beyond = features(around=Surroundings(-50.0, 50.0, 0.0))
    assert (beyond["order_block_distance"], beyond["liquidity_ahead"]) == (-FAR_ATR, FAR_ATR)


def test_distances_are_counted_in_average_true_ranges():
    assert features()["atr_fraction"] == pytest.approx(0.02)
    assert features()["ema_distance_15m"] == -0.5
