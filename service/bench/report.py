"""A short round of all benchmarks, written as a page: `python -m service.bench.report docs/benchmarks.md`."""

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.bench.processes import environment
from service.bench.result import Figure, shown

PLOT = "soak.svg"  # beside the page


def rounds(plot: Path) -> list[list[str]]:
    """The commands of a short round, after `perpd bench`."""
    return [
        ["cycle", "--symbols", "200", "--candles", "200", "--workers", "2"],
        ["cycle", "--symbols", "650", "--candles", "500", "--workers", "2"],
        ["memory"],
        ["features"],
        ["imports", "--top", "8"],
        ["archive"],
        ["query"],
        ["dataset", "--records", "1000000"],
        ["orders"],
        ["pool"],
        ["soak", "--cycles", "600", "--plot", str(plot)],
        ["loop", "--cycles", "30"],
    ]


def page(results: list[tuple[list[str], dict[str, Any]]], at: datetime, plot: str) -> str:
    """The results as Markdown. `at`: when the round began."""
    machine = {k: v for k, v in results[0][1]["machine"].items() if k != "load_average_1m"}
    lines = [
        "# Benchmarks",
        "",
        f"Measured {at:%Y-%m-%d %H:%M} UTC by `make bench`, a short round; the values are those of one run, "
        "on a machine that may have had other work.",
        "They are rounded against us: up where less is better, down where more is. `perpd bench NAME` runs "
        "one of them, `--json` gives unrounded values.",
        "",
        "| machine | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in machine.items()),
    ]
    for arguments, result in results:
        lines += ["", *_section(arguments, result)]
        if result["benchmark"] == "soak":
            lines += ["", f"![what the daemon held, over its cycles]({plot})"]
    return "\n".join(lines) + "\n"


def _section(arguments: list[str], result: dict[str, Any]) -> list[str]:
    load = result["machine"]["load_average_1m"]
    lines = [
        f"## `perpd bench {shlex.join(arguments)}`",
        "",
        f"{result['measures']} Load average before it: {load}.",
        "",
        "| | value | unit | goal | |",
        "|---|---:|---|---|---|",
    ]
    for name, entry in result["figures"].items():
        figure = Figure(name, entry["value"], entry["unit"], entry["better"], entry["goal"])
        row = (name, shown(figure), figure.unit, figure.goal_words, figure.verdict)
        lines.append(f"| {' | '.join(row)} |")
    if notes := result.get("notes"):
        lines += ["", *notes]
    return lines


def run_one(arguments: list[str]) -> dict[str, Any]:
    """Raises CalledProcessError; what the benchmark says about its failure is on stderr or stdout."""
    print("perpd bench", shlex.join(arguments), file=sys.stderr, flush=True)  # noqa: T201
    done = subprocess.run(
        [sys.executable, "-m", "service", "bench", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)  # noqa: T201
        done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    file = Path(sys.argv[1])
    began = datetime.now(UTC)
    results = [(arguments, run_one(arguments)) for arguments in rounds(file.with_name(PLOT))]
    file.write_text(page(results, began, PLOT), encoding="utf-8")


if __name__ == "__main__":
    main()
