"""TA-Lib's indicators under the names we use, with their shapes and edge cases stated.

All arrays are float64[n], oldest first, contiguous; results have the same length, and the values that
cannot be known yet are NaN. Inputs hold no NaN. Views on the candle store are read in place, without a copy.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Make modules look uninstalled: TA-Lib imports pandas and polars (130 MB) whenever it finds them."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is the import system's "no"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _hidden("pandas", "polars"):
    import talib

Array = npt.NDArray[np.float64]


def exponential_average(values: Array, period: int) -> Array:
    """Exponential moving average, alpha = 2 / (period + 1), seeded with the mean of the first `period`.

    The first `period` - 1 values are NaN. The seed's weight fades by (1 - alpha) a candle, so the same
    candle has slightly different averages in windows of different length.
    """
    return talib.EMA(values, period)


def average_true_range(high: Array, low: Array, close: Array, period: int = 14) -> Array:
    """Average true range with Wilder's smoothing, in price units; the first `period` values are NaN.

    Source: J. W. Wilder, New Concepts in Technical Trading Systems (1978).
    """
    return talib.ATR(high, low, close, period)


def relative_strength_index(close: Array, period: int = 14) -> Array:
    """Wilder's RSI, 0 to 100; the first `period` values are NaN.

    Without any change of price in its memory it is 0, as after an endless fall.
    Source: J. W. Wilder, New Concepts in Technical Trading Systems (1978).
    """
    return talib.RSI(close, period)


def macd_histogram(close: Array, fast: int = 12, slow: int = 26, signal: int = 9) -> Array:
    """MACD line minus its signal line, in price units; the first `slow` + `signal` - 2 values are NaN."""
    histogram: Array = talib.MACD(close, fast, slow, signal)[2]
    return histogram


def standard_deviation(values: Array, period: int = 20) -> Array:
    """Population standard deviation of a sliding window; the first `period` - 1 values are NaN.

    Computed as mean of squares minus square of mean: pass values centred near zero (price minus a
    reference), or the difference drowns in rounding. A Bollinger band of k deviations is 2 k of it wide.
    """
    return talib.STDDEV(values, period, 1.0)


def simple_average(values: Array, period: int) -> Array:
    """Mean of a sliding window; the first `period` - 1 values are NaN."""
    return talib.SMA(values, period)


def highest(values: Array, period: int) -> Array:
    """Maximum of a sliding window; the first `period` - 1 values are NaN."""
    return talib.MAX(values, period)


def lowest(values: Array, period: int) -> Array:
    """Minimum of a sliding window; the first `period` - 1 values are NaN."""
    return talib.MIN(values, period)
