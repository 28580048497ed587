"""`perpd memory`: ask a running daemon what its memory is spent on."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from service.directory import data_path
from service.monitor.asking import ANSWER_LIMIT_S, ask
from service.monitor.table import table
from service.settings import Settings

_MB = 1024 * 1024


def run(settings: Settings, args: argparse.Namespace) -> int:
    """Ask and print. Raises DaemonUnreachable."""
    question = {"ask": "memory", "trace_s": args.trace}
    answer = ask(data_path(settings), question, ANSWER_LIMIT_S + args.trace)
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
    yield (
        f"explained: {answer['explained_fraction']:.1%} of the tree's {answer['pss_bytes'] / _MB:.1f} MB, "
        f"{answer['processes'][0]['explained_fraction']:.1%} of the daemon's own process"
    )
    yield ""
    yield f"{'process':<36}{'pid':>9}{'PSS MB':>9}{'USS MB':>9}{'RSS MB':>9}"
    for process in answer["processes"]:
        sizes = "".join(f"{process[key] / _MB:>9.1f}" for key in ("pss_bytes", "uss_bytes", "rss_bytes"))
        yield f"{process['name']:<36}{process['pid']:>9}{sizes}"
        for part, size in sorted(process["parts"].items(), key=lambda item: -item[1]):
            yield f"  {part:<43}{size / _MB:>9.2f}"
        if process is answer["processes"][0]:
            yield f"  {_rest(answer['unexplained_bytes']):<43}{answer['unexplained_bytes'] / _MB:>9.2f}"
    for title, points in (("last hour", "minutes"), ("last month", "hours")):
        yield from _history(title, answer["history"][points])
    objects = answer["objects"]
    title = f"objects ({objects['followed']} followed, {objects['frozen']} frozen)"
    yield from table(title, "count", objects["by_type"])
    yield from table("tasks", "count", {"total": answer["tasks"]["total"], **answer["tasks"]["by_name"]})
    yield from table("file descriptors", "count", answer["file_descriptors"])
    if "trace" in answer:
        trace = answer["trace"]
        rows = {row["line"]: f"{row['bytes']:+d} / {row['blocks']:+d}" for row in trace["lines"]}
        yield from table(f"allocated in {trace['seconds']:g} s by line", "bytes / blocks", rows)


def _rest(unexplained_bytes: int) -> str:
    return "not explained" if unexplained_bytes >= 0 else "explained twice"


_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def _history(title: str, points: list[list[float]]) -> Iterator[str]:
    """One line of bars over the highest values: from the lowest of them to the highest, oldest first."""
    if not points:
        return
    highs = [high for _, _, _, high in points]
    # More points than columns: each column shows the highest of its points.
    columns = min(len(highs), _WIDTH)
    shown = [max(highs[len(highs) * n // columns : len(highs) * (n + 1) // columns]) for n in range(columns)]
    low, high = min(low for _, low, _, _ in points), max(highs)
    span = max(high - low, 1.0)  # less than a megabyte is drawn flat
    bars = "".join(_BARS[min(int((value - low) / span * len(_BARS)), len(_BARS) - 1)] for value in shown)
    yield ""
    yield f"{title}, PSS {low:.1f} to {high:.1f} MB: {bars}"
