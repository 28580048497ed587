"""Backups of the state: one SQLite file, whatever the store; and putting one back."""

import contextlib
import os
import shutil
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


class Kept:
    """The values of a state file that is open for reading."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    async def get_value(self, key: str) -> str | None:
        found = self._db.execute("select value from settings where name = ?", (key,)).fetchone()
        return None if found is None else str(found[0])


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
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
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
    """Count and hash a state file's tables. One of an older schema counts as what migrating makes of it."""
    with reading(path) as db:
        if schema_version(db) == len(SQLITE):
            return await digest(SqliteTables(db, str(path)))
    newest = path.with_name(path.name + ".newest")
    _remove(newest)
    try:
        copy_file(path, newest)
        with contextlib.closing(connect(newest)) as db:
            return await digest(SqliteTables(db, str(path)))
    finally:
        _remove(newest)


def put_back(backup: Path, state: Path, aside: Path) -> Path | None:
    """Replace a state file that no daemon holds; returns where the one before is kept, None without one.

    Interrupted anywhere, a state is in its place: the one before or the one put back. Raises
    DataDirectoryUnusable.
    """
    draft = state.with_name(state.name + ".restored")
    _remove(draft)
    copy_file(backup, draft)
    connect(draft).close()  # migrated and checked before anything is moved
    _remove_companions(draft)
    try:
        _sync(draft)
        kept = _keep_aside(state, aside) if state.exists() else None
        _remove_companions(state)  # a log of the old file must not be applied to the new one
        draft.replace(state)
        _sync(state.parent)
    except OSError as error:
        raise DataDirectoryUnusable(f"{state}: {error}; free some space or check permissions") from None
    finally:
        _remove(draft)
    return kept


def _keep_aside(state: Path, aside: Path) -> Path:
    """A second name for a state file; it keeps its own until another takes it."""
    _fold_log(state)
    for end in COMPANIONS:
        part = state.with_name(state.name + end)
        if part.exists():
            _second_name(part, aside.with_name(aside.name + end))
    _sync(state.parent)
    return aside


def _fold_log(state: Path) -> None:
    """Write what the log holds into the file, which then needs no companions; what is damaged stays."""
    with contextlib.suppress(sqlite3.Error):
        with contextlib.closing(sqlite3.connect(state, isolation_level=None)) as db:
            db.execute("pragma wal_checkpoint(truncate)")


def _second_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(path, name)
        _sync(name)


def _sync(path: Path) -> None:
    """Make a file's content durable, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_companions(path: Path) -> None:
    for end in COMPANIONS[1:]:
        path.with_name(path.name + end).unlink(missing_ok=True)
