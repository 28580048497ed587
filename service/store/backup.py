"""Backups of the state: one SQLite file, whatever the store; and putting one back."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DataDirectoryUnusable, SchemaUnknown, StateDamaged
from service.store.schema import SQLITE
from service.store.sqlite import connect, schema_version
from service.store.tables import Digest, SqliteTables, Tables, copy, digest

COMPANIONS = ("", "-wal", "-shm")


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A checked SQLite state file, as it is at this moment; a daemon may be writing to it.

    Raises: DataDirectoryUnusable: there is none; StateDamaged; SchemaUnknown.
    """
    if not path.is_file():
        raise DataDirectoryUnusable(f"{path}: there is no state here")
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("pragma query_only = on")
        db.execute("begin")
        found = db.execute("pragma integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StateDamaged(f"{path}: is damaged ({found})")
        version = schema_version(db)
        if version > len(SQLITE):
            raise SchemaUnknown(f"{path}: schema {version}; this perpd knows up to {len(SQLITE)}")
        if version == 0:
            raise StateDamaged(f"{path}: is no state of perpd")
        yield db
    except sqlite3.OperationalError as error:
        raise DataDirectoryUnusable(f"{path}: {error}") from None
    except sqlite3.DatabaseError as error:
        raise StateDamaged(f"{path}: is damaged ({error})") from None
    finally:
        db.close()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A draft beside the path, which takes its place when the block ends well; never replaces a file.

    Raises: DataDirectoryUnusable: something is there already, or nothing can be written.
    """
    if path.exists():
        raise DataDirectoryUnusable(f"{path}: exists already; name another file")
    draft = path.with_name(path.name + ".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(draft)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, sqlite3.OperationalError) as error:
        raise DataDirectoryUnusable(f"{path}: {error}; free some space or name another place") from None
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    for end in COMPANIONS:
        path.with_name(path.name + end).unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """An online copy: the source may be written to meanwhile."""
    with reading(source) as db, new_file(target) as draft:
        copied = sqlite3.connect(draft)
        try:
            db.backup(copied)
            copied.execute("pragma journal_mode = delete")  # one file, without companions
        finally:
            copied.close()


async def write_file(source: Tables, target: Path) -> list[tuple[Digest, Digest]]:
    """Every row of a store as a SQLite state file of the newest schema."""
    with new_file(target) as draft:
        db = connect(draft)
        try:
            db.execute("begin immediate")
            pairs = await copy(source, SqliteTables(db, str(target)))
            db.execute("commit")
            db.execute("pragma journal_mode = delete")
        finally:
            db.close()
    return pairs


async def digest_file(path: Path) -> list[Digest]:
    with reading(path) as db:
        return await digest(SqliteTables(db, str(path)))


def put_back(backup: Path, state: Path, aside: Path) -> Path | None:
    """Replace a state file that no daemon holds; returns where the one before is kept, None without one."""
    draft = state.with_name(state.name + ".restored")
    _remove(draft)
    copy_file(backup, draft)
    connect(draft).close()  # migrated and checked before anything is moved
    _remove_companions(draft)
    kept = aside if state.exists() else None
    for end in COMPANIONS:
        part = state.with_name(state.name + end)
        with contextlib.suppress(FileNotFoundError):
            part.rename(aside.with_name(aside.name + end))
    draft.replace(state)
    return kept


def _remove_companions(path: Path) -> None:
    for end in COMPANIONS[1:]:
        path.with_name(path.name + end).unlink(missing_ok=True)
