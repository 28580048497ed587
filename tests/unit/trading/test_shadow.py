from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import PositionSide, Record, Signal
from service.store.sqlite import open_sqlite
from service.trading.shadow import CANDLE_MS, HOUR_MS, ShadowBook, advance, shadow_of

LONG, SHORT = PositionSide.LONG, PositionSide.SHORT


class Counts:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def record(self, operation: str, seconds: float) -> None: ...

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


class Kept:
    writable = True

    def __init__(self) -> None:
        self.records: list[tuple[str, Record]] = []

    async def put(self, stream: str, record: Record) -> None:
        self.records.append((stream, record))


def signal(name: str = "s1", side: PositionSide = LONG, symbol: str = "AUSDT") -> Signal:
    return Signal(
        signal_id=name,
        strategy="s",
        symbol=symbol,
        position_side=side,
        candle_close_ms=0,
        entry=100.0,
        stop=100.0 - side.sign,
        target=100.0 + 2 * side.sign,
        atr=0.5,
        confidence=0.6,
        scores={},
        features={},
    )


def candle(n: int, open_: float, high: float, low: float, close: float):
    return (n * CANDLE_MS, open_, high, low, close, 1.0)


def ended(side: PositionSide, *candles, fee: float = 0.0, life_h: float = 96):
    return advance(shadow_of(signal(side=side)), candles, fee_fraction=fee, life_ms=int(life_h * HOUR_MS))


@pytest.mark.parametrize(
    ("side", "rows", "price", "reason", "result"),
    [
        (LONG, [(100, 102.5, 99.5, 101)], 102.0, "target", 2.0),
        (LONG, [(100, 100.5, 98.5, 99)], 99.0, "stop", -1.0),
        (LONG, [(100, 102.5, 98.5, 101)], 99.0, "stop", -1.0),  # both: the stop came first
        (LONG, [(100, 101, 99.5, 100), (97, 98, 96, 97)], 97.0, "stop", -3.0),  # gap: at the open
        (LONG, [(100, 101, 99.5, 100), (105, 106, 104, 105)], 102.0, "target", 2.0),
        (SHORT, [(100, 100.5, 97.5, 99)], 98.0, "target", 2.0),
        (SHORT, [(100, 101.5, 97.5, 99)], 101.0, "stop", -1.0),
        (SHORT, [(100, 100.5, 99.5, 100), (103, 104, 102, 103)], 103.0, "stop", -3.0),
    ],
)
def test_a_shadow_ends_as_the_assumptions_say(side, rows, price, reason, result):
    shadow = ended(side, *(candle(n, *row) for n, row in enumerate(rows)))
    assert (shadow.exit_price, shadow.close_reason) == (price, reason)
    assert shadow.outcome_r == pytest.approx(result)
    assert shadow.closed_ms == len(rows) * CANDLE_MS


def test_it_expires_at_the_close_of_the_candle_that_ends_its_life():
    quiet = [candle(n, 100, 100.5, 99.5, 100.4) for n in range(20)]
    shadow = ended(LONG, *quiet, life_h=1)
    assert (shadow.close_reason, shadow.exit_price) == ("expired", 100.4)
    assert shadow.closed_ms == HOUR_MS


def test_fees_are_paid_on_both_sides():
    shadow = ended(LONG, candle(0, 100, 102.5, 99.5, 101), fee=0.001)
    assert shadow.outcome_r == pytest.approx(2 - 0.202)
    assert shadow.pnl_fraction == pytest.approx((2 - 0.202) / 100)


def test_excursions_are_kept_in_r():
    shadow = ended(LONG, candle(0, 100, 101.5, 99.2, 100), candle(1, 100, 100.1, 99.9, 100))
    assert shadow.favourable_excursion == pytest.approx(1.5)
    assert shadow.adverse_excursion == pytest.approx(0.8)
    assert shadow.closed_ms == 0


def test_candles_that_were_seen_or_are_older_than_the_signal_do_not_count():
    shadow = ended(LONG, candle(-1, 100, 103, 90, 100), candle(0, 100, 100.5, 99.5, 100))
    again = advance(shadow, [candle(0, 100, 103, 90, 100)], fee_fraction=0.0, life_ms=HOUR_MS)
    assert again is shadow


prices = st.floats(95, 105)


@given(st.lists(st.tuples(prices, prices, prices), min_size=1, max_size=12), st.integers(0, 12))
def test_outcomes_do_not_depend_on_how_candles_are_delivered_nor_on_the_mirror(rows, cut):
    candles = [candle(n, o, max(o, a, b), min(o, a, b), a) for n, (o, a, b) in enumerate(rows)]
    whole = ended(LONG, *candles)
    parts = advance(
        advance(shadow_of(signal()), candles[:cut], fee_fraction=0.0, life_ms=96 * HOUR_MS),
        candles[cut:] if not ended(LONG, *candles[:cut]).closed_ms else [],
        fee_fraction=0.0,
        life_ms=96 * HOUR_MS,
    )
    assert parts == whole
    mirrored = [(t, 200 - o, 200 - lo, 200 - hi, 200 - c, v) for t, o, hi, lo, c, v in candles]
    other = ended(SHORT, *mirrored)
    assert other.close_reason == whole.close_reason
    assert other.outcome_r == pytest.approx(whole.outcome_r, abs=1e-9)


def book(store, archive=None, most: int = 100) -> tuple[ShadowBook, Counts]:
    counts = Counts()
    made = ShadowBook(store, archive or Kept(), counts, fee_fraction=0.0, life_hours=96, max_shadows=most)
    return made, counts


async def test_a_book_follows_closes_archives_and_survives_a_restart(tmp_path: Path):
    archive = Kept()
    async with open_sqlite(tmp_path / "s") as store:
        first, _ = book(store, archive)
        for name, side in (("a", LONG), ("b", SHORT)):
            assert first.open(signal(name, side)) is not None
        assert first.open(signal("a")) is None
        closed = first.update("AUSDT", [candle(0, 100, 101.5, 99.5, 101)])
        assert [s.signal_id for s in closed] == ["b"]
        await first.flush()
        assert [(stream, r.signal_id) for stream, r in archive.records] == [("shadow_outcomes", "b")]
    async with open_sqlite(tmp_path / "s") as store:
        second, _ = book(store)
        await second.restore()
        assert (second.open_count, second.checked_ms("AUSDT")) == (1, CANDLE_MS)
        closed = second.update("AUSDT", [candle(1, 101, 103, 100, 103)])
        assert [(s.signal_id, s.close_reason) for s in closed] == [("a", "target")]
        assert closed[0].favourable_excursion == pytest.approx(3.0)
        assert (second.open_count, second.symbols()) == (0, frozenset())


async def test_a_full_book_counts_what_it_does_not_take(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        made, counts = book(store, most=2)
        opened = [made.open(signal(str(n))) for n in range(3)]
    assert [shadow is not None for shadow in opened] == [True, True, False]
    assert counts.counts == {"shadows.refused": 1}


async def test_a_symbol_without_candles_expires_all_the_same(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store)
        made.open(signal())
        assert made.expire(96 * HOUR_MS) == []
        assert [s.close_reason for s in made.expire(97 * HOUR_MS)] == ["expired"]
        assert made.open_count == 0
