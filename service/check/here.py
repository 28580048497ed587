"""Checks of the place perpd runs in: disk, state, memory. They write nothing but a probe file."""

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from service.check.result import Check, failed, passed, warned
from service.monitor.budget import needed_mb
from service.monitor.memory import memory_limit_mb
from service.settings import Settings
from service.store.schema import SQLITE

MB = 1024 * 1024
LEAST_FREE_MB, COMFORTABLE_FREE_MB = 256, 2_048
MEMORY_ROOM = 1.3  # times what start-up needs
GONE_AT_RESTART = ("tmpfs", "ramfs", "overlay", "aufs", "squashfs")
"""File systems of memory and of container layers: what is written there is gone with the container."""

RAILWAY_SERVICE, RAILWAY_VOLUME = "RAILWAY_SERVICE_ID", "RAILWAY_VOLUME_MOUNT_PATH"


def data_directory(
    directory: Path, *, live: bool, environment: Mapping[str, str], state_elsewhere: bool = False
) -> Check:
    """Writable, and still there after a redeploy, unless positions are kept in a database."""
    name = "data directory"
    where = _existing(directory)
    if problem := _write_problem(where):
        return failed(name, f"{where}: {problem}", "change its permissions, or name another with --data-dir")
    kind = file_system(where)
    gone = kind in GONE_AT_RESTART or (
        environment.get(RAILWAY_SERVICE) and not environment.get(RAILWAY_VOLUME)
    )
    if gone and state_elsewhere:
        return warned(
            name,
            f"{where} is gone after a redeploy, and the archive with it; state is in the database",
            "attach a volume to keep the archive",
        )
    if environment.get(RAILWAY_SERVICE) and not environment.get(RAILWAY_VOLUME):
        return failed(
            name,
            f"{where} is part of the container, this Railway service has no volume",
            "attach a volume: a redeploy loses positions and records otherwise",
        )
    if kind in GONE_AT_RESTART:
        advice = "put it on a disk or a volume that survives a restart, and name it with --data-dir"
        found = f"{where} is on {kind}, which a restart empties"
        return failed(name, found, advice) if live else warned(name, found, advice)
    return passed(name, f"{where} is writable, on {kind or 'a file system the kernel does not name'}")


def disk_space(directory: Path) -> Check:
    where = _existing(directory)
    try:
        state = os.statvfs(where)
    except OSError as error:
        return failed("disk space", f"{where}: {error.strerror}", "name a readable directory with --data-dir")
    free_mb = state.f_bavail * state.f_frsize / MB
    found = f"{free_mb:,.0f} MB free at {where}"
    if free_mb < LEAST_FREE_MB:
        return failed("disk space", found, f"free at least {LEAST_FREE_MB} MB: records have to go somewhere")
    if free_mb < COMFORTABLE_FREE_MB:
        return warned("disk space", found, "a month of a large market's records takes a few GB")
    return passed("disk space", found)


def state(file: Path) -> Check:
    """The state's schema and soundness, beside a running daemon too."""
    name = "state"
    if not file.exists():
        return passed(name, "none yet, it is made at the first start")
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5) as database:
            version = int(database.execute("pragma user_version").fetchone()[0])
            verdict = str(database.execute("pragma quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        return failed(name, f"{file}: {error}", "restore it from a backup, or move it away to start anew")
    finally:
        if "database" in locals():
            database.close()
    if version > len(SQLITE):
        return failed(
            name,
            f"{file} has schema {version}, this perpd knows {len(SQLITE)}",
            "run the newer perpd that wrote it, or restore an older backup",
        )
    if verdict != "ok":
        return failed(name, f"{file} is damaged: {verdict}", "restore it from a backup")
    return passed(name, f"schema {version} of {len(SQLITE)}, sound")


def bans(file: Path) -> dict[str, int]:
    """Host to venue time until which it wants silence; none of a state that `state` fails."""
    if not file.exists():
        return {}
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as database:
            return dict(database.execute("select host, until_ms from bans"))
    except sqlite3.Error:
        return {}


def memory(settings: Settings) -> Check:
    """The limit against what start-up needs."""
    limit = memory_limit_mb(settings.monitor.memory_limit_mb)
    needed = needed_mb(settings.analysis, settings.market)
    found = f"limit {limit:,.0f} MB, start-up needs {needed:.0f} MB"
    advice = "raise the limit, or lower analysis.workers, market.symbols or market.candles"
    if limit < needed:
        return failed("memory", found, advice)
    return warned("memory", found, advice) if limit < needed * MEMORY_ROOM else passed("memory", found)


def file_system(where: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Type of the file system that holds a path; "" where the kernel does not tell."""
    try:
        rows = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    resolved = where.resolve()
    best, kind = -1, ""
    for row in rows:
        fields, _, rest = row.partition(" - ")
        point = Path(fields.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def _existing(directory: Path) -> Path:
    """The directory, or where it would be made."""
    for place in (directory, *directory.absolute().parents):
        if place.exists():
            return place
    return Path("/")


def _write_problem(directory: Path) -> str:
    probe = directory / f".perpd-check-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * 4_096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""
