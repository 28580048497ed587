"""What the allocators of this process say about its heap: how much is used, and how much is held free.

heap in memory = in use + free in Python's arenas + free in the C library's arenas
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from service.monitor.mappings import HEAP, Sizes, mappings

_PROC = Path("/proc")
_FREE_IN_POOLS = re.compile(r"^# bytes in available blocks\s+=\s+([\d,]+)", re.MULTILINE)
_FREE_POOLS = re.compile(r"^(\d+) unused pools \* (\d+) bytes", re.MULTILINE)


class Heap(NamedTuple):
    """In bytes. Free memory counts only as far as it is surely in memory: pages never touched are not."""

    resident: int
    proportional: int  # less: pages shared with the nursery and its workers are theirs as well
    python_free: int
    c_free: int
    sqlite: int  # allocated by SQLite: its page cache, its statements

    @property
    def in_use(self) -> int:
        return self.resident - self.python_free - self.c_free


def heap_now(proc: Path = _PROC) -> Heap:
    """Read the heap of this process: some milliseconds."""
    found = mappings(os.getpid(), proc)
    whole, first_arena = found.of(HEAP), found.program_break
    in_pools, pools = _python_free()
    return Heap(
        resident=whole.resident,
        proportional=whole.proportional,
        # A pool that is not in use may be untouched: as much as is untouched outside the C library's arena.
        python_free=in_pools + max(pools - (_untouched(whole) - _untouched(first_arena)), 0),
        c_free=max(_c_free() - _untouched(first_arena), 0),
        sqlite=_sqlite_bytes(proc),
    )


def _untouched(sizes: Sizes) -> int:
    return sizes.reserved - sizes.resident


def _python_free() -> tuple[int, int]:
    """Free bytes in pools that are in use, and in pools that are not; 0 when Python does not tell."""
    text = _debug_malloc_stats()
    blocks, pools = _FREE_IN_POOLS.search(text), _FREE_POOLS.search(text)
    return (
        int(blocks[1].replace(",", "")) if blocks else 0,
        int(pools[1]) * int(pools[2]) if pools else 0,
    )


def _debug_malloc_stats() -> str:
    """Python writes these to stderr and nowhere else: for 0.3 ms stderr leads into a file in memory."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        into = os.memfd_create("malloc-stats", os.MFD_CLOEXEC)
        try:
            os.dup2(into, 2)
            try:
                sys._debugmallocstats()
            finally:
                os.dup2(kept, 2)
            return os.pread(into, os.fstat(into).st_size, 0).decode("ascii", "replace")
        finally:
            os.close(into)
    finally:
        os.close(kept)


def _c_free() -> int:
    """Free bytes in the C library's arenas; 0 for a library that does not tell."""
    import ctypes  # 0.2 MB

    class Info(ctypes.Structure):  # struct mallinfo2 of mallinfo(3)
        _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]

    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    ask.restype = Info
    return int(ask().fordblks)


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


def _sqlite_bytes(proc: Path) -> int:
    """Bytes that SQLite has allocated; 0 when it is not loaded as a library of its own."""
    import ctypes

    path = _loaded("libsqlite3", proc)
    if not path:
        return 0
    try:
        ask = ctypes.CDLL(path).sqlite3_memory_used
    except (AttributeError, OSError):
        return 0
    ask.restype = ctypes.c_int64
    return int(ask())


def _loaded(name: str, proc: Path) -> str:
    """The path of a shared library that this process has mapped, or ''."""
    try:
        with open(proc / "self" / "maps", encoding="utf-8", errors="replace") as file:
            return next((line.split(None, 5)[5].strip() for line in file if f"/{name}." in line), "")
    except OSError:
        return ""
