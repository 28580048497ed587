import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.errors import DataDirectoryUnusable, SchemaUnknown, StateDamaged
from service.store import wal
from service.store.schema import SQLITE
from service.store.sqlite import connect, open_sqlite


async def test_a_newer_schema_is_refused(tmp_path: Path):
    async with open_sqlite(tmp_path / "s"):
        pass
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        db.execute(f"pragma user_version = {len(SQLITE) + 1}")
    with pytest.raises(SchemaUnknown, match="newer perpd"):
        async with open_sqlite(tmp_path / "s"):
            pass


@pytest.mark.parametrize("content", [b"this is no database" * 500, b"SQLite format 3\x00" + b"\x07" * 9000])
async def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(StateDamaged) as told:
        async with open_sqlite(tmp_path / "s"):
            pass
    assert "perpd store restore FILE" in told.value.advice
    assert (tmp_path / "s").read_bytes() == content, "a damaged file is left as it is"


async def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(DataDirectoryUnusable, match="cannot be opened"):
        async with open_sqlite(tmp_path / "missing" / "s"):
            pass


async def test_a_full_disk_is_named_and_the_store_goes_on_once_there_is_room(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        await store._run(lambda db: db.execute("pragma max_page_count = 40").fetchall())
        with pytest.raises(DataDirectoryUnusable, match="full"):
            await store.set_value("large", "x" * 1_000_000)
        await store._run(lambda db: db.execute("pragma max_page_count = 10000").fetchall())
        await store.set_value("k", "x" * 1_000)
        assert await store.get_value("k") == "x" * 1_000


async def test_it_is_durable_and_in_write_ahead_mode(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        found = await store._run(
            lambda db: [db.execute(f"pragma {p}").fetchone()[0] for p in ("journal_mode", "synchronous")]
        )
    assert found == ["wal", 2]


async def test_the_log_is_long_before_the_first_call_and_nothing_of_the_filling_is_kept(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        length = (tmp_path / "s-wal").stat().st_size
        assert length >= wal.LENGTH_BYTES
        await store.set_value("k", "x" * 100_000)
        assert (tmp_path / "s-wal").stat().st_size == length, "written over, not added to"
        assert await store._read("select name from settings") == [("k",)]
    assert (tmp_path / "s").stat().st_size < wal.LENGTH_BYTES


def test_a_disk_without_room_for_a_long_log_is_no_reason_not_to_start(tmp_path: Path):
    with closing(connect(tmp_path / "s")) as db:
        db.execute("pragma max_page_count = 60")
        wal.lengthen(db, tmp_path / "s")
        assert not db.in_transaction
        assert (tmp_path / "s-wal").stat().st_size == 0, "the room is given back"
        db.execute("insert into settings values ('k', 'v')")


def test_a_disk_with_little_room_keeps_it_for_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wal, "ROOM_BYTES", 1 << 60)
    with closing(connect(tmp_path / "s")) as db:
        before = (tmp_path / "s-wal").stat().st_size
        wal.lengthen(db, tmp_path / "s")
        assert (tmp_path / "s-wal").stat().st_size == before


def test_a_folded_log_begins_anew_with_the_next_commit_and_loses_nothing(tmp_path: Path):
    with closing(connect(tmp_path / "s")) as db:
        wal.lengthen(db, tmp_path / "s")
        length = (tmp_path / "s-wal").stat().st_size
        for round_ in range(40):
            db.execute("insert or replace into settings values ('k', ?)", (f"{round_}" * 200_000,))
            wal.fold(db)
        assert (tmp_path / "s-wal").stat().st_size == length, "what is folded is written over"
        (tmp_path / "s-wal").rename(tmp_path / "away")  # as the file stands without its log
        with closing(sqlite3.connect(f"file:{tmp_path / 's'}?immutable=1", uri=True)) as file:
            assert file.execute("select value from settings").fetchone() == ("39" * 200_000,)


def test_a_log_that_cannot_be_folded_is_told_and_stays(tmp_path: Path):
    with closing(connect(tmp_path / "s")) as db:
        db.execute("insert into settings values ('k', 'v')")
        db.execute("begin immediate")
        with capture_logs() as said:
            wal.fold(db)
        db.execute("rollback")
        assert [entry["log_level"] for entry in said] == ["warning"]
        assert db.execute("select value from settings").fetchone() == ("v",)
