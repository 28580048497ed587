"""Compaction and retention in one process that ends: what the daemon starts at a quiet time.

python -m service.archive.upkeep '{"directory": ..., "memory_mb": ..., "keep_days": {}, "keep_mb": {}}'
"""

import os
import sys

import msgspec

from service.settings import LogSettings


class Task(msgspec.Struct, frozen=True):
    """What one run is told."""

    directory: str
    memory_mb: int
    keep_days: dict[str, float]
    keep_mb: dict[str, float]


class Outcome(msgspec.Struct, frozen=True):
    """What one run did: segments compacted and refused, bytes before and after, bytes pruned."""

    segments: int
    records: int
    json_bytes: int
    parquet_bytes: int
    refused: int
    pruned_bytes: int


def main(argument: str) -> int:
    """Do it; the outcome is the last line on stdout, as JSON."""
    from pathlib import Path

    from service.archive.compaction import compact
    from service.archive.lock import only_upkeep
    from service.archive.retention import plan, prune
    from service.clock import WallClock
    from service.logs import configure

    task = msgspec.json.decode(argument, type=Task)
    configure(LogSettings(format="json", level="warn"))
    os.nice(19)
    directory = Path(task.directory)
    with only_upkeep(directory):
        done = compact(directory, task.memory_mb)
        removals = plan(directory, task.keep_days, task.keep_mb, now_ms=WallClock().now_ms())
        pruned_bytes = prune(directory, removals)
    outcome = Outcome(**msgspec.structs.asdict(done), pruned_bytes=pruned_bytes)
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
