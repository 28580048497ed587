"""The way a price takes inside one candle: seeded, on the tick grid, through its open, extremes and close.

Randomness is a counter-based hash of a key, not a stream, so a path depends on its candle alone: never on
which other candle was asked for before it.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

NOISE_FRACTION = 0.35
"""How far the price wanders from the straight way between two anchors, as a fraction of high - low."""

WITH_THE_CANDLE = 0.75
"""Chance that a rising candle visits its low before its high (and the mirror image for a falling one)."""


def mix(value: Keys) -> Keys:
    """The finaliser of splitmix64 (S. Vigna, public domain): 64 well-mixed bits from any 64 bits."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def symbol_keys(seed: int, symbols: tuple[str, ...]) -> Keys:
    """uint64[n], from the seed and the name only, so a symbol's paths do not depend on its neighbours."""
    names = np.array([zlib.crc32(symbol.encode()) for symbol in symbols], dtype=np.uint64)
    return mix(mix(np.full(len(symbols), seed % 2**64, dtype=np.uint64) + _GOLDEN) ^ names)


def candle_keys(symbol: Keys, open_ms: Ints | int) -> Keys:
    """One key per candle; `symbol` and `open_ms` broadcast."""
    return mix(symbol + np.asarray(open_ms, dtype=np.int64).astype(np.uint64) * _GOLDEN)


def uniforms(keys: Keys, draws: int) -> Floats:
    """float64[m, draws] in [0, 1), each a function of its key and its column."""
    columns = (np.arange(draws, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    bits: Floats = (mix(keys[:, None] + columns) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


def _anchors(
    chance: Floats, open_: Ints, high: Ints, low: Ints, close: Ints, steps: int
) -> tuple[Ints, Ints]:
    """Positions and prices, int64[m, 4], of open, first extreme, second extreme and close."""
    here = 1 + (chance[:, 0] * (steps - 1)).astype(np.int64)
    there = 1 + (chance[:, 1] * (steps - 2)).astype(np.int64)
    there += there >= here
    rising = np.where(close > open_, WITH_THE_CANDLE, np.where(close < open_, 1 - WITH_THE_CANDLE, 0.5))
    low_first = chance[:, 2] < rising
    first, second = np.where(low_first, low, high), np.where(low_first, high, low)
    positions = np.stack(
        [np.zeros_like(here), np.minimum(here, there), np.maximum(here, there), np.full_like(here, steps)],
        axis=1,
    )
    return positions, np.stack([open_, first, second, close], axis=1)


def walk(
    keys: Keys, open_: Ints, high: Ints, low: Ints, close: Ints, volume: Ints, steps: int
) -> tuple[Ints, Ints]:
    """Walk through m candles in `steps` steps (>= 3).

    Args: prices in ticks, volume in lot steps, all int64[m]; keys uint64[m].
    Returns: prices int64[m, steps + 1], from the open to the close, whose extremes are exactly the candle's;
    volume done so far int64[m, steps + 1], from 0 to the whole.
    """
    chance = uniforms(keys, 3 + 2 * steps)
    positions, values = _anchors(chance, open_, high, low, close, steps)
    column = np.arange(steps + 1)
    leg = (column >= positions[:, 1:2]).astype(np.int64) + (column >= positions[:, 2:3])
    wander = np.zeros((len(keys), steps + 1))
    np.cumsum(chance[:, 3 : 3 + steps] - 0.5, axis=1, out=wander[:, 1:])
    left = np.take_along_axis(positions, leg, axis=1)
    right = np.take_along_axis(positions, leg + 1, axis=1)
    done = (column - left) / (right - left)

    def straight(corners: NDArray[np.float64]) -> Floats:
        start = np.take_along_axis(corners, leg, axis=1)
        result: Floats = start + (np.take_along_axis(corners, leg + 1, axis=1) - start) * done
        return result

    away = wander - straight(np.take_along_axis(wander, positions, axis=1))
    away *= NOISE_FRACTION * (high - low)[:, None]
    exact = np.rint(straight(values.astype(np.float64)) + away).astype(np.int64)
    prices = np.clip(exact, low[:, None], high[:, None])

    share = np.zeros((len(keys), steps + 1))
    np.cumsum(0.25 + chance[:, 3 + steps :], axis=1, out=share[:, 1:])
    traded = np.floor(volume[:, None] * (share / share[:, -1:])).astype(np.int64)
    traded[:, -1] = volume
    return prices, np.minimum(traded, volume[:, None])
