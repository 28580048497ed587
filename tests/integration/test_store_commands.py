"""`perpd store` as a process: what it copies, keeps and refuses, on files and on a real PostgreSQL."""

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.directory import claim, data_directory
from service.errors import DataDirectoryUnusable, LeaseLost, StateDamaged
from service.records import Fill, ShadowPosition, Side
from service.records import PositionSide as Direction
from service.settings import Loaded, load
from service.store.backup import reading
from service.store.command import _fill, _place, _replace
from service.store.opening import STATE_FILE, open_links, open_state
from service.store.postgres import migrate
from service.store.schema import POSTGRES, SQLITE, TABLES
from service.store.sqlite import connect
from service.store.tables import BATCH_ROWS, SqliteTables, copy, digest
from tests.market_seeds import MARKET_SEEDS
from tests.samples import POSITION

ROOT = Path(__file__).resolve().parents[2]
TEXT = 'line\n\t"quoted" \\ 币'


STOPPED = msgspec.structs.replace(
    POSITION,
    position_id="stopped",
    symbol="币安人生USDT",
    quantity=Decimal(0),
    closed_ms=2,
    close_reason="stop",
)


class Command:
    """`perpd store` in a directory, with the books of a market of its own in `data`."""

    def __init__(self, directory: Path, url: str = "") -> None:
        self.directory = directory
        self.data = directory / "data"
        self.url = url
        self.seed = str(next(MARKET_SEEDS))

    def loaded(self, *, database: bool = False) -> Loaded:
        environment = {"PERPD_SIM__SEED": self.seed, "PERPD_RUN__DATA_DIR": str(self.data)}
        return load(None, {**environment, "DATABASE_URL": self.url if database else ""})

    def __call__(self, *arguments: str, database: bool = False, typed: str = "") -> tuple[int, Any]:
        """(exit code, what it printed as JSON)."""
        done = subprocess.run(
            [sys.executable, "-m", "service", "store", *arguments, "--json", "--data-dir", "data"],
            cwd=self.directory,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "DATABASE_URL": self.url if database else "",
                "PERPD_RUN__DATABASE_WAIT_S": "1",
            },
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == "", done.stderr
        assert not self.url or self.url.split(":")[2].split("@")[0] not in done.stdout, (
            "the password was told"
        )
        [answer] = done.stdout.splitlines()
        return done.returncode, json.loads(answer)


async def fill_books(loaded: Loaded, rows: int = 30) -> None:
    directory = Path(loaded.settings.run.data_dir)
    with data_directory(loaded.settings):
        claim(loaded.settings, directory)
        async with open_state(loaded, directory) as state:
            for number in range(rows):
                fill = Fill(
                    trade_id=str(number),
                    client_order_id=f"web_{number}",
                    venue_order_id="9",
                    symbol="币安人生USDT" if number % 2 else "AUSDT",
                    side=Side.BUY,
                    price=Decimal("1E+2"),
                    quantity=Decimal("0.10"),
                    fee=Decimal("1E-8"),
                    fee_asset="USDT",
                    realised_pnl=Decimal(0),
                    maker=False,
                    filled_ms=number,
                )
                amounts = {"realised_pnl": Decimal("0.10"), "fee": Decimal("1E-8")}
                await state.store.save_fill(fill, **amounts, quantity=Decimal("1E+1"), cost=Decimal("0E-8"))
            shadow = ShadowPosition(
                position_id="Z",
                signal_id="s",
                symbol="quote'\"\\",
                position_side=Direction.LONG,
                entry=1e-17,
                stop=0.1 + 0.2,
                target=1e22,
                opened_ms=1,
                checked_ms=1,
            )
            lower = ShadowPosition(
                **{**{n: getattr(shadow, n) for n in shadow.__struct_fields__}, "position_id": "a"}
            )
            await state.store.save_shadows([lower, shadow])
            await state.store.set_value("text", TEXT)
            await state.store.save_ban("h", 5)
            await state.store.save_position(STOPPED, cooldown_until_ms=7)


def hashes(tables: list[Any]) -> dict[str, tuple[int, str]]:
    return {t["table"]: (t["rows"], t["sha256"]) for t in tables}


async def test_a_copy_to_postgresql_and_back_has_equal_hashes(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    await fill_books(command.loaded())
    code, there = await asyncio.to_thread(command, "copy", "--to", "-", typed=postgres.url + "\n")
    assert code == 0, there
    assert [pair[0] == pair[1] for pair in there["tables"]] == [True] * len(TABLES)
    code, back = await asyncio.to_thread(command, "copy", "--to", "sqlite:back.sqlite3", database=True)
    assert code == 0
    first, last = ([pair[side] for pair in t] for t, side in ((there["tables"], 0), (back["tables"], 1)))
    assert hashes(first) == hashes(last)
    assert hashes(first)["fills"][0] == 30
    assert hashes(first)["holdings"][0] == 2
    assert hashes(first)["cooldowns"][0] == 1

    # the daemon's own reader agrees, and a filled target is never written over
    async with open_state(command.loaded(database=True), tmp_path) as state:
        assert (await state.store.ledger_totals())["fees"] == Decimal("3E-7")
        assert await state.store.get_value("text") == TEXT
        assert await state.store.cooldowns() == {STOPPED.symbol: 7}
    code, refusal = await asyncio.to_thread(command, "copy", "--to", postgres.url)
    assert code == 73
    assert "holds rows already in fills" in refusal["message"]
    code, refusal = await asyncio.to_thread(command, "copy", "--to", "sqlite:back.sqlite3")
    assert code == 73
    assert "exists already" in refusal["message"]


async def test_beside_a_running_daemon_a_backup_is_whole_and_all_else_is_refused(tmp_path):
    command = Command(tmp_path)
    loaded = command.loaded()
    await fill_books(loaded)
    with data_directory(loaded.settings):
        async with open_state(loaded, command.data) as state:
            await state.store.set_value("k", "in the write-ahead log")
            code, backup = await asyncio.to_thread(command, "backup", "--out", "b.sqlite3")
            assert code == 0
            for action in (("migrate",), ("restore", "b.sqlite3"), ("copy", "--to", "sqlite:c.sqlite3")):
                code, refusal = await asyncio.to_thread(command, *action)
                assert code == 73
                assert "held by another perpd" in refusal["message"]
    with closing(sqlite3.connect(tmp_path / "b.sqlite3")) as db:
        assert db.execute("select value from settings where name = 'k'").fetchone() == (
            "in the write-ahead log",
        )
    assert hashes(backup["tables"])["fills"][0] == 30
    assert {path.name for path in tmp_path.iterdir()} == {"b.sqlite3", "data"}


async def test_a_database_that_a_daemon_trades_on_can_be_backed_up_and_nothing_else(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    loaded = command.loaded(database=True)
    await fill_books(loaded)
    async with open_state(loaded, command.data):
        code, _ = await asyncio.to_thread(command, "backup", "--out", "b.sqlite3", database=True)
        assert code == 0
        for action in (("migrate",), ("restore", "b.sqlite3"), ("copy", "--to", "sqlite:c.sqlite3")):
            code, refusal = await asyncio.to_thread(command, *action, database=True)
            assert code == 69
            assert "trades on it" in refusal["message"]


async def test_a_backup_goes_back_into_either_store_and_what_was_there_is_kept(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    await fill_books(command.loaded())
    code, backup = await asyncio.to_thread(command, "backup")
    assert code == 0
    await fill_books(command.loaded(), rows=50)
    code, restored = await asyncio.to_thread(command, "restore", backup["backup"])
    assert code == 0
    assert hashes(restored["tables"]) == hashes(backup["tables"])
    with closing(sqlite3.connect(tmp_path / restored["kept"])) as db:
        assert db.execute("select count(*) from fills").fetchone() == (50,)

    await fill_books(command.loaded(database=True), rows=7)
    code, restored = await asyncio.to_thread(command, "restore", backup["backup"], database=True)
    assert code == 0
    assert hashes(restored["tables"]) == hashes(backup["tables"])
    with closing(sqlite3.connect(tmp_path / restored["kept"])) as db:
        assert db.execute("select count(*) from fills").fetchone() == (7,)


async def test_a_damaged_state_is_refused_as_it_is_and_a_restore_sets_it_aside(tmp_path):
    command = Command(tmp_path)
    loaded = command.loaded()
    await fill_books(loaded, rows=300)
    assert (await asyncio.to_thread(command, "backup", "--out", "b.sqlite3"))[0] == 0
    state = command.data / STATE_FILE
    damaged = bytearray(state.read_bytes())
    damaged[4096 : len(damaged) // 2] = b"\x5a" * (len(damaged) // 2 - 4096)
    state.write_bytes(damaged)
    with pytest.raises(StateDamaged, match="damaged"):
        await fill_books(loaded)
    code, refusal = await asyncio.to_thread(command, "backup", "--out", "no.sqlite3")
    assert (code, (tmp_path / "no.sqlite3").exists()) == (73, False)
    assert "damaged" in refusal["message"]
    assert state.read_bytes() == damaged
    code, restored = await asyncio.to_thread(command, "restore", "b.sqlite3")
    assert code == 0
    assert (tmp_path / restored["kept"]).read_bytes() == damaged
    await fill_books(loaded)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no state here"),
        (b"rubbish" * 2_000, "damaged"),
        ("newer", "knows up to"),
        ("other", "no state"),
    ],
)
async def test_what_is_no_backup_is_refused_and_the_state_stays(tmp_path, content, words):
    command = Command(tmp_path)
    await fill_books(command.loaded())
    before = (command.data / STATE_FILE).read_bytes()
    file = tmp_path / "b.sqlite3"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        with closing(sqlite3.connect(file)) as db:
            db.execute(f"pragma user_version = {len(SQLITE) + 1 if content == 'newer' else 0}")
            db.execute("create table t (n)")
    code, refusal = await asyncio.to_thread(command, "restore", "b.sqlite3")
    assert code == 73
    assert words in refusal["message"]
    assert (command.data / STATE_FILE).read_bytes() == before


async def test_a_file_in_a_directory_that_is_not_there_is_refused_and_none_is_made(tmp_path):
    command = Command(tmp_path)
    await fill_books(command.loaded())
    for action in (("backup", "--out", "no/b.sqlite3"), ("copy", "--to", "sqlite:no/b.sqlite3")):
        code, refusal = await asyncio.to_thread(command, *action)
        assert code == 73
        assert "no/b.sqlite3: there is no directory no" in refusal["message"]
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("", 78, "--to is empty; allowed is postgresql://HOST:PORT/DATABASE or sqlite:FILE"),
        ("sqlite:", 78, "--to names no file; allowed is sqlite:FILE"),
        ("mysql://u:hush@h/d", 78, "--to is no address of a PostgreSQL database"),
        ("postgresql://u:hush@127.0.0.1:9/d", 69, "127.0.0.1:9/d did not answer within 1 s"),
        ("sqlite:data/state.sqlite3", 73, "data/state.sqlite3: exists already; name another file"),
    ],
)
async def test_a_copy_to_a_place_that_cannot_be_is_one_message(tmp_path, url: str, code: int, words: str):
    command = Command(tmp_path)
    await fill_books(command.loaded())
    found, refusal = await asyncio.to_thread(command, "copy", "--to", "-", typed=f"{url}\n")
    assert (found, refusal["exit_code"]) == (code, code)
    assert words in refusal["message"]
    assert "hush" not in str(refusal)
    assert "DATABASE_URL" not in str(refusal)


async def test_a_copy_that_the_database_refuses_says_so_of_its_own_url(postgres, tmp_path):
    command = Command(tmp_path)
    await fill_books(command.loaded())
    password = postgres.url.split(":")[2].split("@")[0]
    for url, words in (
        (postgres.url.replace(password, "wrong"), "password authentication failed"),
        (f"{postgres.url.rpartition('/')[0]}/nowhere", 'database "nowhere" does not exist'),
    ):
        code, refusal = await asyncio.to_thread(command, "copy", "--to", url)
        assert (code, refusal["message"].startswith("--to: ")) == (78, True)
        assert words in refusal["message"]


async def test_a_copy_of_a_database_to_itself_is_refused(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    code, refusal = await asyncio.to_thread(command, "copy", "--to", postgres.url, database=True)
    assert code == 78
    assert "where the state is already" in refusal["message"]


async def test_there_is_nothing_to_copy_from_an_empty_database(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    command.data.mkdir()
    code, refusal = await asyncio.to_thread(command, "copy", "--to", "sqlite:c.sqlite3", database=True)
    assert code == 73
    assert "there is no state in schema" in refusal["message"]
    assert not (tmp_path / "c.sqlite3").exists()


async def test_who_lost_the_lease_replaces_and_fills_nothing(postgres, tmp_path):
    command = Command(tmp_path, postgres.url)
    await fill_books(command.loaded())
    await fill_books(command.loaded(database=True), rows=7)
    place = _place(command.loaded(database=True))
    with reading(command.data / STATE_FILE) as file:
        source = SqliteTables(file, "the file")
        async with open_links(place.url, place.schema, 5.0) as (link, _):
            epoch = await link.alone(lambda db: db.fetchval("select epoch from lease"))
            await link.alone(lambda db: db.execute("update lease set epoch = epoch + 1"))
            for write in (_replace, _fill):
                with pytest.raises(LeaseLost, match="nothing was written"):
                    await link.alone(lambda db, write=write: write(db, source, "the database", epoch))
            assert await link.alone(lambda db: db.fetchval("select count(*) from fills")) == 7
            await link.alone(lambda db: _replace(db, source, "the database", epoch + 1))
            assert await link.alone(lambda db: db.fetchval("select count(*) from fills")) == 30


async def test_a_long_digest_lets_the_lease_be_renewed_meanwhile(tmp_path):
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with closing(connect(tmp_path / "s")) as db:
        names = [(f"k{number}", "v") for number in range(10 * BATCH_ROWS)]
        db.executemany("insert into settings values (?, ?)", names)
        with closing(connect(tmp_path / "t")) as target:
            task = asyncio.create_task(others())
            await digest(SqliteTables(db, "s"))
            assert turns >= 9
            turns = 0
            await copy(SqliteTables(db, "s"), SqliteTables(target, "t"))
            assert turns >= 3 * 9
            task.cancel()


async def keep_a_value_in_schema_before_the_last(loaded: Loaded, monkeypatch) -> None:
    with monkeypatch.context() as older:
        older.setattr("service.store.sqlite.SQLITE", SQLITE[:-1])
        older.setattr(migrate, "__defaults__", (POSTGRES[:-1],))
        with data_directory(loaded.settings) as directory:
            claim(loaded.settings, directory)
            async with open_state(loaded, directory) as state:
                await state.store.set_value("text", TEXT)


async def test_a_backup_before_an_upgrade_stays_of_its_schema_and_is_counted(tmp_path, monkeypatch):
    command = Command(tmp_path)
    await keep_a_value_in_schema_before_the_last(command.loaded(), monkeypatch)
    code, kept = await asyncio.to_thread(command, "backup", "--out", "b.sqlite3")
    assert (code, set(hashes(kept["tables"]))) == (0, set(TABLES))
    assert hashes(kept["tables"])["settings"][0] == 1
    for file in (command.data / STATE_FILE, tmp_path / "b.sqlite3"):
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("pragma user_version").fetchone() == (len(SQLITE) - 1,)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "b.sqlite3"}


async def test_a_database_that_is_not_migrated_yet_is_no_backup_of_this_perpd(
    postgres, tmp_path, monkeypatch
):
    command = Command(tmp_path, postgres.url)
    await keep_a_value_in_schema_before_the_last(command.loaded(database=True), monkeypatch)
    code, refusal = await asyncio.to_thread(command, "backup", "--out", "b.sqlite3", database=True)
    assert code == 73
    assert f"has schema {len(POSTGRES) - 1}, this perpd backs up schema {len(POSTGRES)}" in refusal["message"]
    assert not (tmp_path / "b.sqlite3").exists()


class SmallDisk:
    """A tmpfs of 2 MB; where mounting is not permitted, a limit on how far into a file may be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
        self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        print("a full disk is", "a tmpfs" if self.mounted else "a limit on the size of files")

    def fill(self) -> None:
        """Leave 200 kB."""
        if self.mounted:
            free = os.statvfs(self.path)
            (self.path / "room").write_bytes(bytes(free.f_bavail * free.f_frsize - 200_000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, self.limits[1]))

    def make_room(self) -> None:
        (self.path / "room").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def remove(self) -> None:
        self.make_room()
        if self.mounted:
            subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path / "small")
    try:
        yield disk
    finally:
        disk.remove()


async def test_a_disk_full_in_the_middle_of_a_migration_undoes_it_and_room_completes_it(
    small_disk, monkeypatch
):
    loaded = load(None, {"PERPD_RUN__DATA_DIR": str(small_disk.path)})
    with monkeypatch.context() as older:
        older.setattr("service.store.sqlite.SQLITE", SQLITE[:1])
        older.setattr("service.store.sqlite.SqliteStore.next_epoch", lambda self: asyncio.sleep(0, 1))
        async with open_state(loaded, small_disk.path) as state:
            for number in range(10):
                await state.store.set_value(f"k{number}", "x" * 40_000)
    copying = ("create table copied (name text, value text)", "insert into copied select * from settings")
    monkeypatch.setattr("service.store.sqlite.SQLITE", (*SQLITE, copying))
    small_disk.fill()
    failed = f"migration to schema {len(SQLITE) + 1} failed and was undone"
    with pytest.raises(DataDirectoryUnusable, match=failed):
        async with open_state(loaded, small_disk.path):
            pass
    with closing(sqlite3.connect(small_disk.path / STATE_FILE)) as db:
        assert db.execute("pragma user_version").fetchone() == (len(SQLITE),)
        assert db.execute("select count(*) from sqlite_master where name = 'copied'").fetchone() == (0,)
    small_disk.make_room()
    monkeypatch.setattr("service.store.sqlite.SQLITE", (*SQLITE, copying))
    async with open_state(loaded, small_disk.path) as state:
        assert await state.store.get_value("k9") == "x" * 40_000
