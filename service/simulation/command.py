"""`perpd simulate`: many seeds, or one again, and what they found."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from service.errors import EXIT_FAILURE, EXIT_OK, SettingsInvalid

if TYPE_CHECKING:
    from pathlib import Path

    from service.simulation.run import SeedResult

DEFAULT_SEEDS = 50
DEFAULT_HOURS = 6.0
DEFAULT_JOBS = 2
DEFAULT_KILLS = 50
DEFAULT_SPEED = 120.0
PROGRESS_EVERY_S = 10.0
SEEDS_PER_PROCESS = 50  # then a fresh one: what a seed leaves behind does not add up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `perpd simulate`."""
    parser.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, metavar="N", help=f"how many (default {DEFAULT_SEEDS})"
    )
    parser.add_argument("--first", type=int, default=1, metavar="S", help="the first of them (default 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="run this one only, exactly as before")
    parser.add_argument(
        "--hours", type=float, default=DEFAULT_HOURS, metavar="H", help="market time of each (default 6)"
    )
    parser.add_argument("--jobs", type=int, default=DEFAULT_JOBS, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--sockets",
        action="store_true",
        help="one run of real processes instead: `perpd run` against `perpd sim --faults`, killed on the way",
    )
    parser.add_argument(
        "--kills", type=int, default=DEFAULT_KILLS, metavar="N", help="with --sockets (default 50)"
    )
    parser.add_argument(
        "--speed", type=float, default=DEFAULT_SPEED, metavar="X", help="with --sockets (default 120)"
    )
    parser.add_argument("--calm", action="store_true", help="no faults and no crashes")
    parser.add_argument("--log", action="store_true", help="with --seed: show the daemon's log and the wire")


def run(args: argparse.Namespace) -> int:
    """Run the seeds and print what they found; exit code 1 when anything was violated."""
    _check(args)
    if args.sockets:
        return _sockets(args)
    if args.seed is not None:
        return _replay(args)
    started_s = time.monotonic()
    results: list[SeedResult] = []
    said_s = started_s
    for result in _run_all(args):
        results.append(result)
        if result.violations:
            _say(*_failure(result))
        if time.monotonic() - said_s > PROGRESS_EVERY_S:
            said_s = time.monotonic()
            _say(f"{len(results)} of {args.seeds} seeds, {said_s - started_s:.0f} s")
    _say(*report(results, time.monotonic() - started_s))
    return EXIT_FAILURE if any(result.violations for result in results) else EXIT_OK


def _check(args: argparse.Namespace) -> None:
    for valid, name, found, allowed in (
        (args.seeds >= 1, "--seeds", args.seeds, "1 or more"),
        (args.first >= 0, "--first", args.first, "0 or more"),
        (0.1 <= args.hours <= 1_000, "--hours", args.hours, "0.1 to 1000"),
        (0 <= args.kills <= 10_000, "--kills", args.kills, "0 to 10000"),
        (1 <= args.speed <= 1_000, "--speed", args.speed, "1 to 1000"),
        (1 <= args.jobs <= 64, "--jobs", args.jobs, "1 to 64"),
        (not args.log or args.seed is not None, "--log", "no --seed", "--seed S with it"),
    ):
        if not valid:
            raise SettingsInvalid(f"{name}: found {found}, allowed is {allowed}")


def _run_all(args: argparse.Namespace) -> Iterator["SeedResult"]:
    seeds = range(args.first, args.first + args.seeds)
    usual = 0.0 if args.calm else 1.0
    tasks = [(seed, args.hours, usual, os.getpid() if args.jobs > 1 else 0) for seed in seeds]
    if args.jobs == 1:
        yield from map(_one, tasks)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    for at in range(0, len(tasks), SEEDS_PER_PROCESS * args.jobs):
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(_one, tasks[at : at + SEEDS_PER_PROCESS * args.jobs])


def _one(task: tuple[int, float, float, int]) -> "SeedResult":
    """Run one seed; a worker whose parent is gone ends instead."""
    from service.simulation.run import run_seed

    seed, hours, usual, parent = task
    if parent and os.getppid() != parent:
        os._exit(EXIT_FAILURE)
    _quiet()
    return run_seed(seed, hours, usual=usual)


def _quiet() -> None:
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=True
    )


def _replay(args: argparse.Namespace) -> int:
    """One seed again, alone in this process."""
    from service.simulation.run import run_seed

    if args.log:
        from service.logs import configure
        from service.settings import LogSettings

        configure(LogSettings(level="debug", repeats_per_window=1_000_000))
    else:
        _quiet()
    started_s = time.monotonic()

    def show(now_s: float, what: str, detail: str) -> None:
        _say(f"{now_s:12.6f} {what} {detail}")

    result = run_seed(
        args.seed, args.hours, usual=0.0 if args.calm else 1.0, on_note=show if args.log else None
    )
    _say(f"trace {result.trace}", *result.violations)
    _say(*report([result], time.monotonic() - started_s))
    return EXIT_FAILURE if result.violations else EXIT_OK


def _sockets(args: argparse.Namespace) -> int:
    """Real processes, real signals."""
    import tempfile
    from pathlib import Path

    from service.simulation.sockets import run as run_sockets

    with tempfile.TemporaryDirectory(prefix="perpd-simulate-") as directory:
        verdict = run_sockets(
            Path(directory), seed=args.seed or 1, hours=args.hours, kills=args.kills, speed=args.speed
        )
        if verdict.violations:
            _say(*verdict.violations, *_last_lines(Path(directory) / "daemon.log"))
    _say("faults injected", *(f"  {name:<38}{count:>10}" for name, count in verdict.faults.items()))
    _say(*(f"{name} {count}" for name, count in verdict.totals.items()))
    _say(
        f"{verdict.hours:g} hours over sockets, killed {verdict.kills} times, "
        f"restarted {verdict.restarts} times, violations {len(verdict.violations)}"
    )
    return EXIT_FAILURE if verdict.violations else EXIT_OK


def _last_lines(path: "Path") -> list[str]:
    return path.read_text(errors="replace").splitlines()[-20:]


def _failure(result: "SeedResult") -> list[str]:
    lines = [f"seed {result.seed}: {text}" for text in result.violations]
    return [*lines, f"again with: perpd simulate --seed {result.seed} --hours {result.hours:g}"]


def report(results: Iterable["SeedResult"], seconds: float) -> list[str]:
    """The table of all that happened, and the line that counts."""
    results = list(results)
    hours = sum(result.hours for result in results)
    sections = {
        "faults injected": Counter[str](),
        "crashes": Counter[str](),
        "restarts": Counter[str](),
        "orders of unknown outcome": Counter[str](),
        "of these resolved": Counter[str](),
        "lease": Counter[str](),
        "totals": Counter[str](),
    }
    for result in results:
        tables = (
            result.faults,
            result.deaths,
            result.restarts,
            result.unknown,
            result.resolved,
            result.lease,
            result.totals,
        )
        for counter, table in zip(sections.values(), tables, strict=True):
            counter.update(table)
    lines: list[str] = []
    for title, counter in sections.items():
        total = "" if title in ("lease", "totals") else f" {counter.total()}"
        lines.append(f"{title}{total}")
        lines += [f"  {name:<38}{count:>10}" for name, count in sorted(counter.items())]
    per_hour = seconds / hours if hours else 0.0
    lines.append(f"{hours:g} hours of trading in {seconds:.0f} s, {per_hour:.2f} s an hour")
    violations = sum(len(result.violations) for result in results)
    lines.append(f"seeds {len(results)}, violations {violations}")
    return lines


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
