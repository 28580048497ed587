"""`perpd memory`: ask a running daemon what its memory is spent on."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from service.monitor.asking import ANSWER_LIMIT_S, ask, directory_of
from service.monitor.table import table
from service.settings import Settings

_MB = 1024 * 1024


def run(settings: Settings, args: argparse.Namespace) -> int:
    """Ask and print. Raises DaemonUnreachable."""
    question = {"ask": "memory", "trace_s": args.trace}
    answer = ask(directory_of(settings), question, ANSWER_LIMIT_S + args.trace)
    if args.json:
        print(json.dumps(answer))  # noqa: T201
    else:
        print("\n".join(lines(answer)))  # noqa: T201
    return 0


def lines(answer: dict[str, Any]) -> Iterator[str]:
    """The answer for a reader, MB with one decimal."""
    budget = answer["budget"]
    reactions = ", ".join(budget["reactions"]) or "none"
    yield f"level {budget['level']}: {budget['pss_mb']} of {budget['limit_mb']} MB ({budget['fraction']:.0%})"
    yield f"peak {budget['pss_peak_mb']} MB, reactions: {reactions}"
    if budget["growth_mb_per_hour"] is not None:
        yield f"growth {budget['growth_mb_per_hour']:.2f} MB an hour"
    yield ""
    yield f"{'process':<18}{'pid':>9}{'PSS MB':>9}{'USS MB':>9}{'RSS MB':>9}"
    for process in answer["processes"]:
        sizes = "".join(f"{process[key] / _MB:>9.1f}" for key in ("pss_bytes", "uss_bytes", "rss_bytes"))
        yield f"{process['name']:<18}{process['pid']:>9}{sizes}"
        for kind, size in process["mapped_pss_bytes"].items():
            yield f"  {kind:<25}{size / _MB:>9.1f}"
    yield from table("part of the daemon", "KB", {k: f"{v / 1024:.1f}" for k, v in answer["parts"].items()})
    objects = answer["objects"]
    title = f"objects ({objects['followed']} followed, {objects['frozen']} frozen)"
    yield from table(title, "count", objects["by_type"])
    yield from table("tasks", "count", {"total": answer["tasks"]["total"], **answer["tasks"]["by_name"]})
    yield from table("file descriptors", "count", answer["file_descriptors"])
    if "trace" in answer:
        trace = answer["trace"]
        rows = {row["line"]: f"{row['bytes']:+d} / {row['blocks']:+d}" for row in trace["lines"]}
        yield from table(f"allocated in {trace['seconds']:g} s by line", "bytes / blocks", rows)
