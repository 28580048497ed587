from pathlib import Path

import pytest

from service.records import PositionSide, Record
from service.store.sqlite import open_sqlite
from service.trading.shadow import CANDLE_MS, HOUR_MS, ShadowBook
from tests.recorder import Kept, Recorder
from tests.samples import signal

LONG, SHORT = PositionSide.LONG, PositionSide.SHORT


class Cut(Exception):
    pass


def candle(n: int, open_: float, high: float, low: float, close: float):
    return (n * CANDLE_MS, open_, high, low, close, 1.0)


def book(store, archive=None, most: int = 100) -> tuple[ShadowBook, Recorder]:
    counts = Recorder()
    made = ShadowBook(store, archive or Kept(), counts, fee_fraction=0.0, life_hours=96, max_shadows=most)
    return made, counts


async def test_a_book_follows_closes_archives_and_survives_a_restart(tmp_path: Path):
    archive = Kept()
    async with open_sqlite(tmp_path / "s") as store:
        first, _ = book(store, archive)
        for name, side in (("a", LONG), ("b", SHORT)):
            assert first.open(signal(name, side=side)) is not None
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
        assert closed[0].favourable_excursion == pytest.approx(2.0)  # it ended at the target
        assert (second.open_count, second.symbols()) == (0, frozenset())


async def test_a_full_book_counts_what_it_does_not_take(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        made, counts = book(store, most=2)
        opened = [made.open(signal(str(n))) for n in range(3)]
    assert [shadow is not None for shadow in opened] == [True, True, False]
    assert counts.counts == {"shadows.refused": 1}


async def test_old_shadows_of_a_symbol_that_has_no_candles_any_more_end_without_an_outcome(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store)
        made.open(signal())
        assert made.expire(96 * HOUR_MS, ["AUSDT"]) == []
        assert made.expire(97 * HOUR_MS, ["BUSDT"]) == []
        assert [s.close_reason for s in made.expire(97 * HOUR_MS, ["AUSDT"])] == ["no_candles"]
        assert made.open_count == 0


async def test_a_candle_that_cannot_tell_is_asked_for_once_and_decided_when_it_comes_again(tmp_path: Path):
    both = candle(0, 100, 102.5, 98.5, 101)
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store)
        made.open(signal("a"))
        made.open(signal("b"))
        assert made.update("AUSDT", [both]) == []
        assert made.take_undecided() == [("AUSDT", 0)]
        assert made.take_undecided() == []
        minutes = [(0, 100.0, 102.5, 99.5, 102.0, 1.0)]
        closed = made.update("AUSDT", [both], finer={0: minutes})
    assert [(s.signal_id, s.close_reason) for s in closed] == [("a", "target"), ("b", "target")]


async def test_the_twin_of_a_real_position_says_so(tmp_path: Path):
    archive = Kept()
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store, archive)
        made.open(signal("a"), traded=True)
        made.update("AUSDT", [candle(0, 100, 102.5, 99.5, 101)])
        await made.flush()
    assert [record.traded for _, record in archive.records] == [True]


@pytest.mark.parametrize("taken", [0, 1])
async def test_an_outcome_that_a_crash_kept_from_the_archive_gets_there_at_the_next_start(
    tmp_path: Path, taken: int
):
    class Dying(Kept):
        async def put(self, stream: str, record: Record) -> None:
            if len(self.records) == taken:
                raise Cut
            await super().put(stream, record)

    before, after, later = Dying(), Kept(), Kept()
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store, before)
        for name in "ab":
            made.open(signal(name))
        made.update("AUSDT", [candle(0, 100, 102.5, 99.5, 101)])
        with pytest.raises(Cut):
            await made.flush()
    for archive in (after, later):
        async with open_sqlite(tmp_path / "s") as store:
            made, _ = book(store, archive)
            await made.restore()
            await made.flush()
    assert [r.signal_id for _, r in before.records + after.records] == ["a", "b"]
    assert later.records == []


async def test_an_outcome_that_the_archive_refused_is_put_at_the_next_flush(tmp_path: Path):
    class Refusing(Kept):
        refusing = True

        async def put(self, stream: str, record: Record) -> None:
            if self.refusing:
                raise Cut
            await super().put(stream, record)

    archive = Refusing()
    async with open_sqlite(tmp_path / "s") as store:
        made, _ = book(store, archive)
        made.open(signal("a"))
        made.update("AUSDT", [candle(0, 100, 102.5, 99.5, 101)])
        with pytest.raises(Cut):
            await made.flush()
        archive.refusing = False
        await made.flush()
        await made.flush()
        assert await store.unarchived("shadow_outcomes") == []
    assert [r.signal_id for _, r in archive.records] == ["a"]
