"""What a process has mapped, by kind, from a written page table and from a real one."""

import mmap
import os
from pathlib import Path

import pytest

from service.monitor.mappings import CANDLES, CODE, HEAP, JOURNAL, KERNEL, STACKS, STATE, Sizes, mappings

KB = 1024


def mapping(head: str, size: int, rss: int, pss: int, dirty: int) -> str:
    return (
        f"{head}\nSize: {size} kB\nKernelPageSize: 4 kB\nRss: {rss} kB\nPss: {pss} kB\nPss_Dirty: 0 kB\n"
        f"Shared_Clean: 0 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: {dirty} kB\nVmFlags: rd wr\n"
    )


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    smaps = [
        mapping("1000-2000 r-xp 00000000 fe:00 7       /usr/bin/python 3", 400, 300, 100, 0),
        mapping("2000-3000 rw-p 00000000 00:00 0       [heap]", 900, 800, 700, 600),
        mapping("3000-4000 ---p 00000000 00:00 0 ", 65_536, 0, 0, 0),
        mapping("4000-5000 rw-p 00000000 00:00 0 ", 1_024, 1_000, 1_000, 1_000),
        mapping("5000-6000 ---p 00000000 00:00 0 ", 4, 0, 0, 0),
        mapping("6000-7000 rw-p 00000000 00:00 0 ", 8_192, 60, 60, 60),
        mapping("7000-8000 rw-s 00000000 fe:00 8       /data/candles.mmap", 5_000, 4_000, 1_500, 0),
        mapping("8000-9000 rw-s 00000000 fe:00 9       /data/state.sqlite3-shm", 32, 32, 32, 32),
        mapping("9000-a000 rw-p 00000000 00:00 0       [stack]", 132, 50, 50, 50),
        mapping("a000-b000 rw-s 00000000 fe:00 10      /data/archive/journal", 4_096, 40, 40, 40),
    ]
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text("".join(smaps))
    (tmp_path / "7" / "comm").write_text("perpd-worker\n")
    return tmp_path


def test_each_mapping_counts_with_its_kind(proc: Path) -> None:
    found = mappings(7, proc)
    assert found.name == "perpd-worker"
    assert found.program_break == Sizes(700 * KB, 600 * KB, 800 * KB, 900 * KB)
    assert found.of(HEAP) == Sizes(1_700 * KB, 1_600 * KB, 1_800 * KB, 1_924 * KB)
    assert {kind: sizes.proportional // KB for kind, sizes in found.kinds.items()} == {
        HEAP: 1_700,
        CANDLES: 1_500,
        CODE: 100,
        STACKS: 60,
        KERNEL: 50,
        JOURNAL: 40,
        STATE: 32,
    }
    assert found.total.proportional == 3_482 * KB


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    gone = mappings(1, tmp_path)
    assert (gone.name, gone.total, gone.kinds) == ("gone", Sizes(), {})


def test_the_kinds_of_a_real_process_add_up_to_what_the_kernel_says() -> None:
    with mmap.mmap(-1, 12 * KB * KB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        before = mappings(os.getpid())
        for at in range(0, len(block), 4_096):
            block[at] = 1
        after = mappings(os.getpid())
        rollup = Path("/proc/self/smaps_rollup").read_text()
    grown = after.of(HEAP).private - before.of(HEAP).private
    assert grown == pytest.approx(12 * KB * KB, rel=0.1)
    pss = next(int(line.split()[1]) * KB for line in rollup.splitlines() if line.startswith("Pss:"))
    assert after.total.proportional == pytest.approx(pss, rel=0.15)
