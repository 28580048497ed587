"""The write-ahead log of a SQLite state: made long at the start, folded into the file in idle moments.

A sync of bytes that replace others of a file is the disk's alone; where a file grows, the file system's
journal is written as well, several times as long. And whoever happens to fill the log would pay for
folding it, an order among them.
"""

import shutil
import sqlite3
from pathlib import Path

import structlog

log = structlog.get_logger("store.wal")

PAGE_BYTES = 4_096
LENGTH_BYTES = 4_194_304  # more than is written between two folds on a usual day
ROOM_BYTES = 67_108_864  # a disk with less room needs it for the state itself
LIMIT_BYTES = 16_777_216  # a longer log is cut back to this once it is folded
FOLD_AFTER = 32  # turns that wrote; a turn of a busy cycle writes 15 pages
FOLD_AT_LATEST_PAGES = 4_000  # in the commit that comes to this, where no moment was idle


def prepare(db: sqlite3.Connection) -> None:
    """Switch to the log, each commit synced, and make it long. Raises sqlite3.Error."""
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = full")
    db.execute(f"pragma journal_size_limit = {LIMIT_BYTES}")
    db.execute(f"pragma wal_autocheckpoint = {FOLD_AT_LATEST_PAGES}")


def lengthen(db: sqlite3.Connection, path: Path) -> None:
    """Write what fills the log and take it back: what is written next replaces it."""
    if shutil.disk_usage(path.parent).free < ROOM_BYTES:
        log.info("the write-ahead log stays short: there is little room", path=str(path))
        return
    cached_bytes = -1_024 * int(db.execute("pragma cache_size").fetchone()[0])
    try:
        db.execute("begin immediate")
        filler = "insert or replace into settings values ('', zeroblob(?))"
        db.execute(filler, (LENGTH_BYTES + cached_bytes,))
        db.execute("rollback")
        begin_anew(db)
        db.execute("pragma shrink_memory")  # the filling went through the whole cache
    except sqlite3.OperationalError as error:  # no room for it is none of its own: the first write tells
        log.warning("the write-ahead log stays short, writes take longer", error=str(error))
        if db.in_transaction:
            db.execute("rollback")
        db.execute("pragma wal_checkpoint(truncate)")


def fold(db: sqlite3.Connection) -> None:
    """Write the log into the file and begin it anew; where that fails, what is in the log stays there."""
    try:
        db.execute("pragma wal_checkpoint(passive)").fetchone()
        begin_anew(db)
    except sqlite3.Error as error:
        log.warning("the write-ahead log could not be folded, it grows", error=str(error))


def begin_anew(db: sqlite3.Connection) -> None:
    """Commit the schema's version as it is: the first commit in a log that was folded syncs twice."""
    version = db.execute("pragma user_version").fetchone()[0]
    db.execute(f"pragma user_version = {version}")
