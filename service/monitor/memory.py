"""What the daemon's process tree uses of its memory and CPU, read from /proc and the cgroups.

Memory is PSS: shared pages count once over the tree, where RSS would count them once a process. The
budget is the smallest of the setting, every cgroup limit above us and the host's memory; what libraries
report is the host alone, which in a container is somebody else's.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from service.monitor.cgroups import limits_bytes, read_text, unified, working_sets
from service.monitor.memory_history import MemoryHistory
from service.records import Load

_MB = 1024 * 1024
_CPU_WINDOW_S = 0.2  # the kernel counts CPU time in ticks of 10 ms: over less it says nothing
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_OWN_SHARE = 0.25  # of what a control group holds, from which the group counts as ours


class MemorySampler:
    """Samples this process and its descendants.

    Args: limit_mb: the setting, 0 for none; exclude_pids: processes that are not the daemon's own, with
    all below them (the embedded simulated exchange); proc, cgroups: where these are mounted.
    """

    def __init__(
        self,
        limit_mb: float,
        exclude_pids: Callable[[], set[int]] = set,
        *,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exclude_pids = exclude_pids
        self._proc = proc
        self._cgroups = cgroups
        self._monotonic_s = monotonic_s
        self._cpus = available_cpus(proc, cgroups)
        self._cpu_s: dict[tuple[int, int], float] = {}  # (pid, start tick) to CPU seconds
        self._cpu_fraction_last = 0.0
        self._sampled_s = monotonic_s()
        self.limit_mb = memory_limit_mb(limit_mb, proc, cgroups)
        self.pss_mb_last = 0.0
        self.pss_mb_peak = 0.0
        self.processes = 0
        self.history = MemoryHistory(monotonic_s)

    def sample(self) -> Load:
        """Read the tree once. A process that ends meanwhile counts nothing.

        Runs on the loop: 0.6 ms for four processes, where a thread would cost more memory than it saves time.
        """
        pids = self.tree()
        pss_bytes = sum(self._memory_bytes(pid) for pid in pids)
        self.processes = len(pids)
        self.pss_mb_last = pss_bytes / _MB
        self.pss_mb_peak = max(self.pss_mb_peak, self.pss_mb_last)
        self.history.add(self.pss_mb_last)
        return Load(
            memory_fraction=self.pss_mb_last / self.limit_mb,
            cpu_fraction=self._cpu_fraction(pids),
        )

    def group_fraction(self) -> float:
        """Working set over limit, of the control group nearest to its limit; 0 without one.

        It counts everybody in the group, as the kernel's out-of-memory killer does. A group of which the
        last sample is a small part is somebody else's: what we give back would not help it.
        """
        return self._fullest(ours=True)

    def foreign_fraction(self) -> float:
        """As `group_fraction`, of the groups that are somebody else's."""
        return self._fullest(ours=False)

    def _fullest(self, *, ours: bool) -> float:
        own_bytes = self.pss_mb_last * _MB
        return max(
            (
                used / limit
                for used, limit in working_sets(self._proc, self._cgroups)
                if (own_bytes >= used * _OWN_SHARE) is ours
            ),
            default=0.0,
        )

    def pressure_pct(self) -> float | None:
        """Percent of the last 10 s in which all of the control group, or else the host, waited for memory.

        None where the kernel does not tell.
        """
        places = [directory / "memory.pressure" for directory in unified(self._proc, self._cgroups)]
        for place in (*reversed(places), self._proc / "pressure" / "memory"):
            for line in read_text(place).splitlines():
                if line.startswith("full avg10="):
                    return float(line.split()[1].removeprefix("avg10="))
        return None

    def tree(self) -> list[int]:
        """Process ids of the daemon, first, and its descendants."""
        excluded = self._exclude_pids()
        found: list[int] = []
        waiting = [os.getpid()]
        while waiting:
            pid = waiting.pop()
            if pid in excluded or pid in found:
                continue
            found.append(pid)
            waiting.extend(self._children(pid))
        return found

    def _children(self, pid: int) -> Iterator[int]:
        try:
            threads = os.listdir(self._proc / str(pid) / "task")
        except OSError:
            return
        for thread in threads:
            text = read_text(self._proc / str(pid) / "task" / thread / "children")
            yield from map(int, text.split())

    def _memory_bytes(self, pid: int) -> int:
        for line in read_text(self._proc / str(pid) / "smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        # Not readable (another user's, or no such file here): RSS is at least an upper bound.
        fields = read_text(self._proc / str(pid) / "statm").split()
        return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0

    def _cpu_fraction(self, pids: list[int]) -> float:
        now_s = self._monotonic_s()
        elapsed_s = now_s - self._sampled_s
        if self._cpu_s and elapsed_s < _CPU_WINDOW_S:
            return self._cpu_fraction_last
        current = dict(filter(None, (self._process_cpu(pid) for pid in pids)))
        # What was first seen now began since the last sample, except at the first sample of all.
        used_s = sum(seconds - self._cpu_s.get(key, 0.0) for key, seconds in current.items())
        first = not self._cpu_s
        self._cpu_s, self._sampled_s = current, now_s
        if not first:
            self._cpu_fraction_last = max(used_s, 0.0) / (elapsed_s * self._cpus)
        return self._cpu_fraction_last

    def _process_cpu(self, pid: int) -> tuple[tuple[int, int], float] | None:
        """((pid, start tick), CPU seconds so far); the start tells a reused pid apart."""
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = read_text(self._proc / str(pid) / "stat").rpartition(")")[2].split()
        if len(fields) < 20:
            return None
        return (pid, int(fields[19])), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def memory_limit_mb(
    setting_mb: float, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> float:
    """The smallest of the setting (0 is none), the cgroup limits of all ancestors and the host's memory."""
    limits = [setting_mb] if setting_mb > 0 else []
    limits += [limit / _MB for limit in limits_bytes(proc, cgroups)]
    for line in read_text(proc / "meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) / 1024)
    if not limits:
        limits.append(os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES / _MB)
    return min(limits)


def available_cpus(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """How many CPUs this process may use at once: its affinity, cut by the cgroup's quota."""
    cpus = float(len(os.sched_getaffinity(0)))
    for directory in unified(proc, cgroups):
        quota, _, period = read_text(directory / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            cpus = min(cpus, int(quota) / int(period))
    return max(cpus, 0.01)
