"""`perpd bench memory`: the founding table. One market under the profiles before and after, part by part."""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.bench.machine import machine
from service.bench.processes import BenchFailed, answer_of, command, environment
from service.bench.result import Figure, Result

NAME = "memory"
SUMMARY = "the founding table: what each of four parts holds under the profiles before and after"
MEASURES = (
    "The real daemon with its nursery and workers, its account on paper, over a seeded market that moves a "
    "minute when a cycle has ended; under config/profiles/before.toml, then after.toml, in fresh processes. "
    "Parts: the most bytes each of them held of its own at any time. Results: of a batch, as its lane holds "
    "them until the next. Buffers: the fullest stream, and all streams together. History: the last "
    "operations, in all and per kind. As at a cycle a minute, the CPU counts as idle and buffers are written "
    "between two cycles. Identical: every record of the archive but for its times, and every operation."
)
PROFILES = Path(__file__).resolve().parents[2] / "config" / "profiles"
SPARE_MINUTES = 1
# Part, what of it, its high-water mark with the unit, and the saving that the report estimates in percent.
PARTS = (
    ("ParallelAnalyzer", "results of a batch, mean", "batch_mean_bytes", "bytes", 30.0),
    ("ParallelAnalyzer", "results of a batch, largest", "batch_bytes", "bytes", 30.0),
    ("DataArchiver", "fullest buffer", "stream_records", "records", 50.0),
    ("DataArchiver", "a full buffer, mean", "full_mean_bytes", "bytes", 50.0),
    ("DataArchiver", "all buffers", "buffer_bytes", "bytes", 50.0),
    ("PerformanceMonitor", "history", "history_bytes", "bytes", 50.0),
    ("FeatureCache", "entries", "cache_bytes", "bytes", 50.0),
)
# Operations whose number depends on the batch size, the buffer size or the wall clock.
VARYING = frozenset(("analysis.batch", "archive.flush", "archive.sync", "memory sample"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="1 to 700 (default 200)")
    parser.add_argument("--candles", type=int, default=200, metavar="M", help="120 to 500 (default 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument(
        "--cycles", type=int, default=180, metavar="N", help="of a market minute each (default 180)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    parameters = {name: getattr(args, name) for name in ("symbols", "candles", "workers", "cycles", "seed")}
    with tempfile.TemporaryDirectory(prefix="perpd-bench-") as directory:
        market = {
            "directory": directory,
            "symbols": args.symbols,
            "candles": args.candles,
            "minutes": args.cycles + SPARE_MINUTES,
            "seed": args.seed,
        }
        answer_of("service.bench.minutes", market)
        before, after = (_run(name, Path(directory), args) for name in ("before", "after"))
        archives = [dict(_records(Path(directory) / name / "archive")) for name in ("before", "after")]
    differences = [*differing(*archives), *uncounted(before, after, archives)]
    records = sum(map(len, archives[0].values()))
    if not min(before["batches"], after["batches"]):
        raise BenchFailed("too few batches were analysed; ask for more symbols or cycles")
    details = {"before": before, "after": after, "differences": differences}
    notes = (_verdict(differences, records, sum(before["kept"].values())),)
    return Result(NAME, MEASURES, parameters, facts, figures(before, after, differences), details, notes)


def _run(profile: str, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The daemon under one profile until its last cycle. Raises BenchFailed."""
    seen, output = directory / f"{profile}.json", directory / f"{profile}.log"
    spec = {
        "profile": str(PROFILES / f"{profile}.toml"),
        "market": str(directory),
        "seen": str(seen),
        "settings": {
            "run.mode": "paper",
            "run.data_dir": str(directory / profile),
            "run.cycles": args.cycles,
            "market.symbols": args.symbols,
            "market.candles": args.candles,
            "analysis.workers": args.workers,
            "log.format": "json",
        },
    }
    with output.open("wb") as log:
        code = subprocess.run(
            command("service.bench.founding", spec),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
        ).returncode
    if code != 0 or not seen.exists():
        words = " ".join(output.read_text(errors="replace").splitlines()[-3:])[-1000:]
        raise BenchFailed(f"the daemon under {profile}.toml ended with exit code {code}: {words}")
    found: dict[str, Any] = json.loads(seen.read_text())
    return found


def _records(archive: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each stream's records without their times, in the order they were written."""
    for stream in sorted(path for path in archive.iterdir() if path.is_dir()):
        lines = [line for file in sorted(stream.rglob("*.jsonl")) for line in file.read_bytes().splitlines()]
        yield stream.name, [timeless(json.loads(line)) for line in lines]


_HOW = frozenset({"seconds", "batches", "series_reused", "series_computed"})


def timeless(value: Any) -> Any:
    """Without when it happened and how it was computed (how long, in how many batches, what was at hand).

    A candle's time is the market's.
    """
    if isinstance(value, dict):
        return {name: timeless(one) for name, one in value.items() if not _is_time(name)}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def _is_time(name: str) -> bool:
    if name == "candle_close_ms":
        return False
    return name.endswith(("_ms", "_s")) or name in _HOW


def differing(
    before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]
) -> Iterator[str]:
    """In words, what the two archives do not have in common, record by record."""
    for stream in sorted(before.keys() | after.keys()):
        ones, others = before.get(stream, []), after.get(stream, [])
        if len(ones) != len(others):
            yield f"{stream}: {len(ones)} records before, {len(others)} after"
        for number, (one, other) in enumerate(zip(ones, others, strict=False), 1):
            if one != other:
                names = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
                yield f"{stream} {number}: {', '.join(names)}"


def uncounted(
    before: dict[str, Any], after: dict[str, Any], archives: list[dict[str, list[dict[str, Any]]]]
) -> Iterator[str]:
    """In words, every record that was handed over and not kept, and every operation that was not counted."""
    for name, seen, archive in zip(("before", "after"), (before, after), archives, strict=True):
        kept = {stream: len(records) for stream, records in archive.items() if records}
        if kept != seen["put"]:
            yield f"{name}: records put {seen['put']}, kept {kept}"
        if seen["kept"] != seen["recorded"]:
            lost = Counter(seen["recorded"]) - Counter(seen["kept"])
            yield f"{name}: operations recorded and not counted {dict(lost)}"
    for kind in sorted((before["kept"].keys() | after["kept"].keys()) - VARYING):
        if (one := before["kept"].get(kind, 0)) != (other := after["kept"].get(kind, 0)):
            yield f"operation {kind}: {one} before, {other} after"


def _verdict(differences: list[str], records: int, operations: int) -> str:
    if differences:
        return f"identical: no, {len(differences)} differences, the first: {differences[0]}"
    return f"identical: yes, {records:,} records and {operations:,} operations, none lost"


def figures(before: dict[str, Any], after: dict[str, Any], differences: list[str]) -> tuple[Figure, ...]:
    """The table: each part before and after, and what it saves; then the whole."""
    rows: list[Figure] = []
    for part, what, key, unit, estimate in PARTS:
        if not before[key]:
            continue  # in so short a run no buffer was full
        saving = (1 - after[key] / before[key]) * 100
        rows += [
            Figure(f"{part}, {what}, before", before[key], unit),
            Figure(f"{part}, {what}, after", after[key], unit, "less"),
            Figure(f"{part}, {what}, saving", saving, "%", "more", estimate),
        ]
    for title, pick in (("peak", max), ("warm", lambda values: values[-1])):
        rows += [
            Figure(f"PSS of the tree, {title}, before", pick(before["pss_mb"]), "MB"),
            Figure(f"PSS of the tree, {title}, after", pick(after["pss_mb"]), "MB", "less"),
        ]
    for name, seen in (("before", before), ("after", after)):
        rows += [
            Figure(f"cycle p50, {name}", statistics.median(seen["cycle_s"]) * 1000, "ms"),
            Figure(f"cycle mean, {name}", statistics.mean(seen["cycle_s"]) * 1000, "ms"),
            Figure(f"records in all buffers at most, {name}", seen["buffer_records"], "records"),
            Figure(f"bytes in one buffer at most, {name}", seen["stream_bytes"], "bytes"),
        ]
    rows.append(Figure("differences", len(differences), "records", "less", 0.0))
    return tuple(rows)
