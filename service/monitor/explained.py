"""What the process tree's memory is spent on, by process and by named part, and how much no name explains.

Each process is measured by what it has mapped. The daemon's heap is split further, by measurements alone:

    imports       in use when the imports were done
    start-up      what was in use more when start-up was done, without what named parts held of it then
    parts         what each of them holds now, counted by walking it
    free          what the allocators hold and nobody uses
    not explained the rest: what grew after start-up and no part owns

No line is computed as the rest, so that growth which no part knows of shows up as not explained.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from service.monitor.heap import Heap, heap_now
from service.monitor.mappings import HEAP, Mappings, mappings

IMPORTS, START_UP = "interpreter and imported modules", "start-up, beyond the parts"
SQLITE = "SQLite"
OWN_HEAP, SHARED_HEAP = "own heap", "heap shared with its parent"
PYTHON_FREE, C_FREE = "free, held by Python's allocator", "free, held by the C allocator"

_PROC = Path("/proc")


class Mark(NamedTuple):
    """The heap at one moment, and what named parts held of it."""

    heap: Heap
    parts_bytes: int

    @property
    def unnamed_bytes(self) -> int:
        return self.heap.in_use - self.heap.sqlite - self.parts_bytes


class HeapMarks:
    """The daemon's heap at the two moments that explain what never changes again.

    Made when the imports are done. `parts`: each part's own bytes on the heap, by name; the daemon adds
    them while it opens its parts, and they are looked at when somebody asks.
    """

    def __init__(self, proc: Path = _PROC) -> None:
        self.parts: dict[str, Callable[[], int]] = {}
        self._proc = proc
        self._imports = self._mark()
        self._started: Mark | None = None

    def started(self) -> None:
        """Start-up is done and collected: what is unnamed from now on is growth. Takes some milliseconds."""
        self._started = self._mark()

    def _mark(self) -> Mark:
        return Mark(heap_now(self._proc), sum(size() for size in self.parts.values()))

    async def named(self) -> dict[str, int]:
        """The heap as it is now by named part, in bytes that count for this process.

        Pages shared with the nursery were there when it was forked, so they are the imports'.
        """
        parts = {}
        for name, size in list(self.parts.items()):
            parts[name] = size()
            await asyncio.sleep(0)  # a large part takes milliseconds of the loop
        heap = heap_now(self._proc)
        started = self._started.unnamed_bytes - self._imports.unnamed_bytes if self._started else 0
        return {
            IMPORTS: max(self._imports.unnamed_bytes - heap.resident + heap.proportional, 0),
            START_UP: max(started, 0),
            **parts,
            SQLITE: heap.sqlite,
            PYTHON_FREE: heap.python_free,
            C_FREE: heap.c_free,
        }


async def explain(pids: Iterable[int], marks: HeapMarks, proc: Path = _PROC) -> dict[str, Any]:
    """Every process of the tree by named part, in bytes of PSS, and what is left.

    `explained_fraction` loses what no name explains, and as much what names explain twice.
    """
    processes, rest = [], 0
    for pid in pids:
        own = pid == os.getpid()
        named = await marks.named() if own else {}
        found = process(mappings(pid, proc))
        if own:
            rest = _split_heap(found, named)
        if found["rss_bytes"]:
            processes.append(found)
        await asyncio.sleep(0)  # each takes milliseconds of the loop
    total = sum(found["pss_bytes"] for found in processes)
    return {
        "processes": processes,
        "pss_bytes": total,
        "unexplained_bytes": rest,
        "explained_fraction": 1 - abs(rest) / total if total else 0.0,
    }


def _split_heap(own: dict[str, Any], named: Mapping[str, int]) -> int:
    """Put the named parts in the place of the daemon's heap; returns the bytes that are left of it."""
    del own["parts"][HEAP]
    own["parts"] |= named
    rest: int = own["pss_bytes"] - sum(own["parts"].values())
    own["explained_fraction"] = 1 - abs(rest) / own["pss_bytes"]
    return rest


def process(found: Mappings) -> dict[str, Any]:
    """One process; the heap of a child splits into its own and what it shares since it was forked."""
    total, heap = found.total, found.of(HEAP)
    parts = {kind: sizes.proportional for kind, sizes in found.kinds.items() if sizes.proportional}
    if found.pid != os.getpid() and HEAP in parts:
        del parts[HEAP]
        parts = {
            OWN_HEAP: heap.private,
            SHARED_HEAP: heap.proportional - heap.private,
        } | parts
    return {
        "pid": found.pid,
        "name": found.name,
        "pss_bytes": total.proportional,
        "uss_bytes": total.private,
        "rss_bytes": total.resident,
        "parts": parts,
    }
