"""The founding strategy: trend on three timeframes, structure and order blocks, after ICT and SMC.

Every rule treats both directions alike: mirror the prices about the entry and the signal is mirrored,
with the same confidence. Fractions of price are therefore fractions of one price, the entry. Where the
founding report leaves room, the choice and its reason stand in docs/strategies.md.
"""

from collections.abc import Sequence
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
    BlockCandidate,
    OrderBlockRule,
    Zone,
    find_block_candidates,
    latest_structure,
    liquidity_above,
    liquidity_below,
    order_blocks_of,
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


class Course(Struct, frozen=True, gc=False):
    """Where 15m is going."""

    averages: TimeframeReading
    structure: int


class Levels(Struct, frozen=True, gc=False):
    """What 15m has around the price, for signals of one direction."""

    band_rank: float
    band_position: float
    blocks: tuple[BlockCandidate, ...]
    highs: tuple[float, ...]  # the newest, ascending: where liquidity may rest
    lows: tuple[float, ...]


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
        hour = view.remember("1h", self._read_hour)
        if hour is None or hour.trend == NEUTRAL:
            return None
        fifteen = view.remember("15m", self._read_course, hour.trend)
        if fifteen is None:
            return None
        o = self.options
        five = view.candles("5m")
        averages = self._averages(five, o.close_period_5m)
        if averages is None:
            return None
        sign = direction(hour.trend, fifteen.averages.trend, averages.trend, fifteen.structure)
        if sign == NEUTRAL:
            return None
        entry = five.close.item(-1)
        levels = view.remember("15m", self._read_levels, sign, fifteen.averages.atr)
        reading = Reading(
            view.candle_close_ms,
            entry,
            averages,
            fifteen.averages,
            hour,
            fifteen.structure,
            indicators.relative_strength_index(five.close, o.rsi_period).item(-1),
            indicators.macd_histogram(five.close, o.macd_fast, o.macd_slow, o.macd_signal).item(-1),
            levels.band_rank,
            levels.band_position,
            _volume_ratio(five.volume),
        )
        return self._draft(reading, sign, self._surroundings(levels, entry, fifteen.averages.atr, sign))

    def _read_hour(self, candles: Candles) -> TimeframeReading | None:
        return self._averages(candles, self.options.close_period_1h)

    def _read_course(self, candles: Candles, trend_1h: int) -> Course | None:
        """None where no signal along the trend of 1h can follow, whatever 5m says."""
        averages = self._averages(candles, self.options.close_period_15m)
        if averages is None or averages.trend == -trend_1h:  # before the structure, which costs most
            return None
        structure = latest_structure(candles.high, candles.low, self.options.swing_reach)
        if possible_direction(averages.trend, structure) != trend_1h:
            return None
        return Course(averages, structure)

    def _read_levels(self, candles: Candles, sign: int, atr: float) -> Levels:
        o = self.options
        rule = OrderBlockRule(
            lookback=o.block_lookback,
            volume_factor=o.block_volume_factor,
            volume_period=o.block_volume_period,
            impulse=o.block_impulse_atr * atr,
            impulse_candles=o.block_impulse_candles,
        )
        return Levels(
            *self._band(candles.close),
            find_block_candidates(*candles[1:], sign, rule),
            tuple(sorted(candles.high[-o.liquidity_lookback :].tolist())),
            tuple(sorted(candles.low[-o.liquidity_lookback :].tolist())),
        )

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

    def _band(self, close: Array) -> tuple[float, float]:
        """Rank of the Bollinger band's width among its own last ones, and the close's place in it.

        The width is a fixed multiple of the deviation, so the deviation is ranked. Centred on the newest
        close, because TA-Lib's formula loses digits far from zero.
        """
        o = self.options
        centred = close - close.item(-1)
        widths = indicators.standard_deviation(centred, o.bollinger_period)[-o.bollinger_history :]
        now = widths.item(-1)
        # the unknown ones of a short history are NaN, which is never less
        known = min(widths.size, centred.size - o.bollinger_period + 1)
        rank = float(np.count_nonzero(widths < now)) / max(known - 1, 1)
        middle = float(np.add.reduce(centred[-o.bollinger_period :])) / o.bollinger_period
        place = -middle / now if now > 0.0 else 0.0
        return rank, place

    def _surroundings(self, levels: Levels, entry: float, atr: float, sign: int) -> Surroundings:
        o = self.options
        blocks = levels.blocks and order_blocks_of(levels.blocks, o.block_rejection_fraction * entry)
        tolerance = o.liquidity_fraction * entry
        level = liquidity_above(levels.highs, entry, tolerance, o.liquidity_touches)
        over = None if level is None else (level - entry) / atr
        level = liquidity_below(levels.lows, entry, tolerance, o.liquidity_touches)
        under = None if level is None else (entry - level) / atr
        block = nearest_block(blocks, entry, atr, sign) if blocks else None
        return Surroundings(block, over, under) if sign > 0 else Surroundings(block, under, over)

    def _draft(self, reading: Reading, sign: int, around: Surroundings) -> SignalDraft | None:
        o = self.options
        trend = _trend_score(reading, sign)
        structure = (0.0, 0.5, 1.0)[1 + sign * reading.structure]
        position = position_score(around.order_block)
        momentum = self._momentum_score(reading, sign)
        volatility = volatility_score(reading.band_rank)
        confidence = min(
            o.weight_trend * trend
            + o.weight_structure * structure
            + o.weight_position * position
            + o.weight_momentum * momentum
            + o.weight_volatility * volatility,
            1.0,
        )
        scores = {
            "trend": trend,
            "structure": structure,
            "position": position,
            "momentum": momentum,
            "volatility": volatility,
        }
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


def possible_direction(trend_15m: int, structure: int) -> int:
    """The only direction that `direction` can give with these, whatever the other trends are."""
    if trend_15m == NEUTRAL:
        return structure
    return NEUTRAL if structure == -trend_15m else trend_15m


def nearest_block(
    blocks: Sequence[Zone | BlockCandidate], price: float, atr: float, sign: int
) -> float | None:
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
