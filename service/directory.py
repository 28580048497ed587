"""The data directory: chosen, checked, locked, and marked with whose books it holds."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DataDirectoryUnusable
from service.settings import Settings

MARK = "books.json"
PROBE_BYTES = 65_536  # a directory that cannot take this much is full


def market_name(settings: Settings) -> str:
    """Whose books these are: the mode and, in simulation, the market, as a file name."""
    if settings.run.mode != "sim":
        return settings.run.mode
    sim = settings.sim
    if sim.url:
        return "sim-" + _digest(sim.url)
    if not sim.replay:
        return f"sim-seed{sim.seed}-{sim.symbols}"
    where = Path(sim.replay).resolve()
    what = "|".join((str(where), sim.from_time, sim.until_time, str(sim.symbols), str(sim.seed)))
    return f"replay-{where.name}-{_digest(what)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def data_path(settings: Settings) -> Path:
    """Where the data directory is, whether or not it exists."""
    if settings.run.data_dir:
        return Path(settings.run.data_dir)
    return Path(".perpd") / market_name(settings)


@contextmanager
def data_directory(settings: Settings) -> Iterator[Path]:
    """Hold the data directory while the block runs. A new one is nobody's until `claim`.

    Raises: DataDirectoryUnusable: not writable, full, held by another daemon, or of another market.
    """
    name, directory = market_name(settings), data_path(settings)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(directory, error) from None
    with locked(directory):
        try:
            _probe(directory)
            _check_mark(directory, name)
        except OSError as error:
            raise _unusable(directory, error) from None
        yield directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep every daemon and command out of a data directory, whoseever books it holds.

    Raises: DataDirectoryUnusable: there is none, or another holds it.
    """
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(directory, error) from None
    try:
        _lock(lock, directory)
        yield
    finally:
        os.close(lock)


def marked_name(directory: Path) -> str:
    """Whose books a directory holds; '' when it does not say."""
    try:
        return str(json.loads((directory / MARK).read_text())["books"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def _unusable(directory: Path, error: OSError) -> DataDirectoryUnusable:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return DataDirectoryUnusable(
            f"data directory {directory}: a file is in its place or above it; name another with --data-dir"
        )
    return DataDirectoryUnusable(
        f"data directory {directory}: {error.strerror}; free some space, change its permissions, "
        "or name another with --data-dir"
    )


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataDirectoryUnusable(
            f"data directory {directory} is held by another perpd; stop it, or name another with --data-dir"
        ) from None


def _probe(directory: Path) -> None:
    """Writing must work now, before the first order, not when the first record comes."""
    probe = directory / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _check_mark(directory: Path, name: str) -> None:
    found = marked_name(directory)
    if found and found != name:
        raise DataDirectoryUnusable(
            f"data directory {directory} holds the books of {found!r}, this run is {name!r}; "
            "name another with --data-dir"
        )


def claim(settings: Settings, directory: Path) -> None:
    """Mark a directory that is held with whose books it holds from now on.

    Not before the market is open: a start that fails over a mistyped market leaves the directory to the next.
    Raises: DataDirectoryUnusable: not writable.
    """
    if marked_name(directory):
        return
    mark = directory / MARK
    temporary = mark.with_suffix(".new")
    try:
        temporary.write_text(json.dumps({"books": market_name(settings)}) + "\n")
        temporary.replace(mark)
    except OSError as error:
        raise _unusable(directory, error) from None
