"""Paths inside a candle, and candles bridged from longer ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.exchange.simulated.bridge import bridge
from service.exchange.simulated.path import candle_keys, symbol_keys, walk


@st.composite
def candles(draw: st.DrawFn) -> np.ndarray:
    """int64[5, m] valid candles in ticks and lots, flat and one-sided ones among them."""
    count = draw(st.integers(1, 12))
    price = st.integers(1, 2**31 - 1) | st.integers(1, 20)
    rows = []
    for _ in range(count):
        low, high = sorted((draw(price), draw(price)))
        inside = st.integers(low, high) | st.sampled_from((low, high))
        rows.append(
            (draw(inside), high, low, draw(inside), draw(st.integers(0, 10**13) | st.integers(0, 25)))
        )
    return np.array(rows, dtype=np.int64).T


def keys_for(rows: np.ndarray, seed: int = 7) -> np.ndarray:
    return candle_keys(symbol_keys(seed, ("BTCUSDT",))[0], np.arange(rows.shape[1]) * 300_000)


@given(rows=candles(), steps=st.sampled_from((3, 12, 20, 48)))
def test_a_path_goes_from_open_through_both_extremes_to_close(rows, steps):
    prices, _ = walk(keys_for(rows), *rows, steps)
    assert (prices[:, 0] == rows[0]).all()
    assert (prices.max(axis=1) == rows[1]).all()
    assert (prices.min(axis=1) == rows[2]).all()
    assert (prices[:, -1] == rows[3]).all()


@given(rows=candles())
def test_the_steps_of_a_path_share_the_whole_volume(rows):
    _, traded = walk(keys_for(rows), *rows, 20)
    assert (traded[:, 0] == 0).all()
    assert (traded[:, -1] == rows[4]).all()
    assert (np.diff(traded, axis=1) >= 0).all()


def test_a_path_does_not_depend_on_its_neighbours():
    rows = np.tile(np.array([[100], [140], [90], [120], [5_000]]), 50)
    keys = keys_for(rows)
    together, _ = walk(keys, *rows, 20)
    alone, _ = walk(keys[17:18], *rows[:, 17:18], 20)
    assert (together[17] == alone[0]).all()
    assert len(np.unique(together, axis=0)) == 50


def test_paths_of_rising_and_falling_candles_mirror_each_other_in_order():
    count = 4_000
    rising = np.tile(np.array([[100], [140], [90], [130], [0]]), count)
    falling = np.tile(np.array([[100], [110], [60], [70], [0]]), count)
    up, _ = walk(keys_for(rising), *rising, 20)
    down, _ = walk(keys_for(falling), *falling, 20)
    low_first = (up.argmin(axis=1) < up.argmax(axis=1)).mean()
    high_first = (down.argmax(axis=1) < down.argmin(axis=1)).mean()
    assert low_first == pytest.approx(0.75, abs=0.03)
    assert high_first == pytest.approx(0.75, abs=0.03)


@given(rows=candles(), ratio=st.sampled_from((3, 6, 12)))
def test_bridged_candles_aggregate_back_exactly(rows, ratio):
    open_, high, low, close, volume = bridge(keys_for(rows), rows, ratio).reshape(5, -1, ratio)
    assert (open_[:, 0] == rows[0]).all()
    assert (high.max(axis=1) == rows[1]).all()
    assert (low.min(axis=1) == rows[2]).all()
    assert (close[:, -1] == rows[3]).all()
    assert (volume.sum(axis=1) == rows[4]).all()
    assert (high >= np.maximum(open_, close)).all()
    assert (low <= np.minimum(open_, close)).all()
    assert (open_[:, 1:] == close[:, :-1]).all()


def test_bridging_is_the_same_for_the_same_seed_and_another_for_another():
    rows = np.array([[100], [140], [90], [120], [5_000]])
    first = bridge(keys_for(rows, seed=1), rows, 3)
    assert (first == bridge(keys_for(rows, seed=1), rows, 3)).all()
    assert any((first != bridge(keys_for(rows, seed=seed), rows, 3)).any() for seed in range(2, 6))
