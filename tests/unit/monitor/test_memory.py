import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.monitor.memory import MemorySampler, available_cpus, memory_limit_mb

MB = 1024 * 1024
SLEEPER = "import sys; data = bytearray(30 * 1024 * 1024); print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def child() -> Iterator[int]:
    """A process of ours that holds 30 MB."""
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        yield process.pid
        process.stdin.close()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc" / "meminfo", "MemTotal:        8192000 kB\nMemFree: 1 kB\n")
    return tmp_path / "proc"


def cgroup(proc: Path, text: str) -> None:
    write(proc / "self" / "cgroup", text)


def test_without_any_limit_it_is_the_hosts_memory(proc: Path, tmp_path: Path) -> None:
    assert memory_limit_mb(0, proc, tmp_path) == 8_000


def test_the_setting_counts_when_it_is_the_smallest(proc: Path, tmp_path: Path) -> None:
    assert memory_limit_mb(300, proc, tmp_path) == 300
    assert memory_limit_mb(30_000, proc, tmp_path) == 8_000


def test_the_smallest_cgroup_limit_of_all_ancestors_counts(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "0::/machine/unit/inner\n")
    write(tmp_path / "machine" / "memory.max", str(1_000 * MB))
    write(tmp_path / "machine" / "unit" / "memory.max", str(500 * MB))
    write(tmp_path / "machine" / "unit" / "inner" / "memory.max", "max\n")
    assert memory_limit_mb(600, proc, tmp_path) == 500


def test_inside_a_container_the_limit_stands_at_the_root(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "0::/\n")
    write(tmp_path / "memory.max", "299999232\n")
    assert memory_limit_mb(0, proc, tmp_path) == pytest.approx(286.1, abs=0.01)


def test_a_hybrid_host_keeps_its_memory_limit_in_version_1(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "0::/\n4:cpu,cpuacct:/x\n3:memory:/docker/abc\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "memory" / "docker" / "abc" / "memory.limit_in_bytes", str(400 * MB))
    assert memory_limit_mb(0, proc, tmp_path) == 400


def test_version_1_falls_back_to_the_root_when_the_path_is_the_hosts(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "3:memory:/docker/abc\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", str(200 * MB))
    assert memory_limit_mb(0, proc, tmp_path) == 200


def test_unreadable_limits_are_no_limits(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "nonsense\n0::/a/../b\n")
    write(tmp_path / "memory.max", "many")
    assert memory_limit_mb(0, proc, tmp_path) == 8_000
    assert memory_limit_mb(0, tmp_path / "nowhere", tmp_path) > 0


def test_a_limit_that_cannot_be_read_is_no_limit_and_hides_no_other(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "0::/a/b\n3:memory:/c\n")
    (tmp_path / "a" / "memory.max").mkdir(parents=True)  # reading it is refused, whoever asks
    write(tmp_path / "a" / "b" / "memory.max", str(700 * MB))
    (tmp_path / "memory" / "c" / "memory.limit_in_bytes").mkdir(parents=True)
    assert memory_limit_mb(0, proc, tmp_path) == 700


def test_a_cpu_quota_cuts_what_may_be_used(proc: Path, tmp_path: Path) -> None:
    cgroup(proc, "0::/\n")
    write(tmp_path / "cpu.max", "50000 100000\n")
    assert available_cpus(proc, tmp_path) == 0.5
    write(tmp_path / "cpu.max", "max 100000\n")
    assert available_cpus(proc, tmp_path) == len(os.sched_getaffinity(0))


def test_children_count_and_the_excluded_do_not(child: int) -> None:
    with_child = MemorySampler(0)
    without = MemorySampler(0, lambda: {child})
    with_child.sample()
    without.sample()
    assert with_child.processes == without.processes + 1
    assert with_child.pss_mb_last - without.pss_mb_last > 30


def test_what_an_excluded_process_started_is_excluded_too(tmp_path: Path) -> None:
    me = os.getpid()
    for pid, children in ((me, "11 12"), (11, "13"), (12, ""), (13, "")):
        write(tmp_path / str(pid) / "task" / str(pid) / "children", children)
        write(tmp_path / str(pid) / "smaps_rollup", "00-ff rollup\nRss: 9 kB\nPss:  1024 kB\n")
    sampler = MemorySampler(0, lambda: {11}, proc=tmp_path)
    sampler.sample()
    assert sampler.processes == 2
    assert sampler.pss_mb_last == 2.0


def test_rss_stands_in_where_pss_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / str(os.getpid()) / "statm", "900 256 1 1 0 1 0\n")
    sampler = MemorySampler(0, proc=tmp_path)
    sampler.sample()
    assert sampler.pss_mb_last == 256 * os.sysconf("SC_PAGE_SIZE") / MB


def test_the_peak_stays_and_the_fraction_is_of_the_limit(tmp_path: Path) -> None:
    rollup = tmp_path / str(os.getpid()) / "smaps_rollup"
    sampler = MemorySampler(100, proc=tmp_path, cgroups=tmp_path)
    write(rollup, "Pss: 51200 kB\n")
    assert sampler.sample().memory_fraction == 0.5
    write(rollup, "Pss: 10240 kB\n")
    assert sampler.sample().memory_fraction == 0.1
    assert (sampler.pss_mb_last, sampler.pss_mb_peak) == (10.0, 50.0)


def stat(pid: int, ticks: int, started: int = 5) -> str:
    return f"{pid} (a (b) c) S " + " ".join(["0"] * 10) + f" {ticks} 0 0 0 0 0 1 0 {started} 0\n"


def test_cpu_is_what_the_tree_used_since_the_sample_before(tmp_path: Path) -> None:
    now_s = 0.0
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    path = tmp_path / str(os.getpid()) / "stat"
    cgroup(tmp_path, "0::/\n")
    write(tmp_path / "cpu.max", "100000 100000\n")
    sampler = MemorySampler(0, proc=tmp_path, cgroups=tmp_path, monotonic_s=lambda: now_s)
    write(path, stat(os.getpid(), 1_000))
    assert sampler.sample().cpu_fraction == 0.0  # nothing to compare with yet
    now_s = 10.0
    write(path, stat(os.getpid(), 1_000 + 5 * ticks_per_s))
    assert sampler.sample().cpu_fraction == pytest.approx(0.5)
    now_s = 10.01
    write(path, stat(os.getpid(), 1_001 + 5 * ticks_per_s))
    assert sampler.sample().cpu_fraction == pytest.approx(0.5)  # too soon to say anything new
    now_s = 20.01
    write(path, stat(os.getpid(), ticks_per_s, started=9))  # the pid was given to another process
    assert sampler.sample().cpu_fraction == pytest.approx(0.1, abs=1e-3)
