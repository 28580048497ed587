"""TA-Lib's indicators against formulas written out here."""

import subprocess
import sys

import numpy as np
import pytest

from service.analysis import indicators


@pytest.fixture
def candles():
    random = np.random.default_rng(7)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.01, 300)))
    open_ = np.concatenate(([100.0], close[:-1]))
    high = np.maximum(open_, close) * (1 + random.random(300) * 0.01)
    low = np.minimum(open_, close) * (1 - random.random(300) * 0.01)
    return open_, high, low, close


def reference_average(values, period):
    out = [sum(values[:period]) / period]
    for value in values[period:]:
        out.append(out[-1] + (value - out[-1]) * 2 / (period + 1))
    return out


def reference_wilder(values, period):
    out = [sum(values[:period]) / period]
    for value in values[period:]:
        out.append((out[-1] * (period - 1) + value) / period)
    return out


@pytest.mark.parametrize("period", [2, 20, 50, 100])
def test_the_exponential_average_starts_at_the_mean_and_follows_two_over_n_plus_one(candles, period):
    close = candles[3]
    found = indicators.exponential_average(close, period)
    assert np.isnan(found[: period - 1]).all()
    assert found[period - 1 :] == pytest.approx(reference_average(close.tolist(), period), rel=1e-12)


def test_the_true_range_is_smoothed_as_wilder_has_it(candles):
    _, high, low, close = candles
    ranges = [
        max(h - lo, abs(h - before), abs(lo - before))
        for h, lo, before in zip(high[1:], low[1:], close[:-1], strict=True)
    ]
    found = indicators.average_true_range(high, low, close, 14)
    assert np.isnan(found[:14]).all()
    assert found[14:] == pytest.approx(reference_wilder(ranges, 14), rel=1e-12)


def test_the_relative_strength_index_compares_wilders_gains_and_losses(candles):
    close = candles[3]
    steps = np.diff(close).tolist()
    gains = reference_wilder([max(step, 0.0) for step in steps], 14)
    losses = reference_wilder([max(-step, 0.0) for step in steps], 14)
    expected = [100 * g / (g + lo) for g, lo in zip(gains, losses, strict=True)]
    assert indicators.relative_strength_index(close, 14)[14:] == pytest.approx(expected, rel=1e-10)


def test_the_macd_histogram_is_the_line_minus_its_own_average(candles):
    close = candles[3].tolist()
    # TA-Lib starts the fast average late, so that both averages begin at the same candle
    slow = reference_average(close, 26)
    fast = reference_average(close[14:], 12)
    line = [f - s for f, s in zip(fast, slow, strict=True)]
    signal = reference_average(line, 9)
    expected = [m - s for m, s in zip(line[8:], signal, strict=True)]
    found = indicators.macd_histogram(np.array(close))
    assert np.isnan(found[:33]).all()
    assert found[33:] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_deviation_is_that_of_the_whole_window(candles):
    centred = candles[3] - candles[3][-1]
    expected = [np.std(centred[i - 19 : i + 1]) for i in range(19, 300)]
    assert indicators.standard_deviation(centred, 20)[19:] == pytest.approx(expected, rel=1e-9)


def test_sliding_extremes_and_means_cover_exactly_the_window(candles):
    close = candles[3]
    windows = np.lib.stride_tricks.sliding_window_view(close, 7)
    assert indicators.highest(close, 7)[6:].tolist() == windows.max(axis=1).tolist()
    assert indicators.lowest(close, 7)[6:].tolist() == windows.min(axis=1).tolist()
    assert indicators.simple_average(close, 7)[6:] == pytest.approx(windows.mean(axis=1), rel=1e-12)


def test_the_indicators_bring_neither_pandas_nor_polars_with_them_and_hide_them_from_nobody():
    program = (
        "import sys, service.analysis.indicators as i\n"
        "assert not {'pandas', 'polars'} & set(sys.modules), 'imported'\n"
        "import pandas\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
