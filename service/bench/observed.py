"""The real daemon in a process of its own, trading the simulated exchange, looked at between its cycles.

The daemon runs as `perpd run` runs it, from the same settings and the same entry; only the function that runs
one cycle is wrapped, so that a sample is taken when a cycle has ended, and its loop lag is read from a
heartbeat when one is given. The simulated exchange is a process beside it and counts nowhere.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from service.bench.processes import (
    BenchFailed,
    command,
    cpu_s,
    descriptors,
    environment,
    memory_of,
    tree,
)

if TYPE_CHECKING:
    from service.cycle import Parts
    from service.records import CycleReport

MB = 1024 * 1024


class Observed(NamedTuple):
    """A run that ended as it should."""

    samples: list[dict[str, float]]  # as `Observer.sample` writes them, oldest first
    end: dict[str, Any]  # figures of the whole run
    summary: dict[str, Any]  # the daemon's own run summary
    said: dict[str, int]  # warnings and errors of its log, by message


def observe(
    settings: Mapping[str, Any], *, every: int, pipe: int | None = None, orders: bool = False
) -> Observed:
    """Run the daemon until its last cycle and read what was seen.

    Args: settings: `section.key` to value, on top of the defaults; every: cycles between two samples;
    pipe: the heartbeat its loop shall listen to; orders: time each order's way. Raises: BenchFailed.
    """
    with tempfile.TemporaryDirectory(prefix="perpd-bench-") as directory:
        samples, output = Path(directory) / "samples.jsonl", Path(directory) / "log.jsonl"
        spec = {
            "settings": {"run.data_dir": f"{directory}/data", "log.format": "json", **settings},
            "samples": str(samples),
            "every": every,
            "pipe": pipe,
            "orders": orders,
        }
        with output.open("wb") as log:
            code = subprocess.run(
                command("service.bench.observed", spec),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(),
                pass_fds=() if pipe is None else (pipe,),
            ).returncode
        lines = output.read_text(errors="replace").splitlines()
        if code != 0:
            raise BenchFailed(f"the daemon ended with exit code {code}: {' '.join(lines[-3:])[-1000:]}")
        taken = [json.loads(line) for line in samples.read_text().splitlines()]
        entries = [json.loads(line) for line in lines if line.startswith("{")]
    summary: dict[str, Any] = next((e for e in reversed(entries) if e.get("message") == "run summary"), {})
    said = Counter(e["message"] for e in entries if e.get("level") in ("warn", "warning", "error"))
    if len(taken) < 3 or "end" not in taken[-1]:
        raise BenchFailed(f"only {len(taken)} samples were taken; ask for more cycles")
    return Observed(taken[:-1], taken[-1]["end"], summary, dict(said))


# -- in the fresh process


class Observer:
    """Wraps the daemon's cycle.

    It lives in the process that it measures: what it notes of each cycle are numbers in arrays, since each
    number as an object would be a block more of the daemon.
    """

    def __init__(self, run_cycle: Any, file: Path, every: int) -> None:
        self._run_cycle = run_cycle
        self._file = file.open("a", encoding="utf-8", buffering=1)
        self._every = every
        self.cycle_s = array("d")
        self.analysis_s = array("d")
        self.garbage_s = array("d")
        self.garbage_cpu_s = array("d")
        self._began_s = time.monotonic()

    async def cycle(self, parts: "Parts", number: int) -> "CycleReport":
        report: CycleReport = await self._run_cycle(parts, number)
        self.cycle_s.append(report.seconds)
        self.analysis_s.append(report.analysis_s)
        self.garbage_s.append(report.garbage_s)
        self.garbage_cpu_s.append(parts.collector.last_cpu_s)
        if number % self._every == 0 or number == 1:
            self.write(self.sample(parts, number))
        return report

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()

    def sample(self, parts: "Parts", number: int) -> dict[str, float]:
        """What the tree holds now: bytes over all its processes, the rest of the daemon's own process."""
        import asyncio

        tasks = len(asyncio.all_tasks())
        # Collected, and without what start-up froze: containers that are alive and made since.
        objects = len(gc.get_objects())
        blocks = sys.getallocatedblocks()
        pids = list(tree(os.getpid(), _exchange_pids()))
        memories = [memory_of(pid) for pid in pids]
        feed = parts.feed.statistics()
        return {
            "cycle": number,
            "wall_s": time.monotonic() - self._began_s,
            "cpu_s": sum(map(cpu_s, pids)),
            "daemon_cpu_s": cpu_s(os.getpid()),
            "pss_mb": sum(memory.proportional for memory in memories) / MB,
            "uss_mb": sum(memory.unique for memory in memories) / MB,
            "anonymous_mb": sum(memory.anonymous for memory in memories) / MB,
            "daemon_pss_mb": memories[0].proportional / MB,
            "processes": len(pids),
            "objects": objects,
            "blocks": blocks,
            "tasks": tasks,
            "fds": sum(map(descriptors, pids)),
            "shadows": parts.shadows.open_count,
            "received": feed["received"],
            "closed": feed["closed"],
            "symbols": feed["symbols"],
        }


def _exchange_pids() -> frozenset[int]:
    """Children of ours that are the simulated exchange."""
    return frozenset(pid for pid in tree(os.getpid()) if b"\0service\0sim\0" in _command_line(pid))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _main(spec: dict[str, Any]) -> int:
    from service.analysis.nursery import start_nursery
    from service.settings import load

    loaded = load(None, {}, spec["settings"])
    nursery = start_nursery() if loaded.settings.analysis.workers else None
    wire = None
    if spec["orders"]:
        from service.bench.wire import watch

        wire = watch()
    from service import daemon

    observer = Observer(vars(daemon)["run_cycle"], Path(spec["samples"]), spec["every"])
    vars(daemon)["run_cycle"] = observer.cycle
    lag = None
    if spec["pipe"] is not None:
        from service.bench.heartbeat import HeartbeatLag

        lag = HeartbeatLag(spec["pipe"])
        vars(daemon)["LoopLag"] = lambda **_: lag
    code = daemon.run(loaded, nursery)
    end: dict[str, Any] = {
        "cycle_s": observer.cycle_s.tolist(),
        "analysis_s": observer.analysis_s.tolist(),
        "garbage_s": observer.garbage_s.tolist(),
        "garbage_cpu_s": observer.garbage_cpu_s.tolist(),
    }
    if lag is not None:
        seen = lag.statistics()
        end["lag"] = {
            "samples": seen.samples,
            "p50_ms": seen.p50_ms,
            "p99_ms": seen.p99_ms,
            "max_ms": seen.longest_ms,
            "seconds": lag.seconds,
        }
    if wire is not None:
        end["orders"] = wire.as_json()
    observer.write({"end": end})
    observer.close()
    return code


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
