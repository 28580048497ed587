"""Market structure: swings, breaks, order blocks, fair value gaps and liquidity, in numpy.

Nothing looks ahead: what needs later candles to be known is reported at the candle that made it known.
Every rule has the same form for both directions, so a mirrored market gives the mirrored structure.
Arrays are float64[n], oldest first; indices count from the oldest candle. Prices in quote currency.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from service.analysis.indicators import Array, highest, lowest

Indices = npt.NDArray[np.intp]

BULLISH, NEUTRAL, BEARISH = 1, 0, -1

_NEAR_REACHES = 16  # a market's last two swings of a kind mostly lie within so many reaches


class Swings(NamedTuple):
    """Candles whose high (low) stands out among `reach` neighbours on either side, oldest first.

    A swing at index i is known once candle i + reach has closed.
    """

    highs: Indices
    lows: Indices
    reach: int


class Break(NamedTuple):
    """A close beyond the latest swing known at that time."""

    at: int  # the candle that closed beyond
    direction: int  # BULLISH or BEARISH
    level: float  # the swing's price
    change: bool  # True: against the running direction (CHOCH); False: along it (BOS)


class Zone(NamedTuple):
    """A price range; `at` is the candle it comes from, -1 where it comes from several."""

    bottom: float
    top: float
    at: int = -1


class Gap(NamedTuple):
    """A fair value gap: the range candle `at` jumped over, known when the next candle closed."""

    at: int
    direction: int
    bottom: float
    top: float
    filled_at: int  # the first later candle that entered the gap; -1 while none has


def find_swings(high: Array, low: Array, reach: int) -> Swings:
    """Swing highs and lows.

    A swing high is higher than each of the `reach` candles before it and not lower than any of the
    `reach` after it, so the first of equal highs counts; a swing low likewise.
    """
    width = 2 * reach + 1
    none: Indices = np.empty(0, dtype=np.intp)
    if high.size < width:
        return Swings(none, none, reach)
    centre = slice(reach, high.size - reach)
    highs = np.flatnonzero(
        (high[centre] >= highest(high, width)[width - 1 :])
        & (high[centre] > highest(high, reach)[reach - 1 : high.size - reach - 1])
        if reach > 1
        else (high[centre] >= high[2:]) & (high[centre] > high[:-2])
    )
    lows = np.flatnonzero(
        (low[centre] <= lowest(low, width)[width - 1 :])
        & (low[centre] < lowest(low, reach)[reach - 1 : low.size - reach - 1])
        if reach > 1
        else (low[centre] <= low[2:]) & (low[centre] < low[:-2])
    )
    return Swings(highs + reach, lows + reach, reach)


def market_structure(high: Array, low: Array, swings: Swings) -> int:
    """BULLISH when the last two swing highs and the last two swing lows both rise, BEARISH when both
    fall, else NEUTRAL (also with fewer than two of either)."""
    if swings.highs.size < 2 or swings.lows.size < 2:
        return NEUTRAL
    high_step = high[swings.highs[-1]] - high[swings.highs[-2]]
    low_step = low[swings.lows[-1]] - low[swings.lows[-2]]
    if high_step > 0.0 and low_step > 0.0:
        return BULLISH
    if high_step < 0.0 and low_step < 0.0:
        return BEARISH
    return NEUTRAL


def latest_structure(high: Array, low: Array, reach: int) -> int:
    """What `market_structure` says of all swings, found from the newest two of either kind alone."""
    high_step = _last_swing_step(high, reach)
    if not high_step:
        return NEUTRAL
    low_step = -_last_swing_step(low, reach, mirrored=True)
    if high_step > 0.0 and low_step > 0.0:
        return BULLISH
    if high_step < 0.0 and low_step < 0.0:
        return BEARISH
    return NEUTRAL


def _last_swing_step(values: Array, reach: int, *, mirrored: bool = False) -> float:
    """From the last but one swing high (of the negated values when mirrored) to the last; 0 without two.

    Swings lie a few `reach` apart, so that the newest candles mostly hold two; else all are looked at.
    """
    near = values[-_NEAR_REACHES * reach :]
    step = _swing_step((-near if mirrored else near).tolist(), reach)
    if step is None and values.size > near.size:
        step = _swing_step((-values if mirrored else values).tolist(), reach)
    return step or 0.0


def _swing_step(values: list[float], reach: int) -> float | None:
    """As above, of a list; None with fewer than two swings in it. Backwards: the newest are wanted."""
    last: float | None = None
    further = range(2, reach + 1)
    for at in range(len(values) - 1 - reach, reach - 1, -1):
        value = values[at]
        if value <= values[at - 1] or value < values[at + 1]:  # most end here
            continue
        for away in further:  # few come to the last: slices would cost more than they spare
            if value <= values[at - away] or value < values[at + away]:
                break
        else:
            if last is not None:
                return last - value
            last = value
    return None


def find_breaks(high: Array, low: Array, close: Array, swings: Swings) -> list[Break]:
    """Breaks of structure and changes of character, oldest first.

    Each swing is broken at most once, by the first close beyond it after it became known, and only while
    it is the latest of its kind. The first break has no direction to run against and is no change.
    """
    known_highs = dict(zip((swings.highs + swings.reach).tolist(), high[swings.highs].tolist(), strict=True))
    known_lows = dict(zip((swings.lows + swings.reach).tolist(), low[swings.lows].tolist(), strict=True))
    breaks: list[Break] = []
    above = below = None
    running = NEUTRAL
    for index, price in enumerate(close.tolist()):
        if above is not None and price > above:
            breaks.append(Break(index, BULLISH, above, running == BEARISH))
            above, running = None, BULLISH
        elif below is not None and price < below:
            breaks.append(Break(index, BEARISH, below, running == BULLISH))
            below, running = None, BEARISH
        above = known_highs.get(index, above)
        below = known_lows.get(index, below)
    return breaks


def find_gaps(open_: Array, high: Array, low: Array, close: Array) -> list[Gap]:
    """Fair value gaps, oldest first.

    Bullish: a rising candle whose neighbours do not touch, the high before below the low after; the gap
    lies between them. Bearish is the mirror image.
    """
    if high.size < 3:
        return []
    rising = (high[:-2] < low[2:]) & (close[1:-1] > open_[1:-1])
    falling = (low[:-2] > high[2:]) & (close[1:-1] < open_[1:-1])
    gaps = []
    for before in np.flatnonzero(rising | falling).tolist():
        index = before + 1
        if rising[before]:
            bottom, top = float(high[before]), float(low[index + 1])
            entered = low[index + 2 :] <= top
        else:
            bottom, top = float(high[index + 1]), float(low[before])
            entered = high[index + 2 :] >= bottom
        filled = index + 2 + int(entered.argmax()) if entered.any() else -1
        gaps.append(Gap(index, BULLISH if rising[before] else BEARISH, bottom, top, filled))
    return gaps


class OrderBlockRule(Struct, frozen=True, gc=False):
    """What makes a candle an order block."""

    lookback: int = 20  # how many of the newest candles are looked at
    rejection: float = 0.0  # wick on the block's own side, price units
    volume_factor: float = 1.5  # times the average volume of the `volume_period` candles before it
    volume_period: int = 20
    impulse: float = 0.0  # how far a later close gets beyond the block, price units
    impulse_candles: int = 3  # within how many candles


class BlockCandidate(Struct, frozen=True, array_like=True, gc=False):
    """A candle that price left as it leaves an order block. Whether it is one is up to its wick."""

    bottom: float
    top: float
    at: int
    wick: float  # on the block's own side, price units
    heavy: bool  # its volume stands out: it is a block whatever its wick


def find_order_blocks(
    open_: Array, high: Array, low: Array, close: Array, volume: Array, direction: int, rule: OrderBlockRule
) -> list[Zone]:
    """Order blocks of one direction among the newest candles, oldest first; each spans its candle's range.

    Bullish: a candle that does not rise, with a lower wick of at least `rejection` or a volume of at least
    `volume_factor` times the average before it, after which a close rises `impulse` or more above its
    high within `impulse_candles`. Bearish is the mirror image. The newest candle cannot be one yet.
    """
    candidates = find_block_candidates(open_, high, low, close, volume, direction, rule)
    return [Zone(c.bottom, c.top, c.at) for c in order_blocks_of(candidates, rule.rejection)]


def order_blocks_of(candidates: Iterable[BlockCandidate], rejection: float) -> list[BlockCandidate]:
    """Those candidates that are order blocks when it takes a wick of `rejection`."""
    return [c for c in candidates if c.heavy or c.wick >= rejection]


def find_block_candidates(
    open_: Array, high: Array, low: Array, close: Array, volume: Array, direction: int, rule: OrderBlockRule
) -> tuple[BlockCandidate, ...]:
    """As `find_order_blocks`, whatever the wicks: `rule.rejection` does not count."""
    size = close.size
    first = max(size - rule.lookback, rule.volume_period)
    if first >= size - 1:
        return ()
    opens, closes = open_[first:].tolist(), close[first:].tolist()
    lows, highs = low[first:].tolist(), high[first:].tolist()
    # seen from the block's direction: how far later closes get, the side they leave by, the side of the wick
    if direction == BULLISH:
        furthest, near, far = max, highs, lows
        turned = [at for at, (o, c) in enumerate(zip(opens, closes, strict=True)) if c <= o]
    else:
        furthest, near, far = min, lows, highs
        turned = [at for at, (o, c) in enumerate(zip(opens, closes, strict=True)) if c >= o]
    volumes: _Volumes | None = None
    candidates = []
    reach, impulse = rule.impulse_candles, rule.impulse
    best = furthest(closes)
    for at in turned:
        if direction * (best - near[at]) < impulse:  # nor does any close later
            continue
        later = closes[at + 1 : at + 1 + reach]
        if not later or direction * (furthest(later) - near[at]) < impulse:
            continue
        if volumes is None:
            volumes = _Volumes(volume[first - rule.volume_period :].tolist(), rule)
        # a candle against the direction starts its wick at its close
        wick = direction * (closes[at] - far[at])
        candidates.append(BlockCandidate(lows[at], highs[at], first + at, wick, volumes.stands_out(at)))
    return tuple(candidates)


class _Volumes:
    """The volumes of a window, and before it of `volume_period` candles."""

    __slots__ = ("_period", "_share", "_sums", "_volume")

    def __init__(self, volume: list[float], rule: OrderBlockRule) -> None:
        self._volume = volume
        self._sums = list(accumulate(volume, initial=0.0))
        self._period = rule.volume_period
        self._share = rule.volume_factor / rule.volume_period

    def stands_out(self, at: int) -> bool:
        """Whether the window's candle has more than its share of the volume before it.

        A market without trades has no volume that stands out.
        """
        end = at + self._period
        return self._volume[end] >= (self._sums[end] - self._sums[at]) * self._share > 0.0


def find_liquidity(levels: Array, tolerance: float, touches: int = 3) -> list[Zone]:
    """Prices at which at least `touches` of the levels lie within `tolerance` of each other, lowest first.

    Args: levels: float64[n], highs or lows in any order; tolerance: price units.
    Zones that share a level are merged, so a zone may be wider than the tolerance.
    """
    ordered = sorted(levels.tolist())
    span = touches - 1
    zones: list[Zone] = []
    lowest_level, end = 0.0, -1  # of the zone that may still grow; -1 before the first
    for start, (bottom, top) in enumerate(zip(ordered, ordered[span:], strict=False)):
        if top - bottom > tolerance:
            continue
        if start > end:
            if end >= 0:
                zones.append(Zone(lowest_level, ordered[end]))
            lowest_level = bottom
        end = start + span
    if end >= 0:
        zones.append(Zone(lowest_level, ordered[end]))
    return zones


def liquidity_above(
    ordered: Sequence[float], price: float, tolerance: float, touches: int = 3
) -> float | None:
    """The bottom of the lowest zone of `find_liquidity` that lies above the price; None without one.

    Args: ordered: the levels, ascending. Only levels near the price and above it are looked at.
    """
    span = touches - 1
    first = bisect_right(ordered, price)
    end = -1  # of a zone that begins at or below the price and may reach above it
    for start in range(max(first - span, 0), len(ordered) - span):
        if ordered[start + span] - ordered[start] > tolerance:
            continue
        if start > end and start >= first:
            return ordered[start]
        end = start + span
    return None


def liquidity_below(
    ordered: Sequence[float], price: float, tolerance: float, touches: int = 3
) -> float | None:
    """The mirror image: the top of the highest zone that lies below the price."""
    span = touches - 1
    last = bisect_left(ordered, price) - 1
    end = len(ordered)
    for start in range(min(last + span, len(ordered) - 1), span - 1, -1):
        if ordered[start] - ordered[start - span] > tolerance:
            continue
        if start < end and start <= last:
            return ordered[start]
        end = start - span
    return None
