"""Fresh processes to measure in, and what the kernel says about them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import PerpdError

_CPUCLOCK_SCHED = 2
_PROJECT = Path(__file__).resolve().parents[2]


class BenchFailed(PerpdError):
    """A benchmark could not measure what it promises to measure."""


class Memory(NamedTuple):
    """Of one process, in bytes. Unique is what would come free if only this process ended."""

    resident: int
    proportional: int
    unique: int
    anonymous: int = 0  # the share of `proportional` that no file backs: other programs do not move it


def command(module: str, spec: Any) -> list[str]:
    return [sys.executable, "-m", module, json.dumps(spec)]


def environment() -> dict[str, str]:
    """That of the user without settings of perpd, which would change what is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERPD_")}
    for name in ("PORT", "RAILWAY_VOLUME_MOUNT_PATH", "NOTIFY_SOCKET", "REDIS_URL"):
        kept.pop(name, None)
    before = kept.get("PYTHONPATH")
    kept["PYTHONPATH"] = f"{_PROJECT}{os.pathsep}{before}" if before else str(_PROJECT)
    return kept


def answer_of(
    module: str, spec: Any, pipes: tuple[int, ...] = (), variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m module SPEC` and return the JSON object it prints last.

    Args: pipes: descriptors it inherits; variables: of its environment, beside the user's.
    Raises: BenchFailed.
    """
    env = environment() | dict(variables or {})
    done = subprocess.run(command(module, spec), capture_output=True, text=True, env=env, pass_fds=pipes)
    if done.returncode != 0:
        words = _tail(done.stderr or done.stdout)
        raise BenchFailed(f"{module} ended with exit code {done.returncode}: {words}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise BenchFailed(f"{module} answered with something else: {_tail(done.stdout)}") from None
    return answer


def _tail(text: str, limit: int = 600) -> str:
    return " ".join(text[-limit:].split()) or "it said nothing"


def cpu_s(pid: int) -> float:
    """CPU seconds of a process with all its threads, to the nanosecond; its children do not count."""
    # clock_getcpuclockid(3): the kernel's clock of another process is made from its id
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def memory_of(pid: int) -> Memory:
    """Exact, from the page tables: 0.2 to 1 ms. Zero for a process that is gone."""
    sizes: dict[str, int] = {}
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return Memory(0, 0, 0)
    for line in text.splitlines()[1:]:
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024
    return Memory(
        sizes["Rss"], sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"], sizes.get("Pss_Anon", 0)
    )


def tree(pid: int, without: frozenset[int] = frozenset()) -> Iterator[int]:
    """A process and its descendants; `without` leaves some out with all below them."""
    if pid in without:
        return
    yield pid
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        except OSError:
            continue
        for child in map(int, children.split()):
            yield from tree(child, without)


def descriptors(pid: int) -> int:
    """Open file descriptors of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
