"""The heap by named part: what is named is measured, and what nobody names stays visible."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from service.monitor.explained import IMPORTS, START_UP, HeapMarks, explain
from service.monitor.heap import Heap, heap_now

MB = 1024 * 1024
ROOT = Path(__file__).resolve().parents[3]


SCATTERED = """
from service.monitor.heap import heap_now
before = heap_now()
blocks = [bytes(200) for _ in range(40_000)]  # small: from Python's own arenas
full = heap_now()
kept = blocks[::10]  # one in each pool: none of them can be given back
del blocks
scattered = heap_now()
print(full.in_use - before.in_use, scattered.python_free - full.python_free, len(kept))
"""


def fresh(code: str) -> list[int]:
    """The numbers a fresh process prints: what other tests left free would take the blocks in."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_memory_that_is_freed_is_told_as_free_and_not_as_used() -> None:
    grown, freed, kept = fresh(SCATTERED)
    assert grown == pytest.approx(40_000 * 248, rel=0.15)
    assert freed > 5 * MB
    assert kept == 4_000


C_BLOCKS = """
import ctypes
from service.monitor.heap import heap_now
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = heap_now()
blocks = [ctypes.c_void_p(libc.malloc(20_000)) for _ in range(500)]
for block in blocks:
    ctypes.memset(block, 1, 20_000)
for block in blocks[:-1]:
    libc.free(block)
print(heap_now().c_free - before.c_free)
"""


def test_free_memory_of_the_c_library_is_seen() -> None:
    (grown,) = fresh(C_BLOCKS)
    assert grown > 8 * MB


def test_what_sqlite_holds_is_asked_of_sqlite() -> None:
    before = heap_now().sqlite
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (x)")
    connection.executemany("insert into t values (?)", [("x" * 1_000,)] * 3_000)
    after = heap_now().sqlite
    connection.close()
    if after == 0:
        pytest.skip("SQLite is part of the interpreter here")
    assert after - before > 3 * MB


def test_asking_the_allocator_leaves_stderr_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    heap_now()
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def heap(in_use: int, *, shared: int = 0, sqlite: int = 0) -> Heap:
    return Heap(in_use, in_use - shared, python_free=0, c_free=0, sqlite=sqlite)


async def test_start_up_is_what_grew_beyond_the_parts_and_later_growth_is_not_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = heap(40 * MB, shared=4 * MB, sqlite=MB)
    at = iter([heap(24 * MB), heap(30 * MB, sqlite=MB), now])
    monkeypatch.setattr("service.monitor.explained.heap_now", lambda proc: next(at))
    marks = HeapMarks()
    book = [3 * MB]
    marks.parts["book"] = lambda: book[0]
    marks.started()
    book[0] = 5 * MB
    named = await marks.named()
    assert named[IMPORTS] == 20 * MB, "what is shared with the nursery counts there"
    assert named[START_UP] == 2 * MB
    assert named["book"] == 5 * MB
    assert now.proportional - sum(named.values()) == 8 * MB, "what grew and nobody owns"


async def test_growth_that_no_part_owns_shows_up_as_not_explained() -> None:
    marks = HeapMarks()
    marks.started()
    before = await explain([os.getpid()], marks)
    grown = bytearray(24 * MB)
    after = await explain([os.getpid()], marks)
    assert after["unexplained_bytes"] - before["unexplained_bytes"] == pytest.approx(len(grown), rel=0.1)
    assert after["explained_fraction"] < before["explained_fraction"]
    [own] = after["processes"]
    assert sum(own["parts"].values()) + after["unexplained_bytes"] == own["pss_bytes"]


async def test_a_part_that_owns_the_growth_explains_it() -> None:
    marks = HeapMarks()
    marks.started()
    before = (await explain([os.getpid()], marks))["unexplained_bytes"]
    grown = bytearray(24 * MB)
    marks.parts["grown"] = lambda: len(grown)
    after = (await explain([os.getpid()], marks))["unexplained_bytes"]
    assert after - before == pytest.approx(0, abs=3 * MB)
