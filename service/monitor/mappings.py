"""What a process has mapped, by kind and in bytes, read from its page tables."""

import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HEAP, CODE, CANDLES = "heap", "code and libraries", "candle store"
STATE, STACKS, KERNEL = "state database", "thread stacks", "stack and kernel pages"
JOURNAL = "archive journal"

_PROC = Path("/proc")


class Sizes(NamedTuple):
    """In bytes. Private is what no other process maps: what would come free if only this one ended."""

    proportional: int = 0
    private: int = 0
    resident: int = 0
    reserved: int = 0  # address space, touched or not

    def __add__(self, other: tuple[int, ...]) -> "Sizes":  # type: ignore[override]
        return Sizes(*(a + b for a, b in zip(self, other, strict=True)))


class Mappings(NamedTuple):
    """One process; all empty when it is gone."""

    pid: int
    name: str
    kinds: dict[str, Sizes]  # the largest first
    program_break: Sizes = Sizes()  # of the heap, what the C library's first arena has

    @property
    def total(self) -> Sizes:
        found = Sizes()
        for sizes in self.kinds.values():
            found += sizes
        return found

    def of(self, kind: str) -> Sizes:
        return self.kinds.get(kind, Sizes())


def mappings(pid: int, proc: Path = _PROC) -> Mappings:
    """Read one process: some milliseconds for a few hundred mappings."""
    kinds: dict[str, Sizes] = {}
    program_break = Sizes()
    before = ""
    for rights, path, sizes in _each(proc / str(pid) / "smaps"):
        kind = _kind(path)
        if kind == HEAP and before == _GUARD and _is_stack(sizes.reserved):
            kind = STACKS
        if rights != _GUARD:  # address space that nobody may touch holds nothing
            kinds[kind] = kinds.get(kind, Sizes()) + sizes
        if path == "[heap]":
            program_break += sizes
        before = rights
    command = "".join(_lines(proc / str(pid) / "comm")).strip()
    by_size = sorted(kinds.items(), key=lambda item: -item[1].proportional)
    return Mappings(pid, command or "gone", dict(by_size), program_break)


def _each(smaps: Path) -> Iterator[tuple[str, str, Sizes]]:
    """Rights, path and sizes of each mapping, by address."""
    rights, path = "", ""
    found: dict[str, int] = {}
    for line in _lines(smaps):
        name, _, rest = line.partition(":")
        if name in _READ:
            found[name] = int(rest.split()[0]) * 1024
        elif "-" in name.partition(" ")[0]:  # the head of a mapping: addresses, rights, ..., path
            if found:
                yield rights, path, _sizes(found)
            _, rights, _, _, _, *rest_of_head = line.split(None, 5)
            path = rest_of_head[0].strip() if rest_of_head else ""
            found = {}
    if found:
        yield rights, path, _sizes(found)


def _sizes(found: dict[str, int]) -> Sizes:
    private = found.get("Private_Clean", 0) + found.get("Private_Dirty", 0)
    return Sizes(found.get("Pss", 0), private, found.get("Rss", 0), found.get("Size", 0))


_GUARD = "---p"
_READ = frozenset(("Size", "Pss", "Rss", "Private_Clean", "Private_Dirty"))


def _is_stack(size_bytes: int) -> bool:
    """A thread's stack is an anonymous mapping of the size that the process's limit says, behind a guard."""
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return size_bytes in (limit, 256 * 1024, 8 * 1024 * 1024)


def _kind(path: str) -> str:
    """What a mapping is, in words."""
    if path.endswith("candles.mmap"):
        return CANDLES
    if path in ("", "[heap]") or path.startswith(("[anon", "/dev/zero")):
        return HEAP
    if path.startswith("["):
        return KERNEL
    if ".sqlite3" in path:
        return STATE
    if path.endswith("/archive/journal"):
        return JOURNAL
    return CODE


def _lines(path: Path) -> Iterable[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines()
    except OSError:
        return ()
