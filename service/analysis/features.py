"""What a model sees of a signal: 29 numbers, from one function for serving and for training.

Values with a direction are turned to the signal's side: positive speaks for it, so that one model serves
long and short. Distances are in ATR. What does not exist within FAR_ATR (no order block, no liquidity)
has the distance FAR_ATR, never zero.
"""

import functools

from msgspec import Struct

FAR_ATR = 10.0

_HOUR_MS = 3_600_000
_DAY_MS = 86_400_000
_MONDAY_OFFSET_DAYS = 3  # the Unix epoch was a Thursday

FEATURE_NAMES: tuple[str, ...] = (
    "score_trend",  # the five parts of the confidence, 0 to 1
    "score_structure",
    "score_position",
    "score_momentum",
    "score_volatility",
    "confidence",  # their weighted sum
    "side",  # 1 long, -1 short
    "trend_5m",  # 1 along the signal, 0 neutral, -1 against it
    "trend_15m",
    "trend_1h",
    "structure",  # likewise, on 15m
    "ema_gap_5m",  # EMA(20) - EMA(50), in the timeframe's ATR(14)
    "ema_gap_15m",
    "ema_gap_1h",
    "ema_distance_5m",  # close - EMA(20), EMA(50), EMA(100), in the timeframe's ATR(14)
    "ema_distance_15m",
    "ema_distance_1h",
    "rsi",  # RSI(14) of 5m; 100 - RSI for a short
    "macd_histogram",  # of 5m, in ATR(14) of 5m
    "atr_fraction",  # ATR(14) of 5m / entry
    "bollinger_rank",  # share of the last widths of the 15m band that are narrower than now, 0 to 1
    "bollinger_position",  # close - middle of the 15m band, in standard deviations
    "order_block_distance",  # to the nearest order block of the signal's direction, in ATR(14) of 15m
    "liquidity_ahead",  # to the nearest liquidity zone towards the target, in ATR(14) of 15m
    "liquidity_behind",  # likewise towards the stop
    "volume_ratio",  # newest 5m volume / mean of the 20 before it
    "risk_reward",  # target distance / stop distance
    "hour_of_day",  # UTC, of the candle's close, 0 to 23
    "day_of_week",  # Monday is 0
)


class TimeframeReading(Struct, frozen=True, gc=False):
    """Averages of one timeframe at its newest candle."""

    trend: int  # 1 up, 0 neutral, -1 down
    gap: float  # EMA(20) - EMA(50), price units
    distance: float  # close - the EMA that the confidence uses, price units
    atr: float


class Reading(Struct, frozen=True, gc=False):
    """All that the confidence and the features are made of, as it stands in the market (not turned)."""

    candle_close_ms: int
    entry: float
    five: TimeframeReading
    fifteen: TimeframeReading
    hour: TimeframeReading
    structure: int
    rsi: float
    macd_histogram: float
    band_rank: float
    band_position: float  # close - middle, standard deviations
    volume_ratio: float


class Surroundings(Struct, frozen=True, gc=False):
    """What lies around the price, seen from the signal's side, in ATR(14) of 15m."""

    order_block: float | None  # 0 inside; negative when the price is past it; None without a block
    liquidity_ahead: float | None
    liquidity_behind: float | None


def signal_features(
    reading: Reading,
    sign: int,
    scores: dict[str, float],
    confidence: float,
    around: Surroundings,
    risk_reward: float,
) -> dict[str, float]:
    """The features of one signal, keys in the order of FEATURE_NAMES. `sign`: 1 long, -1 short."""
    five, fifteen, hour = reading.five, reading.fifteen, reading.hour
    atr_5m, atr_15m, atr_1h = five.atr, fifteen.atr, hour.atr
    turn = float(sign)  # a product of two floats takes a fraction of the time of a mixed one
    hour_of_day, day_of_week = _calendar(reading.candle_close_ms)
    return {
        "score_trend": scores["trend"],
        "score_structure": scores["structure"],
        "score_position": scores["position"],
        "score_momentum": scores["momentum"],
        "score_volatility": scores["volatility"],
        "confidence": confidence,
        "side": turn,
        "trend_5m": float(sign * five.trend),
        "trend_15m": float(sign * fifteen.trend),
        "trend_1h": float(sign * hour.trend),
        "structure": float(sign * reading.structure),
        "ema_gap_5m": turn * five.gap / atr_5m,
        "ema_gap_15m": turn * fifteen.gap / atr_15m,
        "ema_gap_1h": turn * hour.gap / atr_1h,
        "ema_distance_5m": turn * five.distance / atr_5m,
        "ema_distance_15m": turn * fifteen.distance / atr_15m,
        "ema_distance_1h": turn * hour.distance / atr_1h,
        "rsi": reading.rsi if sign > 0 else 100.0 - reading.rsi,
        "macd_histogram": turn * reading.macd_histogram / atr_5m,
        "atr_fraction": atr_5m / reading.entry,
        "bollinger_rank": reading.band_rank,
        "bollinger_position": turn * reading.band_position,
        "order_block_distance": _near(around.order_block),
        "liquidity_ahead": _near(around.liquidity_ahead),
        "liquidity_behind": _near(around.liquidity_behind),
        "volume_ratio": reading.volume_ratio,
        "risk_reward": risk_reward,
        "hour_of_day": hour_of_day,
        "day_of_week": day_of_week,
    }


@functools.lru_cache(maxsize=1)
def _calendar(close_ms: int) -> tuple[float, float]:
    """Hour and day of a candle's close, UTC; mostly that of the symbol before."""
    return float(close_ms % _DAY_MS // _HOUR_MS), float((close_ms // _DAY_MS + _MONDAY_OFFSET_DAYS) % 7)


def _near(distance: float | None) -> float:
    if distance is None or distance > FAR_ATR:
        return FAR_ATR
    return distance if distance > -FAR_ATR else -FAR_ATR
