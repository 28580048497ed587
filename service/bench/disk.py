"""What the disk itself takes for a small durable write, asked beside what else is measured."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WRITE_BYTES = 16_384  # four pages: what the intention of an entry comes to
FILE_BYTES = 4_194_304
EVERY_S = 0.2


@contextmanager
def asking_disk() -> Iterator[list[float]]:
    """Milliseconds of each write and sync of bytes that replace others; filled until the block ends.

    In the directory of temporary files, where the benchmarks put their data.
    """
    found: list[float] = []
    ended = threading.Event()
    with tempfile.TemporaryFile(prefix="perpd-bench-disk-") as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, bytes(FILE_BYTES), 0)
        os.fsync(descriptor)
        asking = threading.Thread(target=_ask, args=(descriptor, ended, found), name="bench.disk")
        asking.start()
        try:
            yield found
        finally:
            ended.set()
            asking.join()


def _ask(descriptor: int, ended: threading.Event, found: list[float]) -> None:
    piece = os.urandom(WRITE_BYTES)
    at = 0
    while not ended.wait(EVERY_S):
        began_s = time.perf_counter()
        os.pwrite(descriptor, piece, at)
        os.fdatasync(descriptor)
        found.append((time.perf_counter() - began_s) * 1000)
        at = (at + WRITE_BYTES) % FILE_BYTES
