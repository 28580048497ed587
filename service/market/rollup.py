"""Longer candles from 5m ones, equal to the venue's own to the last bit."""

from collections.abc import Sequence
from decimal import Decimal
from math import fsum

from service.ports import CandleRow
from service.records import TIMEFRAME_MS

BASE_TIMEFRAME = "5m"
BASE_MS = TIMEFRAME_MS[BASE_TIMEFRAME]
ROLLED_TIMEFRAMES = ("15m", "1h")


def bucket_open_ms(open_ms: int, timeframe: str) -> int:
    """Open time of the `timeframe` candle that holds the instant `open_ms`."""
    return open_ms - open_ms % TIMEFRAME_MS[timeframe]


def completes(open_ms: int, timeframe: str) -> bool:
    """Whether the 5m candle that opens at `open_ms` is the last one of its `timeframe` candle."""
    return (open_ms + BASE_MS) % TIMEFRAME_MS[timeframe] == 0


def roll_up(rows: Sequence[CandleRow], timeframe: str) -> CandleRow | None:
    """One `timeframe` candle from the closed 5m candles it is made of, oldest first.

    None when one of them is missing: a candle is never made of a part.
    """
    step = TIMEFRAME_MS[timeframe]
    if not rows or rows[0][0] % step:
        return None
    first = rows[0][0]
    if [row[0] for row in rows] != list(range(first, first + step, BASE_MS)):
        return None
    return (
        first,
        rows[0][1],
        max(row[2] for row in rows),
        min(row[3] for row in rows),
        rows[-1][4],
        summed_volume([row[5] for row in rows]),
    )


def summed_volume(volumes: Sequence[float]) -> float:
    """The venue adds decimals, so the sum must be the float nearest to the decimal sum.

    Below a million the error of the parts is far below the eighth decimal, the finest the venue has,
    so rounding gives it; whole numbers add exactly; only the rest needs decimal arithmetic.
    """
    total = fsum(volumes)
    if total < 1e6:
        return round(total, 8)
    if all(volume.is_integer() for volume in volumes):
        return total
    return float(sum(Decimal(repr(volume)) for volume in volumes))
