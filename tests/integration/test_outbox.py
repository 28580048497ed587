"""What the store has reaches the archive, though the process dies in between."""

import asyncio
from pathlib import Path

import pytest

from service.errors import DataDirectoryUnusable
from service.records import OrderPurpose, Record
from service.store.sqlite import open_sqlite
from service.trading.outbox import Outbox
from tests.integration.test_store_contract import POSITION, changed
from tests.integration.trading_desk import Venue, desk_at, opened, quiet
from tests.recorder import Kept, Recorder


class Hanging(Kept):
    """An archive that takes nothing: its process dies before it does."""

    async def put(self, stream: str, record: Record) -> None:
        await asyncio.sleep(3600)


async def trade(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Record]]:
    """A trade from entry to stop whose records never leave the queue; what they were."""
    told: list[tuple[str, Record]] = []
    put = Outbox.put

    def tell(self, stream, record):
        told.append((stream, record))
        put(self, stream, record)

    with monkeypatch.context() as patch:
        patch.setattr("tests.integration.trading_desk.Kept", Hanging)
        patch.setattr("service.trading.outbox.OUTBOX_LIMIT_S", 0.01)
        patch.setattr(Outbox, "put", tell)
        venue = Venue()
        async with desk_at(path, venue) as desk:
            await opened(desk)
            venue.trigger(OrderPurpose.STOP, "99")
            await quiet(desk)
            [closed] = await desk.store.closed_positions(10)
            assert closed.close_reason == "stop"
    return told


def final(records: list[tuple[str, Record]]) -> set[str]:
    """Those that the archive must have: all but positions on their way."""
    return {
        f"{stream} {record}"
        for stream, record in records
        if stream in ("fills", "adjustments", "orders") or (stream == "positions" and record.closed_ms)
    }


def states(records: list[tuple[str, Record]], client_order_id: str) -> list[str]:
    return [r.status for s, r in records if s == "orders" and r.client_order_id == client_order_id]


async def test_records_that_a_crash_took_from_the_queue_are_archived_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = await trade(tmp_path, monkeypatch)
    # entry, stop and target as intended, open and ended, the stop as triggered, two fills, a closed position
    assert len(final(told)) >= 13
    async with desk_at(tmp_path, Venue()) as desk:
        await desk.executor._outbox.written()
        put = desk.archive.records
        assert final(told) <= final(put)
        names = [str(record) for _, record in put]
        assert len(names) == len(set(names))
        for name in {record.client_order_id for stream, record in told if stream == "orders"}:
            assert states(put, name) == states(told, name), "in the order in which they came"
        assert [await desk.store.unarchived(stream) for stream in ("fills", "orders", "positions")] == [
            []
        ] * 3
    async with desk_at(tmp_path, Venue()) as desk:
        assert final(desk.archive.records) == set()


async def test_a_position_told_again_while_it_waits_is_not_forgotten_with_its_older_state(tmp_path: Path):
    closed = changed(POSITION, closed_ms=9)
    funded = changed(closed, funding=closed.fees + 1)
    async with open_sqlite(tmp_path / "s") as store:
        await store.save_position(closed)
        await store.save_position(funded)
        await store.archived([("positions", closed)])
        assert await store.unarchived("positions") == [funded]
        await store.archived([("positions", funded)])
        assert await store.unarchived("positions") == []


async def test_what_the_store_was_not_told_it_is_told_at_the_end(tmp_path: Path, monkeypatch):
    async with open_sqlite(tmp_path / "s") as store:
        outbox = Outbox(Kept(), Recorder(), store)
        run = asyncio.create_task(outbox.run())
        closed = changed(POSITION, closed_ms=9)
        await store.save_position(closed)
        with monkeypatch.context() as away:

            async def full(records):
                raise DataDirectoryUnusable("full")

            away.setattr(store, "archived", full)
            outbox.put("positions", closed)
            await outbox.close()
        assert await store.unarchived("positions") == [closed]
        await outbox.close()
        assert await store.unarchived("positions") == []
        run.cancel()


async def test_a_record_that_the_store_took_late_is_archived_once(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        archive = Kept()
        outbox = Outbox(archive, Recorder(), store)
        run = asyncio.create_task(outbox.run())
        closed = changed(POSITION, closed_ms=9)
        outbox.put("positions", closed)
        await outbox.close()
        await store.save_position(closed)
        outbox.kept_late("positions", closed)
        await outbox.close()
        assert await store.unarchived("positions") == []
        assert archive.of("positions") == [closed]
        run.cancel()


async def test_a_store_that_cannot_be_told_is_told_with_the_next_record(tmp_path: Path, monkeypatch):
    async with open_sqlite(tmp_path / "s") as store:
        archive = Kept()
        outbox = Outbox(archive, Recorder(), store)
        run = asyncio.create_task(outbox.run())
        real = store.archived

        async def full(records):
            raise DataDirectoryUnusable("full")

        first, second = (changed(POSITION, position_id=name, closed_ms=9) for name in "ab")
        await store.save_position(first)
        await store.save_position(second)
        monkeypatch.setattr(store, "archived", full)
        outbox.put("positions", first)
        await outbox.close()
        monkeypatch.setattr(store, "archived", real)
        outbox.put("positions", second)
        await outbox.close()
        run.cancel()
        assert await store.unarchived("positions") == []
        assert archive.of("positions") == [first, second]


class Busy:
    """A store that has always more to do: while it is told of some records, a hundred more come."""

    def __init__(self) -> None:
        self.outbox: Outbox
        self.put = self.told = self.most = 0
        self.done = asyncio.Event()

    async def archived(self, records: list[tuple[str, Record]]) -> None:
        self.told += len(records)
        self.most = max(self.most, self.put - self.told)
        if self.put >= 20_000:
            self.done.set()
            return
        for _ in range(100):
            self.outbox.put("positions", POSITION)
        self.put += 100
        await self.outbox.written()


async def test_what_a_busy_store_was_not_told_yet_does_not_gather():
    store = Busy()
    store.outbox = outbox = Outbox(Kept(), Recorder(), store)
    run = asyncio.create_task(outbox.run())
    outbox.put("positions", POSITION)
    await store.done.wait()
    run.cancel()
    await asyncio.wait({run})
    assert store.most < 1_000
