"""`perpd performance`: ask a running daemon where its time goes and what would help."""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from service.directory import data_path
from service.monitor.asking import ANSWER_LIMIT_S, ask
from service.monitor.table import table
from service.settings import Settings

_COLUMNS = (("p50_s", "p50"), ("p95_s", "p95"), ("p99_s", "p99"), ("longest_s", "longest"))


def run(settings: Settings, args: argparse.Namespace) -> int:
    """Ask and print. Raises DaemonUnreachable."""
    answer = ask(data_path(settings), {"ask": "performance"}, ANSWER_LIMIT_S)
    print(json.dumps(answer) if args.json else "\n".join(lines(answer)))  # noqa: T201
    return 0


def lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """The answer for a reader: advice first, times in milliseconds."""
    for number, advice in enumerate(answer["advice"], 1):
        yield f"{number}. {advice['text']}"
    if not answer["advice"]:
        yield "nothing to advise: all measured values are within their limits"
    yield ""
    yield from _bottleneck(answer)
    operations = answer["operations"]
    width = max([len(kind) for kind in operations] + [len("operation, ms")])
    heads = "".join(f"{title:>10}" for _, title in _COLUMNS)
    yield f"{'operation, ms':<{width}}{'count':>10}{'a second':>10}{heads}"
    for kind, one in sorted(operations.items(), key=lambda item: -item[1]["total_s"]):
        times = "".join(f"{one[key] * 1000:>10.2f}" for key, _ in _COLUMNS)
        yield f"{kind:<{width}}{one['count']:>10}{one['per_second']:>10.3f}{times}"
    yield ""
    yield f"slowest of the last {answer['recent_operations']} operations, ms"
    for one in answer["slowest_recent"]:
        yield f"{one['operation']:<{width}}{one['seconds'] * 1000:>10.2f}"
    lag = answer["loop_lag"]
    yield from table(
        "loop lag", "ms", {name: f"{lag[f'{name}_ms']:.2f}" for name in ("p50", "p99", "longest")}
    )
    caches = {
        name: f"{use['hit_fraction']:.0%} of {use['hits'] + use['misses']}"
        for name, use in answer["caches"].items()
    }
    if caches:
        yield from table("cache", "hits", caches)
    if answer["events"]:
        yield from table("event", "count", dict(sorted(answer["events"].items())))


def _bottleneck(answer: Mapping[str, Any]) -> Iterator[str]:
    shares, cycle = answer["cycle_shares"], answer["operations"].get("cycle")
    if not shares or cycle is None:
        return
    parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    used = cycle["p95_s"] / answer["interval_s"]
    yield f"a cycle takes {cycle['p50_s'] * 1000:.1f} ms (p95 {used:.1%} of its interval): {parts}"
    yield ""
