"""What is remembered of a series, and when it is not."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.analysis import worker
from service.analysis.row_view import RowView
from service.analysis.series import MAX_FUNCTIONS, SeriesMemo
from service.analysis.worker import Task, analyse_batch, forget
from service.market.candles import CandleStore
from service.records import TIMEFRAME_MS, TIMEFRAMES
from service.settings import StrategySettings
from service.strategies.base import MAX_REMEMBERED_BYTES, Candles, MarketView, StrategyBroke, checked_signal
from service.strategies.ict_smc import IctSmc

NOW_MS = 1_760_400_000_000 // 3_600_000 * 3_600_000
KEPT = 120


def candles_of(rng, timeframe, count, until_ms=NOW_MS, close=100.0):
    step = TIMEFRAME_MS[timeframe]
    rows = []
    for back in range(count, 0, -1):
        before, close = close, close * (1 + rng.gauss(0.0005, 0.003))
        high, low = (
            max(before, close) * (1 + rng.random() / 500),
            min(before, close) * (1 - rng.random() / 500),
        )
        rows.append((until_ms - back * step, before, high, low, close, rng.expovariate(0.01)))
    return rows


@pytest.fixture
def store(tmp_path):
    store = CandleStore.open(tmp_path / "candles.mmap", symbols_capacity=8, candles=KEPT)
    rng = random.Random(5)
    for number in range(6):
        row = store.add_symbol(f"S{number}USDT")
        for timeframe in TIMEFRAMES:
            store.append(row, timeframe, candles_of(rng, timeframe, KEPT))
    yield store
    store.close()


@pytest.fixture
def memo():
    return SeriesMemo()


def newest(candles: Candles) -> float:
    return candles.close.item(-1)


def close_one(store, row, timeframe, rng):
    """The next candle of a series."""
    last = store.last_open_ms(row, timeframe)
    price = store.rows_since(row, timeframe, last)[0][4]
    step = TIMEFRAME_MS[timeframe]
    store.append(row, timeframe, candles_of(rng, timeframe, 1, last + 2 * step, price))


def test_a_result_stands_until_its_own_series_changes(store, memo):
    first = RowView(store, 0, "S0USDT", memo).remember("15m", newest)
    close_one(store, 0, "5m", random.Random(1))
    assert RowView(store, 0, "S0USDT", memo).remember("15m", newest) == first
    assert memo.take_counts() == (1, 1)
    close_one(store, 0, "15m", random.Random(1))
    assert (
        RowView(store, 0, "S0USDT", memo).remember("15m", newest)
        == store.rows_since(0, "15m", 0)[-1][4]
        != first
    )
    assert memo.take_counts() == (0, 1)
    assert memo.take_counts() == (0, 0)


def test_rows_timeframes_functions_and_arguments_are_told_apart(store, memo):
    def oldest(candles: Candles, field: str = "close") -> float:
        return getattr(candles, field).item(0)

    asked = [
        (row, timeframe, *what)
        for row in (0, 1)
        for timeframe in ("5m", "1h")
        for what in ((newest,), (oldest,))
    ]
    for _ in range(2):
        for row, timeframe, compute in asked:
            view = RowView(store, row, f"S{row}USDT", memo)
            assert view.remember(timeframe, compute) == compute(view.candles(timeframe))
    assert memo.take_counts() == (8, 8)
    view = RowView(store, 0, "S0USDT", memo)
    for field in ("high", "high", "low"):
        assert view.remember("1h", oldest, field) == getattr(view.candles("1h"), field)[0]
    assert memo.take_counts() == (1, 2)


def test_a_function_made_anew_in_each_call_is_never_mistaken_for_the_last_one(store, memo):
    view = RowView(store, 0, "S0USDT", memo)
    for offset in range(50):
        assert (
            view.remember("5m", lambda candles, o=offset: newest(candles) - o)
            == newest(view.candles("5m")) - offset
        )
    assert memo.take_counts() == (0, 50)
    assert len(memo._known) == MAX_FUNCTIONS


def test_a_symbol_that_takes_over_a_row_finds_nothing_of_the_one_before(store, memo):
    RowView(store, 0, "S0USDT", memo).remember("15m", newest)
    store.remove_symbol("S0USDT")
    assert store.add_symbol("NEWUSDT") == 0
    for timeframe in TIMEFRAMES:
        store.append(0, timeframe, candles_of(random.Random(9), timeframe, KEPT))
    view = RowView(store, 0, "NEWUSDT", memo)
    assert view.remember("15m", newest) == newest(view.candles("15m"))
    assert memo.take_counts() == (0, 2)


def test_an_exception_is_the_callers_and_is_not_remembered(store, memo):
    view = RowView(store, 0, "S0USDT", memo)
    luck = []

    def compute(candles: Candles) -> float:
        if not luck:
            raise ZeroDivisionError("no such luck")
        return 1.0

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="no such luck"):
            view.remember("5m", compute)
    luck.append(True)
    assert view.remember("5m", compute) == 1.0
    with pytest.raises(KeyError):
        view.remember("4h", compute)


class Loose(msgspec.Struct):
    value: float


class Firm(msgspec.Struct, frozen=True):
    value: tuple[float, ...]


@pytest.mark.parametrize("remembering", [True, False])
@pytest.mark.parametrize(
    "result",
    [[1.0], {"a": 1.0}, np.zeros(2), np.float32(1.0), Loose(1.0), (1.0, [2.0]), object(), Firm([1.0])],
)
def test_what_may_change_or_is_no_plain_data_is_refused_with_reuse_and_without(
    store, memo, result, remembering
):
    view = RowView(store, 0, "S0USDT", memo if remembering else None)
    with pytest.raises(StrategyBroke, match="not immutable data"):
        view.remember("5m", lambda candles: result)
    with pytest.raises(StrategyBroke, match="not immutable data"):
        view.remember("5m", lambda candles, argument: 1.0, result)


@pytest.mark.parametrize("result", [None, 1, 2.5, "x", True, (1.0, ("y", None)), Firm((1.0, 2.0))])
def test_plain_data_that_cannot_change_is_remembered(store, memo, result):
    view = RowView(store, 0, "S0USDT", memo)
    compute = lambda candles: result  # noqa: E731
    assert view.remember("5m", compute) is view.remember("5m", compute) is result
    assert memo.take_counts() == (1, 1)
    assert MarketView("S0USDT", 0, lambda timeframe: None).remember("5m", compute) is result


def test_a_result_too_large_to_keep_is_computed_each_time(store, memo):
    view = RowView(store, 0, "S0USDT", memo)
    for size, counts in ((MAX_REMEMBERED_BYTES - 64, (1, 1)), (MAX_REMEMBERED_BYTES, (0, 2))):
        large = "x" * size
        compute = lambda candles, large=large: large  # noqa: E731
        assert [view.remember("5m", compute) for _ in range(2)] == [large] * 2
        assert memo.take_counts() == counts


STRATEGY = """
class Mine:
    name, timeframes, candles = "mine", ("5m",), 2
    writes = None

    def __init__(self, options):
        pass

    def analyse(self, view):
        view.remember("15m", self.newest)

    def newest(self, candles):
        if Mine.writes:
            Mine.writes.pop()()
        return candles.close.item(-1)
"""


def test_what_was_computed_while_the_row_was_written_is_forgotten(store, tmp_path):
    """A row that changes while it is read: version and candles may not belong together."""
    (tmp_path / "mine.py").write_text(STRATEGY)
    task = Task(str(store.path), StrategySettings(name=f"{tmp_path / 'mine.py'}:Mine"), False)
    try:
        analyse_batch(task, [])
        prepared = worker._prepared
        rng = random.Random(2)
        type(prepared.strategy).writes = [lambda: close_one(store, 0, "5m", rng)]
        analyse_batch(task, [(0, "S0USDT")])
        assert prepared.memo.take_counts() == (0, 0)  # they went out with the batch
        answer = msgspec.msgpack.decode(analyse_batch(task, [(0, "S0USDT")]))
        assert answer[1:] == [1, 0]
        type(prepared.strategy).writes = [lambda: close_one(store, 1, "5m", rng)]
        answer = msgspec.msgpack.decode(analyse_batch(task, [(1, "S1USDT")]))
        assert answer[1:] == [0, 2], "the first result was taken although its row changed meanwhile"
    finally:
        forget()


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["close 5m", "close 15m", "close 1h", "correct", "replace", "clear", "move"]),
        st.integers(0, 5),
        st.sampled_from(TIMEFRAMES),
        st.integers(1, KEPT),
    ),
    max_size=12,
)


def apply(store, rng, what, row, timeframe, age):
    """One thing that happens to a series in the daemon."""
    if what.startswith("close"):
        close_one(store, row, what.split()[1], rng)
    elif what == "correct":
        at, open_, high, low, close, volume = store.rows_since(row, timeframe, 0)[-age]
        store.append(row, timeframe, [(at, open_, high * 1.03, low * 0.97, close * 1.02, volume + 1.0)])
    elif what == "replace":
        store.replace(row, timeframe, candles_of(rng, timeframe, KEPT))
    else:
        symbol = store.symbol_of(row)
        if what == "clear":
            store.clear(row)
        else:
            store.remove_symbol(symbol)
            assert store.add_symbol(symbol) == row
        for each in TIMEFRAMES:
            store.append(row, each, candles_of(rng, each, KEPT))


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES, seed=st.integers(0, 1_000))
def test_the_founding_strategy_says_the_same_bytes_with_reuse_and_without(tmp_path_factory, changes, seed):
    path = tmp_path_factory.mktemp("market") / "candles.mmap"
    store = CandleStore.open(path, symbols_capacity=6, candles=KEPT)
    rng = random.Random(seed)
    for number in range(6):
        row = store.add_symbol(f"S{number}USDT")
        for timeframe in TIMEFRAMES:
            store.append(row, timeframe, candles_of(rng, timeframe, KEPT))
    memo, kept, fresh = SeriesMemo(), IctSmc({}), IctSmc({})
    try:
        for change in [None, *changes]:
            if change is not None:
                apply(store, rng, *change)
            for row, symbol in store.symbols():
                view = RowView(store, row, symbol, memo)
                plain = RowView(store, row, symbol)
                assert msgspec.json.encode(
                    checked_signal("x", view, kept.analyse(view))
                ) == msgspec.json.encode(checked_signal("x", plain, fresh.analyse(plain)))
        reused, computed = memo.take_counts()
        assert reused >= 8 * len(changes)
        assert computed <= 3 * 6 + 3 * len(changes)
    finally:
        store.close()
