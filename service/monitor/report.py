"""What `perpd memory` shows, gathered inside the daemon when it is asked for and only then."""

import asyncio
import gc
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from service.monitor.control import BadQuestion, Question
from service.monitor.explained import HeapMarks, explain
from service.monitor.guard import MemoryGuard
from service.monitor.memory import MemorySampler
from service.monitor.memory_history import Point

_TYPES_SHOWN = 15
_LINES_SHOWN = 15
_LONGEST_TRACE_S = 3_600.0
_TASK_NAMES_SHOWN = 20


class MemoryReport:
    """Answers the question "memory".

    Args: marks: the daemon's heap by named part.
    """

    def __init__(
        self,
        sampler: MemorySampler,
        guard: MemoryGuard,
        marks: HeapMarks,
        *,
        proc: Path = Path("/proc"),
    ) -> None:
        self._sampler = sampler
        self._guard = guard
        self._marks = marks
        self._proc = proc
        self._tracing = False

    async def answer(self, question: Question) -> dict[str, Any]:
        """Raises BadQuestion. Args: question: trace_s: seconds to trace allocations, absent for none."""
        trace_s = question.get("trace_s", 0)
        if not isinstance(trace_s, int | float) or not 0 <= trace_s <= _LONGEST_TRACE_S:
            raise BadQuestion(f"trace_s is 0 to {_LONGEST_TRACE_S:.0f} seconds")
        self._sampler.sample()
        answer = {
            "budget": self._budget(),
            **await explain(self._sampler.tree(), self._marks, self._proc),
            "history": self._history(),
            "objects": _objects(),
            "tasks": _tasks(),
            "file_descriptors": self._descriptors(),
        }
        # Last: what the tracer itself takes is none of the daemon's parts.
        return answer | {"trace": await self._trace(trace_s)} if trace_s else answer

    def _budget(self) -> dict[str, Any]:
        sampler, guard = self._sampler, self._guard
        return {
            "limit_mb": round(sampler.limit_mb, 1),
            "pss_mb": round(sampler.pss_mb_last, 1),
            "pss_peak_mb": round(sampler.pss_mb_peak, 1),
            "fraction": round(sampler.pss_mb_last / sampler.limit_mb, 4),
            "group_fraction": round(sampler.group_fraction(), 4),
            "pressure_pct": sampler.pressure_pct(),
            "level": guard.level.name.lower(),
            "reactions": guard.in_force,
            "growth_mb_per_hour": guard.growth_mb_per_hour,
        }

    def _history(self) -> dict[str, Any]:
        """[seconds ago, lowest, mean, highest MB], oldest first."""
        history = self._sampler.history
        return {
            "minutes": [_rounded(point) for point in history.minutes()],
            "hours": [_rounded(point) for point in history.hours()],
        }

    def _descriptors(self) -> dict[str, int]:
        kinds: Counter[str] = Counter()
        directory = self._proc / "self" / "fd"
        for name in os.listdir(directory):
            try:
                target = os.readlink(directory / name)
            except OSError:
                continue  # it was the one of this listing
            kinds["file" if target.startswith("/") else target.partition(":")[0]] += 1
        return {"total": kinds.total(), **dict(kinds.most_common())}

    async def _trace(self, seconds: float) -> dict[str, Any]:
        import tracemalloc

        if self._tracing or tracemalloc.is_tracing():
            raise BadQuestion("a trace is running already")
        self._tracing = True
        tracemalloc.start()
        try:
            before = tracemalloc.take_snapshot()
            await asyncio.sleep(seconds)
            after = tracemalloc.take_snapshot()
            cost_bytes = tracemalloc.get_tracemalloc_memory()
        finally:
            tracemalloc.stop()
            self._tracing = False
        thread = ThreadPoolExecutor(1, "trace")  # it ends with the trace
        try:
            lines = await asyncio.get_running_loop().run_in_executor(thread, _compare, before, after)
        finally:
            thread.shutdown(wait=False)  # to wait would hold the loop up where the trace is cancelled
        return {"seconds": seconds, "tracer_bytes": cost_bytes, "lines": lines}


def _rounded(point: Point) -> list[float]:
    return [round(value, 2) for value in point]


def _compare(before: Any, after: Any) -> list[dict[str, Any]]:
    import tracemalloc

    own = tracemalloc.Filter(False, tracemalloc.__file__)
    changes = after.filter_traces([own]).compare_to(before.filter_traces([own]), "lineno")
    return [
        {
            "line": f"{_short(change.traceback[0].filename)}:{change.traceback[0].lineno}",
            "bytes": change.size_diff,
            "blocks": change.count_diff,
        }
        for change in changes[:_LINES_SHOWN]
        if change.size_diff
    ]


def _short(path: str) -> str:
    """A source file's name below the place it was imported from."""
    for root in sorted(filter(None, sys.path), key=len, reverse=True):
        if path.startswith(root + "/"):
            return path[len(root) + 1 :]
    return path


def _objects() -> dict[str, Any]:
    """Objects the collector follows, by type; those of start-up are frozen and only counted."""
    followed = gc.get_objects()
    kinds = Counter(map(type, followed))
    common = {f"{kind.__module__}.{kind.__qualname__}": n for kind, n in kinds.most_common(_TYPES_SHOWN)}
    return {"followed": len(followed), "frozen": gc.get_freeze_count(), "by_type": common}


def _tasks() -> dict[str, Any]:
    tasks = asyncio.all_tasks()
    names = Counter(task.get_name().rstrip("0123456789-") for task in tasks)
    return {"total": len(tasks), "by_name": dict(names.most_common(_TASK_NAMES_SHOWN))}
