"""Swings, breaks, gaps, order blocks, liquidity."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.analysis.structure import (
    BEARISH,
    BULLISH,
    NEUTRAL,
    OrderBlockRule,
    find_breaks,
    find_gaps,
    find_liquidity,
    find_order_blocks,
    find_swings,
    latest_structure,
    liquidity_above,
    liquidity_below,
    market_structure,
)


def array(*values):
    return np.array(values, dtype=np.float64)


@st.composite
def paths(draw):
    """float64[n] on a coarse grid: many ties, sometimes longer than any swing is near."""
    steps = draw(st.lists(st.integers(-2, 2), max_size=30))
    flat = draw(st.sampled_from([0, 1, 80]))
    ramp = draw(st.sampled_from([0, 0, 120]))
    return 50.0 + np.cumsum([*steps, *[0] * flat, *[1] * ramp], dtype=np.float64)


@st.composite
def markets(draw, size=60):
    """open, high, low, close on a grid of eighths, so that mirroring is exact and ties occur."""
    steps = draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size))
    wicks = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=size, max_size=size))
    close = 100.0 + np.cumsum(steps) / 8
    open_ = np.concatenate(([100.0], close[:-1]))
    high = np.maximum(open_, close) + np.array([w[0] for w in wicks]) / 8
    low = np.minimum(open_, close) - np.array([w[1] for w in wicks]) / 8
    return open_, high, low, close


def mirrored(market, about=150.0):
    open_, high, low, close = market
    return 2 * about - open_, 2 * about - low, 2 * about - high, 2 * about - close


def test_a_swing_stands_out_on_both_sides_and_the_first_of_equals_counts():
    high = array(1, 2, 5, 2, 1, 3, 4, 4, 2, 1)
    low = high - 10
    swings = find_swings(high, low, 2)
    assert swings.highs.tolist() == [2, 6]
    assert swings.lows.tolist() == [4]


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_a_market_shorter_than_a_swing_has_none(reach):
    short = np.arange(2.0 * reach)
    assert find_swings(short, short, reach).highs.size == 0


@given(market=markets(), reach=st.integers(1, 6))
def test_swings_are_what_comparing_each_neighbour_finds(market, reach):
    _, high, low, _ = market
    swings = find_swings(high, low, reach)
    inner = range(reach, high.size - reach)
    highs = [
        i for i in inner if high[i] > high[i - reach : i].max() and high[i] >= high[i : i + reach + 1].max()
    ]
    lows = [i for i in inner if low[i] < low[i - reach : i].min() and low[i] <= low[i : i + reach + 1].min()]
    assert swings.highs.tolist() == highs
    assert swings.lows.tolist() == lows


@given(market=markets(), seen=st.integers(1, 59))
def test_later_candles_change_nothing_that_was_known(market, seen):
    open_, high, low, close = market
    whole = find_swings(high, low, 3)
    part = find_swings(high[:seen], low[:seen], 3)
    assert part.highs.tolist() == [i for i in whole.highs.tolist() if i + 3 < seen]
    breaks = find_breaks(high, low, close, whole)
    early = find_breaks(high[:seen], low[:seen], close[:seen], part)
    assert early == [b for b in breaks if b.at < seen]
    gaps = [(g.at, g.direction, g.bottom, g.top) for g in find_gaps(open_, high, low, close)]
    early_gaps = find_gaps(open_[:seen], high[:seen], low[:seen], close[:seen])
    assert [(g.at, g.direction, g.bottom, g.top) for g in early_gaps] == [g for g in gaps if g[0] + 1 < seen]


@given(market=markets())
def test_a_mirrored_market_has_the_mirrored_structure(market):
    open_, high, low, close = market
    o, h, lo, c = mirrored(market)
    swings, turned = find_swings(high, low, 3), find_swings(h, lo, 3)
    assert swings.highs.tolist() == turned.lows.tolist()
    assert market_structure(high, low, swings) == -market_structure(h, lo, turned)
    breaks = [(b.at, b.direction, b.level, b.change) for b in find_breaks(high, low, close, swings)]
    assert breaks == [(b.at, -b.direction, 300 - b.level, b.change) for b in find_breaks(h, lo, c, turned)]
    gaps = [(g.at, g.direction, g.bottom, g.top, g.filled_at) for g in find_gaps(open_, high, low, close)]
    assert gaps == [
        (g.at, -g.direction, 300 - g.top, 300 - g.bottom, g.filled_at) for g in find_gaps(o, h, lo, c)
    ]
    volume = np.abs(np.sin(np.arange(high.size))) * 100
    rule = OrderBlockRule(rejection=0.5, impulse=0.25)
    blocks = find_order_blocks(open_, high, low, close, volume, BULLISH, rule)
    opposite = find_order_blocks(o, h, lo, c, volume, BEARISH, rule)
    assert [(b.bottom, b.top, b.at) for b in blocks] == [
        (300 - b.top, 300 - b.bottom, b.at) for b in opposite
    ]


@pytest.mark.parametrize(
    ("highs", "lows", "expected"),
    [
        ((10, 12), (5, 6), BULLISH),
        ((12, 10), (6, 5), BEARISH),
        ((10, 12), (6, 5), NEUTRAL),
        ((10, 10), (5, 6), NEUTRAL),
    ],
)
def test_structure_follows_the_last_two_highs_and_lows(highs, lows, expected):
    path = array(8, highs[0], 8, lows[0], 8, highs[1], 8, lows[1], 8)
    swings = find_swings(path, path, 1)
    assert market_structure(path, path, swings) == expected


@settings(max_examples=300)
@given(high=paths(), low=paths(), reach=st.integers(1, 6))
def test_the_newest_swings_tell_the_structure_that_all_swings_tell(high, low, reach):
    size = min(high.size, low.size)
    high, low = high[:size], low[:size]
    expected = market_structure(high, low, find_swings(high, low, reach))
    assert latest_structure(high, low, reach) == expected
    assert latest_structure(-low, -high, reach) == -expected


def test_swings_far_back_are_found_when_the_newest_candles_have_none():
    wave = array(*[10, 12, 10, 8] * 3, *[9] * 300)
    rising = wave + np.linspace(0, 3, wave.size)
    assert latest_structure(rising, rising, 1) == BULLISH
    assert latest_structure(-rising, -rising, 1) == BEARISH


def test_a_break_against_the_running_direction_is_a_change_of_character():
    close = array(5, 8, 5, 9, 7, 10, 6, 4, 3)  # above 8: up; then below the swing low at 7
    swings = find_swings(close, close, 1)
    breaks = find_breaks(close, close, close, swings)
    assert [(b.at, b.direction, b.level, b.change) for b in breaks] == [
        (3, BULLISH, 8.0, False),
        (5, BULLISH, 9.0, False),
        (6, BEARISH, 7.0, True),
    ]


def test_a_gap_lies_between_the_neighbours_and_is_filled_by_the_first_that_enters_it():
    open_, high, low, close = (
        array(10, 11, 15, 16, 15),
        array(11, 15, 17, 17, 16),
        array(9, 11, 14, 15, 12),
        array(11, 15, 16, 15, 13),
    )
    (gap,) = find_gaps(open_, high, low, close)
    assert gap == (1, BULLISH, 11.0, 14.0, 4)


def blocks_of(volume_at_block, wick, impulse_close):
    size, at = 40, 30
    open_, close = np.full(size, 100.0), np.full(size, 100.5)
    high, low = np.full(size, 101.0), np.full(size, 99.5)
    volume = np.full(size, 10.0)
    close[at], low[at], volume[at] = 99.8, 99.8 - wick, volume_at_block
    close[at + 2], high[at + 2] = impulse_close, max(impulse_close, 101.0)
    rule = OrderBlockRule(rejection=3.0, impulse=1.0)
    return find_order_blocks(open_, high, low, close, volume, BULLISH, rule)


def test_an_order_block_needs_a_rejection_or_volume_and_then_an_impulse():
    assert [b.at for b in blocks_of(15.0, 0.1, 102.0)] == [30]  # 1.5 times the usual volume
    assert [b.at for b in blocks_of(10.0, 3.0, 102.0)] == [30]  # a long wick
    assert blocks_of(14.9, 2.9, 102.0) == []  # neither
    assert blocks_of(15.0, 3.0, 101.9) == []  # no impulse


@settings(max_examples=300)
@given(
    market=markets(),
    volumes=st.lists(st.sampled_from([0.0, 1.0, 2.5, 10.1]), min_size=60, max_size=60),
    direction=st.sampled_from([BULLISH, BEARISH]),
    rule=st.builds(
        OrderBlockRule,
        lookback=st.integers(2, 70),
        rejection=st.sampled_from([0.125, 0.5, 9.0]),
        volume_factor=st.sampled_from([0.5, 1.5]),
        volume_period=st.integers(2, 70),
        impulse=st.sampled_from([0.0, 0.5, 2.0]),
        impulse_candles=st.integers(1, 9),
    ),
)
def test_order_blocks_are_what_the_rule_says_candle_by_candle(market, volumes, direction, rule):
    open_, high, low, close = market
    volume = np.array(volumes)
    expected = []
    for at in range(max(60 - rule.lookback, rule.volume_period), 59):
        body = close[at] - open_[at]
        wick = close[at] - low[at] if direction == BULLISH else high[at] - close[at]
        usual = volume[at - rule.volume_period : at].sum() * (rule.volume_factor / rule.volume_period)
        later = close[at + 1 : at + 1 + rule.impulse_candles]
        gone = later.max() - high[at] if direction == BULLISH else low[at] - later.min()
        assume(usual <= 1e-9 or abs(volume[at] - usual) > 1e-9)  # a tie is decided by the order of the sum
        stands_out = wick >= rule.rejection or (usual > 1e-9 and volume[at] > usual)
        if body * direction <= 0.0 and stands_out and gone >= rule.impulse:
            expected.append((low[at], high[at], at))
    found = find_order_blocks(open_, high, low, close, volume, direction, rule)
    assert found == expected


@settings(max_examples=300)
@given(
    levels=st.lists(st.integers(0, 40), max_size=25),
    tolerance=st.integers(0, 9),
    touches=st.integers(1, 6),
)
def test_liquidity_zones_are_the_unions_of_all_close_runs_of_levels(levels, tolerance, touches):
    ordered = sorted(levels)
    runs = [range(i, i + touches) for i in range(len(ordered) - touches + 1)]
    close = [run for run in runs if ordered[run[-1]] - ordered[run[0]] <= tolerance]
    zones: list[set[int]] = []
    for run in close:
        if zones and zones[-1] & set(run):
            zones[-1] |= set(run)
        else:
            zones.append(set(run))
    found = find_liquidity(array(*levels), float(tolerance), touches)
    assert found == [(ordered[min(zone)], ordered[max(zone)], -1) for zone in zones]


@settings(max_examples=500)
@given(
    levels=st.lists(st.integers(0, 12).map(float), max_size=12),
    price=st.integers(-2, 26).map(lambda halves: halves / 2),
    tolerance=st.sampled_from([0.0, 1.0, 2.0, 3.0]),
    touches=st.integers(2, 4),
)
def test_the_nearest_liquidity_is_that_of_the_zones_on_either_side(levels, price, tolerance, touches):
    zones = find_liquidity(array(*levels), tolerance, touches)
    above = min((zone.bottom for zone in zones if zone.bottom > price), default=None)
    below = max((zone.top for zone in zones if zone.top < price), default=None)
    assert liquidity_above(sorted(levels), price, tolerance, touches) == above
    assert liquidity_below(sorted(levels), price, tolerance, touches) == below


def test_liquidity_needs_three_levels_close_to_each_other():
    assert find_liquidity(array(100.0, 100.5, 105.0, 100.125), 0.25) == []
    (zone,) = find_liquidity(array(100.0, 105.0, 100.25, 100.125), 0.25)
    assert (zone.bottom, zone.top) == (100.0, 100.25)


def test_liquidity_zones_that_share_a_level_are_one():
    zones = find_liquidity(array(1.0, 1.1, 1.2, 1.3, 1.4, 5.0, 5.1, 5.2), 0.21)
    assert [(z.bottom, z.top) for z in zones] == [(1.0, 1.4), (5.0, 5.2)]


_PEER = """
import io, json, sys, warnings
warnings.simplefilter("ignore")
out, sys.stdout = sys.stdout, io.StringIO()
import pandas as pd
from smartmoneyconcepts import smc
frame = pd.DataFrame(json.load(sys.stdin))
gaps, swings = smc.fvg(frame), smc.swing_highs_lows(frame, swing_length=4)
json.dump({"gaps": gaps.fillna(0).values.tolist(), "swings": swings["HighLow"].fillna(0).tolist()}, out)
"""


@pytest.fixture(scope="module")
def peer():
    """What the smartmoneyconcepts package finds in a seeded market; apart, because it prints and warns."""
    random = np.random.default_rng(11)
    close = 100 + np.cumsum(random.normal(0, 1, 500))
    open_ = np.concatenate(([100.0], close[:-1]))
    high = np.maximum(open_, close) + random.random(500)
    low = np.minimum(open_, close) - random.random(500)
    market = {"open": open_, "high": high, "low": low, "close": close, "volume": np.ones(500)}
    sent = json.dumps({name: values.tolist() for name, values in market.items()})
    answer = subprocess.run(
        [sys.executable, "-c", _PEER], input=sent, capture_output=True, text=True, check=True, timeout=120
    )
    return market, json.loads(answer.stdout)


def test_fair_value_gaps_are_those_of_smartmoneyconcepts(peer):
    market, found = peer
    theirs = [
        (at, int(row[0]), row[2], row[1], int(row[3]) or -1) for at, row in enumerate(found["gaps"]) if row[0]
    ]
    ours = find_gaps(market["open"], market["high"], market["low"], market["close"])
    assert len(ours) > 20
    assert np.array(ours) == pytest.approx(np.array(theirs))


def test_swings_of_smartmoneyconcepts_are_ours_where_they_also_top_the_candle_it_leaves_out(peer):
    market, found = peer
    high, low, swings = market["high"], market["low"], found["swings"]
    ours = find_swings(high, low, 4)
    positions = [i for i, kind in enumerate(swings) if kind and 4 <= i < 496]
    highs = {i for i in positions if swings[i] == 1 and high[i] > high[i - 4]}
    lows = {i for i in positions if swings[i] == -1 and low[i] < low[i - 4]}
    assert len(highs) > 10
    assert highs <= set(ours.highs.tolist())
    assert lows <= set(ours.lows.tolist())


settings.register_profile("perpd", deadline=None)
settings.load_profile("perpd")
