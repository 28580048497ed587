"""`perpd memory`: ask a running daemon what its memory is spent on."""

import argparse
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.directory import market_name
from service.errors import DaemonUnreachable
from service.monitor.control import SOCKET_NAME, short_path
from service.settings import Settings

_ANSWER_LIMIT_S = 30.0
_MB = 1024 * 1024


def run(settings: Settings, args: argparse.Namespace) -> int:
    """Ask and print. Raises DaemonUnreachable."""
    directory = (
        Path(settings.run.data_dir) if settings.run.data_dir else Path(".perpd") / market_name(settings)
    )
    answer = ask(directory, {"ask": "memory", "trace_s": args.trace}, _ANSWER_LIMIT_S + args.trace)
    if args.json:
        print(json.dumps(answer))  # noqa: T201
    else:
        print("\n".join(lines(answer)))  # noqa: T201
    return 0


def ask(directory: Path, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The daemon's answer. Raises DaemonUnreachable: none runs there, it does not answer, or refuses."""
    advice = "is it running? name its data directory with --data-dir"
    try:
        with short_path(directory) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(limit_s)
            connection.connect(path)
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
    except (OSError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DaemonUnreachable(
            f"no daemon answers at {directory / SOCKET_NAME}: {reason}; {advice}"
        ) from None
    if not line:
        raise DaemonUnreachable(f"the daemon at {directory} ended the connection; ask again") from None
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise DaemonUnreachable(f"the daemon at {directory} refused: {answer['error']}")
    return answer


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
    yield from _table("part of the daemon", "KB", {k: f"{v / 1024:.1f}" for k, v in answer["parts"].items()})
    objects = answer["objects"]
    title = f"objects ({objects['followed']} followed, {objects['frozen']} frozen)"
    yield from _table(title, "count", objects["by_type"])
    yield from _table("tasks", "count", {"total": answer["tasks"]["total"], **answer["tasks"]["by_name"]})
    yield from _table("file descriptors", "count", answer["file_descriptors"])
    if "trace" in answer:
        trace = answer["trace"]
        rows = {row["line"]: f"{row['bytes']:+d} / {row['blocks']:+d}" for row in trace["lines"]}
        yield from _table(f"allocated in {trace['seconds']:g} s by line", "bytes / blocks", rows)


def _table(title: str, unit: str, rows: dict[str, Any]) -> Iterator[str]:
    yield ""
    width = max(len(title), *(len(name) for name in rows), 40) if rows else len(title)
    yield f"{title:<{width}} {unit:>16}"
    for name, value in rows.items():
        yield f"{name:<{width}} {value:>16}"
