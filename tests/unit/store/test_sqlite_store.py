import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import DataDirectoryUnusable, SchemaUnknown, StateDamaged
from service.store.schema import SQLITE
from service.store.sqlite import open_sqlite


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
