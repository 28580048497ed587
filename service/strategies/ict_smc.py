"""The founding strategy: trend on three timeframes, structure and order blocks, after ICT and SMC.

Every rule treats both directions alike: mirror the prices about the entry and the signal is mirrored,
with the same confidence. Fractions of price are therefore fractions of one price, the entry. Where the
founding report leaves room, the choice and its reason stand in docs/strategies.md.
"""

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta, Struct

from service.analysis import indicators
from service.analysis.features import Reading, Surroundings, TimeframeReading, signal_features
from service.analysis.indicators import Array
from service.analysis.structure import (
    BEARISH,
    BULLISH,
    NEUTRAL,
    OrderBlockRule,
    Zone,
    find_liquidity,
    find_order_blocks,
    latest_structure,
)
from service.records import PositionSide
from service.strategies.base import Candles, MarketView, SignalDraft, read_options

Period = Annotated[int, Meta(ge=2, le=500)]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Percent = Annotated[float, Meta(ge=0.0, le=100.0)]

_PLACES = ((0.5, 1.0), (1.0, 0.8), (1.5, 0.6), (2.0, 0.4))  # distance in ATR up to which, score
_FAR_SCORE, _PAST_SCORE = 0.2, 0.3


class IctSmcOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Every figure of the strategy; `strategy.options` in the settings. Periods are in candles."""

    fast_period: Period = 20  # the trend's averages
    slow_period: Period = 50
    neutral_atr: NonNegative = 0.1  # averages closer than this, in the timeframe's ATR, are no trend
    close_period_5m: Period = 20  # the averages the close is held against
    close_period_15m: Period = 50
    close_period_1h: Period = 100
    swing_reach: Annotated[int, Meta(ge=1, le=50)] = 3  # candles on either side of a swing
    block_lookback: Period = 20
    block_rejection_fraction: Positive = 0.03  # wick, of the entry price
    block_volume_factor: Positive = 1.5
    block_volume_period: Period = 20
    block_impulse_atr: NonNegative = 1.0  # a close this far beyond the block, in ATR of 15m
    block_impulse_candles: Annotated[int, Meta(ge=1, le=20)] = 3
    liquidity_lookback: Period = 20
    liquidity_fraction: Positive = 0.002  # of the entry price
    liquidity_touches: Annotated[int, Meta(ge=2, le=20)] = 3
    weight_trend: Fraction = 0.40
    weight_structure: Fraction = 0.20
    weight_position: Fraction = 0.20
    weight_momentum: Fraction = 0.10
    weight_volatility: Fraction = 0.10
    rsi_period: Period = 14
    rsi_near: Percent = 50.0  # a long wants the RSI between these, a short between their mirror images
    rsi_far: Percent = 70.0
    macd_fast: Period = 12
    macd_slow: Period = 26
    macd_signal: Period = 9
    bollinger_period: Period = 20
    bollinger_history: Annotated[int, Meta(ge=4, le=1_000)] = 168
    atr_period: Period = 14
    stop_atr: Positive = 2.0
    target_r: Positive = 2.0


class IctSmc:
    """The founding strategy, on closed candles of 5m, 15m and 1h."""

    name: ClassVar[str] = "ict_smc"
    timeframes: ClassVar[tuple[str, ...]] = ("5m", "15m", "1h")

    def __init__(self, options: dict[str, float]) -> None:
        """Raises SettingsInvalid."""
        o = self.options = read_options(IctSmcOptions, options)
        self.candles = 1 + max(
            o.slow_period,
            o.close_period_5m,
            o.close_period_15m,
            o.close_period_1h,
            o.rsi_period,
            o.atr_period,
            o.macd_slow + o.macd_signal,
            o.bollinger_period + 3,
            o.block_volume_period,
        )

    def analyse(self, view: MarketView) -> SignalDraft | None:
        """A draft for each symbol with a direction, whatever its confidence; None without one."""
        o = self.options
        hour_reading = self._averages(view.candles("1h"), o.close_period_1h)
        if hour_reading is None or hour_reading.trend == NEUTRAL:
            return None
        fifteen = view.candles("15m")
        fifteen_reading = self._averages(fifteen, o.close_period_15m)
        if fifteen_reading is None or fifteen_reading.trend == -hour_reading.trend:
            return None
        five = view.candles("5m")
        five_reading = self._averages(five, o.close_period_5m)
        if five_reading is None:
            return None
        structure = latest_structure(fifteen.high, fifteen.low, o.swing_reach)
        sign = direction(hour_reading.trend, fifteen_reading.trend, five_reading.trend, structure)
        if sign == NEUTRAL:
            return None
        entry = five.close.item(-1)
        band_rank, band_position = self._band(fifteen, entry)
        reading = Reading(
            view.candle_close_ms,
            entry,
            five_reading,
            fifteen_reading,
            hour_reading,
            structure,
            indicators.relative_strength_index(five.close, o.rsi_period).item(-1),
            indicators.macd_histogram(five.close, o.macd_fast, o.macd_slow, o.macd_signal).item(-1),
            band_rank,
            band_position,
            _volume_ratio(five.volume),
        )
        return self._draft(reading, sign, self._surroundings(fifteen, entry, fifteen_reading.atr, sign))

    def _averages(self, candles: Candles, close_period: int) -> TimeframeReading | None:
        """None in a market that does not move: without a range there is neither trend nor stop."""
        o = self.options
        close = candles.close
        atr = indicators.average_true_range(candles.high, candles.low, close, o.atr_period).item(-1)
        if not atr > 0.0:
            return None
        fast = indicators.exponential_average(close, o.fast_period).item(-1)
        slow = indicators.exponential_average(close, o.slow_period).item(-1)
        if close_period == o.fast_period:
            held = fast
        elif close_period == o.slow_period:
            held = slow
        else:
            held = indicators.exponential_average(close, close_period).item(-1)
        gap = fast - slow
        band = o.neutral_atr * atr
        trend = BULLISH if gap > band else (BEARISH if gap < -band else NEUTRAL)
        return TimeframeReading(trend, gap, close.item(-1) - held, atr)

    def _band(self, fifteen: Candles, entry: float) -> tuple[float, float]:
        """Rank of the Bollinger band's width among its own last ones, and the close's place in it.

        The width is a fixed multiple of the deviation, so the deviation is ranked. Centred on the entry,
        because TA-Lib's formula loses digits far from zero.
        """
        o = self.options
        centred = fifteen.close - entry
        widths = indicators.standard_deviation(centred, o.bollinger_period)[-o.bollinger_history :]
        now = widths.item(-1)
        # the unknown ones of a short history are NaN, which is never less
        known = min(widths.size, centred.size - o.bollinger_period + 1)
        rank = float(np.count_nonzero(widths < now)) / max(known - 1, 1)
        middle = float(np.add.reduce(centred[-o.bollinger_period :])) / o.bollinger_period
        place = (centred.item(-1) - middle) / now if now > 0.0 else 0.0
        return rank, place

    def _surroundings(self, fifteen: Candles, entry: float, atr: float, sign: int) -> Surroundings:
        o = self.options
        rule = OrderBlockRule(
            o.block_lookback,
            o.block_rejection_fraction * entry,
            o.block_volume_factor,
            o.block_volume_period,
            o.block_impulse_atr * atr,
            o.block_impulse_candles,
        )
        high, low = fifteen.high, fifteen.low
        blocks = find_order_blocks(fifteen.open, high, low, fifteen.close, fifteen.volume, sign, rule)
        tolerance = o.liquidity_fraction * entry
        over = under = None
        for zone in find_liquidity(high[-o.liquidity_lookback :], tolerance, o.liquidity_touches):
            if zone.bottom > entry:
                over = (zone.bottom - entry) / atr
                break
        for zone in find_liquidity(low[-o.liquidity_lookback :], tolerance, o.liquidity_touches):
            if zone.top >= entry:
                break
            under = (entry - zone.top) / atr
        ahead, behind = (over, under) if sign > 0 else (under, over)
        return Surroundings(nearest_block(blocks, entry, atr, sign), ahead, behind)

    def _draft(self, reading: Reading, sign: int, around: Surroundings) -> SignalDraft | None:
        o = self.options
        scores = {
            "trend": _trend_score(reading, sign),
            "structure": (0.0, 0.5, 1.0)[1 + sign * reading.structure],
            "position": position_score(around.order_block),
            "momentum": self._momentum_score(reading, sign),
            "volatility": volatility_score(reading.band_rank),
        }
        confidence = min(
            o.weight_trend * scores["trend"]
            + o.weight_structure * scores["structure"]
            + o.weight_position * scores["position"]
            + o.weight_momentum * scores["momentum"]
            + o.weight_volatility * scores["volatility"],
            1.0,
        )
        risk = o.stop_atr * reading.five.atr
        stop = reading.entry - sign * risk
        target = reading.entry + sign * o.target_r * risk
        if min(stop, target) <= 0.0:
            return None  # a range wider than the price itself: no such level can be ordered
        return SignalDraft(
            position_side=PositionSide.LONG if sign > 0 else PositionSide.SHORT,
            entry=reading.entry,
            stop=stop,
            target=target,
            atr=reading.five.atr,
            confidence=confidence,
            scores=scores,
            features=signal_features(reading, sign, scores, confidence, around, o.target_r),
        )

    def _momentum_score(self, reading: Reading, sign: int) -> float:
        o = self.options
        turned = reading.rsi if sign > 0 else 100.0 - reading.rsi
        agreeing = (o.rsi_near <= turned <= o.rsi_far) + (sign * reading.macd_histogram > 0.0)
        return (0.0, 0.6, 1.0)[agreeing]


def direction(trend_1h: int, trend_15m: int, trend_5m: int, structure: int) -> int:
    """1 long, -1 short, 0 neither.

    With the trend of 1h: when 15m agrees and structure is not against it, or when 15m is neutral and
    both 5m and structure agree.
    """
    if trend_1h == NEUTRAL:
        return NEUTRAL
    if trend_15m == trend_1h and structure != -trend_1h:
        return trend_1h
    if trend_15m == NEUTRAL and trend_5m == trend_1h and structure == trend_1h:
        return trend_1h
    return NEUTRAL


def nearest_block(blocks: list[Zone], price: float, atr: float, sign: int) -> float | None:
    """Distance from the price to the nearest block, in ATR; None without one.

    0 inside the block. A price beyond the block's far side (below a bullish one) is past it: negative.
    """
    nearest: float | None = None
    for block in blocks:
        near, far = (block.top, block.bottom) if sign > 0 else (block.bottom, block.top)
        if (price - near) * sign > 0.0:
            distance = abs(price - near) / atr
        elif (price - far) * sign < 0.0:
            distance = -abs(price - far) / atr
        else:
            distance = 0.0
        if nearest is None or abs(distance) < abs(nearest):
            nearest = distance
    return nearest


def position_score(distance: float | None) -> float:
    """Score of the distance to the nearest order block, in ATR; see `nearest_block`."""
    if distance is None:
        return _FAR_SCORE
    if distance < 0.0:
        return _PAST_SCORE
    for limit, score in _PLACES:
        if distance <= limit:
            return score
    return _FAR_SCORE


def volatility_score(rank: float) -> float:
    """Score of the band's rank among its own last widths: the middle half is best."""
    if rank < 0.25:
        return 0.6
    return 0.4 if rank > 0.75 else 1.0


def _trend_score(reading: Reading, sign: int) -> float:
    five, fifteen, hour = reading.five.distance, reading.fifteen.distance, reading.hour.distance
    return ((sign * five > 0.0) + (sign * fifteen > 0.0) + (sign * hour > 0.0)) / 3


def _volume_ratio(volume: Array) -> float:
    """The newest volume against the mean of the 20 before it; 1 where nothing was traded."""
    usual = float(np.add.reduce(volume[-21:-1])) / 20.0
    return volume.item(-1) / usual if usual > 0.0 else 1.0
