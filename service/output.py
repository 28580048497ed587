"""Files that a command was told to write: whether they can be, before the work is done for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DataDirectoryUnusable


def check_output(path: Path) -> None:
    """Make no directory and change no file. Raises DataDirectoryUnusable: nothing can be written there."""
    with output_errors(path):
        if not path.parent.is_dir():
            raise DataDirectoryUnusable(f"{path}: there is no directory {path.parent}; make it first")
        if path.is_dir():
            raise DataDirectoryUnusable(f"{path}: is a directory; name a file")
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # neither a pipe nor a device, which opening would disturb
            path.open("xb").close()
            path.unlink()


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """What the system refuses inside, as DataDirectoryUnusable with the path and the reason."""
    try:
        yield
    except OSError as error:
        raise DataDirectoryUnusable(f"{path}: cannot be written: {error.strerror or error}") from None
