"""5m candles where only longer ones were recorded: deterministic, and they aggregate back exactly."""

import numpy as np

from service.exchange.simulated.path import Ints, Keys, walk

STEPS_A_CANDLE = 4


def bridge(keys: Keys, candles: Ints, ratio: int) -> Ints:
    """Split each candle into `ratio` (>= 2) shorter ones.

    Args: candles int64[5, m]: open, high, low, close in ticks and volume in lot steps; keys uint64[m].
    Returns: int64[5, m * ratio]. Each group of `ratio` has the candle's open, extremes, close and volume;
    inside a group each candle opens where the one before it closed.
    """
    open_, high, low, close, volume = candles
    prices, traded = walk(keys, open_, high, low, close, volume, ratio * STEPS_A_CANDLE)
    count = candles.shape[1] * ratio
    inner = prices[:, 1:].reshape(count, STEPS_A_CANDLE)
    opens = prices[:, 0:-1:STEPS_A_CANDLE].reshape(count)
    volumes = np.diff(traded[:, ::STEPS_A_CANDLE], axis=1).reshape(count)
    highs = np.maximum(inner.max(axis=1), opens)
    lows = np.minimum(inner.min(axis=1), opens)
    return np.stack([opens, highs, lows, inner[:, -1], volumes])
