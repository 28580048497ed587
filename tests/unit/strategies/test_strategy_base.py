"""What perpd accepts from a strategy."""

import math

import msgspec
import numpy as np
import pytest

from service.records import PositionSide
from service.strategies.base import MarketView, SignalDraft, StrategyBroke, checked_signal

VIEW = MarketView("币安人生USDT", 300_000, lambda timeframe: None)
GOOD = SignalDraft(
    position_side=PositionSide.LONG,
    entry=100.0,
    stop=98.0,
    target=104.0,
    atr=1.0,
    confidence=0.5,
    scores={"a": 1.0},
    features={"b": 2.0},
)


def changed(**fields):
    return msgspec.structs.replace(GOOD, **fields)


def test_a_good_draft_becomes_a_signal_with_a_deterministic_id():
    signal = checked_signal("mine", VIEW, GOOD)
    assert signal.signal_id == "mine:币安人生USDT:300000:LONG"
    assert (signal.strategy, signal.symbol, signal.candle_close_ms) == ("mine", "币安人生USDT", 300_000)


def test_no_draft_is_no_signal():
    assert checked_signal("mine", VIEW, None) is None


def test_numbers_of_numpy_become_plain_floats():
    signal = checked_signal("mine", VIEW, changed(entry=np.float32(100.0), features={"b": np.int64(3)}))
    assert type(signal.entry) is float
    assert type(signal.features["b"]) is float


def test_floats_whose_sum_overflows_are_finite_all_the_same():
    features = {"a": 1.7e308, "b": 1.7e308}
    assert checked_signal("mine", VIEW, changed(features=features)).features == features


def test_what_a_strategy_keeps_of_its_draft_cannot_change_the_signal():
    kept = {"b": 2.0}
    signal = checked_signal("mine", VIEW, changed(features=kept))
    kept["b"] = math.nan
    assert signal.features == {"b": 2.0}


@pytest.mark.parametrize(
    ("draft", "word"),
    [
        (changed(entry=math.nan), "entry is nan"),
        (changed(target=math.inf), "target is inf"),
        (changed(stop=101.0), "wrong side"),
        (changed(stop=100.0), "wrong side"),
        (changed(target=99.0), "wrong side"),
        (changed(position_side=PositionSide.SHORT), "wrong side"),
        (changed(stop=-1.0), "must be positive"),
        (changed(confidence=1.01), "outside 0 to 1"),
        (changed(confidence=-0.1), "outside 0 to 1"),
        (changed(confidence=math.nan), "confidence is nan"),
        (changed(confidence="0.5"), "not a number"),
        (changed(confidence=True), "not a number"),
        (changed(entry=np.array([1.0, 2.0])), "entry is ndarray"),
        (changed(position_side="LONG"), "position_side"),
        (changed(features={"b": math.nan}), "features['b'] is nan"),
        (changed(features={1: 2.0}), "keys are texts"),
        (changed(features={"a": 1.0, "b": math.inf}), "features['b'] is inf"),
        (changed(features={"a": math.inf, "b": -math.inf}), "features['a'] is inf"),
        (changed(features={"a": 1.0, "b": np.float64("nan")}), "features['b'] is nan"),
        (changed(features={"a": True}), "features['a'] is bool"),
        (changed(features={"a": None}), "features['a'] is NoneType"),
        (changed(features={"a": np.ones((2, 2))}), "features['a'] is ndarray"),
        (changed(features={"a": 10**400}), "features['a'] is int"),
        (changed(features={"a": 1.0, b"b": 2.0}), "keys are texts"),
        (changed(features={"\ud800": 1.0}), "a key that is no text"),
        (changed(features={"x" * 10_000_000: 1.0}), "10000000 bytes"),
        (changed(features={"é" * 4_097: 1.0}), "8194 bytes"),
        (changed(features=dict.fromkeys(map(str, range(1_000_000)), 0.0)), "1000000 entries"),
        (changed(features=[1.0] * 1_000_000), "features is a list"),
        (changed(features=[1.0]), "not a dict"),
        (changed(scores={str(i): 0.0 for i in range(1_000)}), "1000 entries"),
        ([GOOD] * 1_000_000, "list"),
        ((GOOD for _ in range(3)), "generator"),
        ("buy", "str"),
        (42, "int"),
    ],
)
def test_nonsense_is_refused_with_its_reason(draft, word):
    with pytest.raises(StrategyBroke, match=word.replace("[", r"\[").replace("]", r"\]")):
        checked_signal("mine", VIEW, draft)
