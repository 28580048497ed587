"""Real candle files beside real books, on SQLite and PostgreSQL: which are believed and which set aside."""

import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.market import candle_file
from service.market import candles as candles_module
from service.market.candle_file import KEPT, opened_candles
from service.market.candles import FILE_NAME, read_header
from service.ports import StateStore
from service.settings import load
from tests.integration.test_store_contract import Books
from tests.integration.trading_desk import full_disk
from tests.market_seeds import MARKET_SEEDS

STEP_MS = 300_000
SERIES = [(n * STEP_MS, 1.0, 2.0, 0.5, 1.5, 10.0) for n in range(1, 9)]


@pytest.fixture(params=["sqlite", "postgres"])
def books(request, tmp_path) -> Books:
    environment = {"PERPD_SIM__SEED": str(next(MARKET_SEEDS))}
    if request.param == "postgres":
        environment["DATABASE_URL"] = request.getfixturevalue("postgres").url
    return Books(load(None, environment), tmp_path)


async def run(directory, store: StateStore, symbol: str = "AUSDT") -> int:
    """One run on the candles there, which adds a symbol; how many candles it found."""
    async with opened_candles(directory / FILE_NAME, store, symbols_capacity=5, candles=120) as candles:
        found = sum(candles.count(row, "5m") for row, _ in candles.symbols())
        candles.append(candles.add_symbol(symbol), "5m", SERIES)
    return found


def aside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(f"{FILE_NAME}.bad-*"))


async def test_the_file_of_the_last_run_is_believed_and_its_header_is_kept(books, tmp_path):
    async with books.open() as store:
        with capture_logs() as lines:
            assert await run(tmp_path, store) == 0, "the first start: there is no file and nothing is known"
        assert candle_file.decoded(await store.get_value(KEPT)) == read_header(tmp_path / FILE_NAME)
    async with books.open() as store:
        with capture_logs() as more:
            assert await run(tmp_path, store, "BUSDT") == 8
            assert await run(tmp_path, store) == 16
    assert lines + more == []
    assert aside(tmp_path) == []


async def test_after_a_run_that_did_not_end_in_order_the_file_is_believed(books, tmp_path, monkeypatch):
    async with books.open() as store:
        with monkeypatch.context() as full:
            full.setattr(candle_file, "_note", lambda store, header: killed())
            assert await run(tmp_path, store) == 0
        assert await run(tmp_path, store, "BUSDT") == 8


async def killed() -> None:
    """As after a kill: what the start wrote is all that the books know."""


async def test_a_store_that_takes_nothing_at_the_end_does_not_fail_the_run(books, tmp_path, monkeypatch):
    async with books.open() as store:
        async with opened_candles(tmp_path / FILE_NAME, store, symbols_capacity=5, candles=120) as candles:
            candles.append(candles.add_symbol("AUSDT"), "5m", SERIES)
            monkeypatch.setattr(store, "set_value", full_disk)
        monkeypatch.undo()
        assert await run(tmp_path, store) == 8


async def test_an_older_copy_put_back_is_set_aside(books, tmp_path):
    async with books.open() as store:
        await run(tmp_path, store)
        shutil.copy(tmp_path / FILE_NAME, tmp_path / "copy")
        await run(tmp_path, store, "BUSDT")
        shutil.copy(tmp_path / "copy", tmp_path / FILE_NAME)
        with capture_logs() as lines:
            assert await run(tmp_path, store) == 0
        assert [line["event"] for line in lines] == ["candle file set aside"]
        assert "an older copy" in lines[0]["reason"]
        assert aside(tmp_path) == [f"{FILE_NAME}.bad-1"]
        assert await run(tmp_path, store) == 8, "the file made in its place is the books' own"


async def test_the_file_of_another_market_is_set_aside(books, tmp_path):
    async with books.open() as store:
        await run(tmp_path, store)
        known = await store.get_value(KEPT)
        (tmp_path / "other").mkdir()
        await run(tmp_path / "other", store, "ZUSDT")  # same sizes, same boot, same generation
        await store.set_value(KEPT, known)
        shutil.copy(tmp_path / "other" / FILE_NAME, tmp_path / FILE_NAME)
        with capture_logs() as lines:
            assert await run(tmp_path, store) == 0
        assert "another one" in lines[0]["reason"]


async def test_a_file_that_was_used_on_another_machine_is_set_aside(books, tmp_path, monkeypatch):
    async with books.open() as store:
        await run(tmp_path, store)
        known = await store.get_value(KEPT)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(candles_module, "boot_id", lambda: "elsewhere")
            elsewhere.setattr(candle_file, "boot_id", lambda: "elsewhere")
            await run(tmp_path, store, "BUSDT")
        await store.set_value(KEPT, known)
        with capture_logs() as lines:
            assert await run(tmp_path, store) == 0
        assert "used on another machine" in lines[0]["reason"]


async def test_a_file_that_is_gone_or_of_other_sizes_is_made_anew_and_known(books, tmp_path):
    async with books.open() as store:
        await run(tmp_path, store)
        (tmp_path / FILE_NAME).unlink()
        with capture_logs() as lines:
            assert await run(tmp_path, store) == 0
        assert lines == []
        for found in (0, 1):
            async with opened_candles(
                tmp_path / FILE_NAME, store, symbols_capacity=9, candles=120
            ) as candles:
                assert len(candles.symbols()) == found
                candles.add_symbol("AUSDT")


async def test_a_value_that_cannot_be_read_is_no_reason_to_fetch_again(books, tmp_path):
    async with books.open() as store:
        await run(tmp_path, store)
        await store.set_value(KEPT, "{}")
        assert await run(tmp_path, store) == 8
