"""`perpd bench query`: SQL over a large archive, in how much memory; what compaction makes of JSON lines."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from service.bench.machine import machine
from service.bench.place import add_argument, place, temporary_in
from service.bench.processes import answer_of
from service.bench.result import Figure, Result

NAME = "query"
SUMMARY = "SQL over a large archive within a memory limit, and how small Parquet is"
MEASURES = (
    "A seeded history (signals 20 %, decisions 40 %, shadow outcomes 40 %) is written as JSON lines in "
    "segments of 50,000 records and compacted one after the other by the archive's own compaction, in one "
    "process; the newest segment of each stream stays as lines. Each query then runs in a fresh process with "
    "`--memory-mb 256`. Peak: the highest resident memory of a process, libraries and code included."
)
PEAK_GOAL_MB = 256.0
RATIO_GOAL_PCT = 15.0
MEMORY_MB = 256
BYTES_A_RECORD = 300  # lines and Parquet at their most, 236 at 300,000 records, and what queries spill
MB = 1024 * 1024
QUERIES = {
    "refusals by reason": "SELECT reason, count(*) AS n FROM decisions GROUP BY reason ORDER BY n DESC",
    "win rate by hour": (
        "SELECT date_trunc('hour', epoch_ms(closed_ms)) AS hour, avg((outcome_r > 0)::INT), avg(outcome_r) "
        "FROM shadow_outcomes GROUP BY hour ORDER BY hour"
    ),
    "signals joined to outcomes": (
        "SELECT symbol, count(*), avg(outcome_r), avg(features['rsi']) FROM signals JOIN "
        "(SELECT signal_id, outcome_r FROM shadow_outcomes) USING (signal_id) GROUP BY symbol ORDER BY symbol"
    ),
    "ten largest": "SELECT * FROM shadow_outcomes ORDER BY favourable_excursion DESC LIMIT 10",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=int, default=1_000_000, metavar="N", help="in the archive (default 1000000)"
    )
    add_argument(parser)


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    with place(args.directory, args.records * BYTES_A_RECORD) as directory:
        archive, own = str(directory / "archive"), temporary_in(directory)
        spec = {"make": archive, "records": args.records}
        made = answer_of("service.bench.query", spec, variables=own)
        asked = {
            name: answer_of("service.bench.query", {"ask": archive, "sql": sql}, variables=own)
            for name, sql in QUERIES.items()
        }
    figures = [
        Figure("records", args.records, "records"),
        Figure(
            "Parquet over JSON lines",
            made["parquet_bytes"] / max(made["json_bytes"], 1) * 100,
            "%",
            "less",
            RATIO_GOAL_PCT,
        ),
        Figure("made and compacted", made["records"] / made["seconds"], "records/s", "more"),
        Figure("peak memory of making and compacting", made["peak_mb"], "MB", "less"),
    ]
    for name, answer in asked.items():
        figures.append(Figure(f"{name}: time", answer["seconds"], "s", "less"))
        figures.append(Figure(f"{name}: peak memory", answer["peak_mb"], "MB", "less", PEAK_GOAL_MB))
    parameters = {"records": args.records, "memory_mb": MEMORY_MB}
    return Result(NAME, MEASURES, parameters, facts, tuple(figures), {"made": made, "asked": asked})


# -- in the fresh process


def _main(spec: dict[str, Any]) -> None:
    began_s = time.perf_counter()
    found = _make(spec) if "make" in spec else _ask(spec)
    found |= {"seconds": time.perf_counter() - began_s, "peak_mb": _peak_mb()}
    print(json.dumps(found))  # noqa: T201


def _make(spec: dict[str, Any]) -> dict[str, Any]:
    from service.bench.history import SHARES, make_history

    manifests = make_history(Path(spec["make"]), spec["records"])
    by_stream = {name: [one for one in manifests if one.stream == name] for name in SHARES}
    return {
        "records": sum(one.records for one in manifests),
        "json_bytes": sum(one.source_bytes for one in manifests),
        "parquet_bytes": sum(one.size_bytes for one in manifests),
        "by_stream": {
            name: {
                "json_bytes": sum(one.source_bytes for one in found),
                "parquet_bytes": sum(one.size_bytes for one in found),
            }
            for name, found in by_stream.items()
        },
    }


def _ask(spec: dict[str, Any]) -> dict[str, Any]:
    from service.archive.query import query

    with tempfile.TemporaryDirectory() as beside:
        out = Path(beside) / "answer.json"
        query(Path(spec["ask"]), spec["sql"], format="json", out=out, memory_mb=MEMORY_MB)
        return {"rows": len(out.read_text().splitlines())}


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / MB


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
