"""argv to one function per command. Imports are lazy: a command loads only what it runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from service.errors import EXIT_INTERRUPTED, EXIT_USAGE, PerpdError

RUN_FLAGS = {
    "mode": ("run.mode",),
    "cycles": ("run.cycles",),
    "data_dir": ("run.data_dir",),
    "speed": ("sim.speed",),
    "replay": ("sim.replay",),
    "from_time": ("sim.from_time",),
    "until_time": ("sim.until_time",),
    "seed": ("sim.seed",),
    "symbols": ("market.symbols", "sim.symbols"),
}


class Parser(argparse.ArgumentParser):
    """argparse with the field's exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def run_command(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code. Errors with a name become one line that says what to do."""
    parser = build_parser(argv[0] if argv else "")
    args = parser.parse_args(argv)
    try:
        code: int = args.function(args)
        return code
    except PerpdError as error:
        report(error, as_json=getattr(args, "json", False))
        return error.exit_code
    except BrokenPipeError:  # the reader of our output left, as in `perpd config | head`
        sys.stdout = None
        return 0
    except KeyboardInterrupt:  # a command that answers; those that run take signals themselves
        return EXIT_INTERRUPTED


def report(error: PerpdError, *, as_json: bool = False) -> None:
    """One log line for the error that ends the command, in the format the reader expects.

    Args: as_json: one JSON object, on a terminal too.
    """
    import structlog

    from service.logs import configure, log_failure
    from service.settings import LogSettings

    if not structlog.is_configured():
        configure(LogSettings(format="json" if as_json else "auto"))
    log_failure(error)


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of all commands; what is below `bench`, `archive`, `dataset` and `store`, which a daemon
    need not hold, only where that is the command."""
    parser = Parser(prog="perpd", description="A trading daemon for perpetual futures.")
    parser.add_argument("--version", action="version", version=f"perpd {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    run = commands.add_parser("run", help="trade: simulated by default, on paper, or live")
    _add_run_arguments(run)
    run.set_defaults(function=_run)

    config = commands.add_parser("config", help="print the effective settings and where each came from")
    _add_run_arguments(config)
    config.add_argument("--json", action="store_true", help="print one JSON object")
    config.set_defaults(function=_config)

    memory = commands.add_parser("memory", help="ask a running daemon what its memory is spent on")
    _add_run_arguments(memory)
    memory.add_argument("--trace", type=_seconds, default=0, metavar="N", help="trace allocations for N s")
    memory.add_argument("--json", action="store_true", help="print one JSON object")
    memory.set_defaults(function=_memory)

    check = commands.add_parser("check", help="is everything as trading needs it? changes nothing")
    _add_run_arguments(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(function=_check)

    from service.trading.kill_names import COMMANDS

    for name, (action, words) in COMMANDS.items():
        kill = commands.add_parser(name, help=words)
        _add_run_arguments(kill)
        kill.add_argument("--reason", default="", metavar="TEXT", help="kept with the switch and in the log")
        kill.add_argument("--json", action="store_true", help="print one JSON object")
        kill.set_defaults(function=_kill, action=action)

    performance = commands.add_parser("performance", help="ask a running daemon where its time goes")
    _add_run_arguments(performance)
    performance.add_argument("--json", action="store_true", help="print one JSON object")
    performance.set_defaults(function=_performance)

    store = commands.add_parser("store", help="migrate, back up, restore or copy the state")
    if command == "store":
        from service.store.command import add_arguments as add_store_arguments

        add_store_arguments(store, _add_run_arguments)
    store.set_defaults(function=_store)

    sim = commands.add_parser("sim", help="serve a simulated Binance USD-M futures exchange on loopback")
    from service.exchange.simulated.command import add_arguments

    add_arguments(sim)
    sim.set_defaults(function=_sim)

    simulate = commands.add_parser(
        "simulate", help="trade through seeded faults and crashes, in virtual time"
    )
    from service.simulation.command import add_arguments as add_simulate_arguments

    add_simulate_arguments(simulate)
    simulate.set_defaults(function=_simulate)

    bench = commands.add_parser("bench", help="measure perpd on this machine")
    if command == "bench":
        from service.bench.command import add_arguments as add_bench_arguments

        add_bench_arguments(bench)
    bench.set_defaults(function=_bench)

    archive = commands.add_parser("archive", help="list, verify, query, export or tidy what was recorded")
    if command == "archive":
        from service.archive.command import add_arguments as add_archive_arguments

        add_archive_arguments(archive, _add_run_arguments)
    archive.set_defaults(function=_archive)

    dataset = commands.add_parser("dataset", help="make a training set of the archive, and look at it")
    if command == "dataset":
        from service.learning.command import add_arguments as add_dataset_arguments

        add_dataset_arguments(dataset, _add_source_arguments)
    dataset.set_defaults(function=_dataset)
    return parser


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run's data directory is meant."""
    parser.add_argument("--mode", help="sim (default), paper or live")
    parser.add_argument("--data-dir", metavar="DIR", help="where candles, state and archive live")
    parser.add_argument("--config", metavar="F", type=Path, help="settings file, TOML")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", help="sim (default), paper or live")
    parser.add_argument("--cycles", type=int, metavar="N", help="stop after N cycles; 0 runs for ever")
    parser.add_argument("--speed", type=float, metavar="X", help="simulated time runs X times as fast")
    parser.add_argument("--replay", metavar="DIR", help="trade recorded candles from DIR")
    parser.add_argument("--from", dest="from_time", metavar="T", help="start of the replay, ISO 8601, UTC")
    parser.add_argument("--until", dest="until_time", metavar="T", help="end of the replay, ISO 8601, UTC")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the simulated market")
    parser.add_argument("--symbols", type=int, metavar="N", help="size of the universe")
    parser.add_argument("--data-dir", metavar="DIR", help="where candles, state and archive live")
    parser.add_argument("--config", metavar="F", type=Path, help="settings file, TOML")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 3_600:
        raise argparse.ArgumentTypeError("is 0 to 3600 seconds")
    return seconds


def _load(args: argparse.Namespace) -> Any:
    import os

    from service.settings import load

    file = args.config or (Path(os.environ["PERPD_CONFIG"]) if os.environ.get("PERPD_CONFIG") else None)
    flags = {
        key: getattr(args, name)
        for name, keys in RUN_FLAGS.items()
        for key in keys
        if getattr(args, name, None) is not None
    }
    if getattr(args, "json", False) and args.function is not _config:  # which shows what is in force
        flags["log.format"] = "json"
    return load(file, os.environ, flags)


def _run(args: argparse.Namespace) -> int:
    loaded = _load(args)
    nursery = None
    if loaded.settings.analysis.workers:
        # Before asyncio, threads and the daemon's other imports: workers are copies of this small process.
        from service.analysis.nursery import start_nursery

        nursery = start_nursery()
    from service.daemon import run

    return run(loaded, nursery)


def _config(args: argparse.Namespace) -> int:
    from service.settings import effective

    loaded = _load(args)
    rows = effective(loaded)
    if args.json:
        print(json.dumps({key: {"value": value, "source": source} for key, value, source in rows}))  # noqa: T201
        return 0
    width = max(len(f"{key} = {json.dumps(value)}") for key, value, _ in rows)
    for key, value, source in rows:
        print(f"{f'{key} = {json.dumps(value)}':<{width}}  # {source}")  # noqa: T201
    for name in loaded.secrets.__struct_fields__:
        print(f"{name} is {'set' if getattr(loaded.secrets, name) else 'not set'}")  # noqa: T201
    return 0


def _memory(args: argparse.Namespace) -> int:
    from service.monitor.memory_command import run

    return run(_load(args).settings, args)


def _check(args: argparse.Namespace) -> int:
    from service.check.command import run

    return run(_load(args), args)


def _kill(args: argparse.Namespace) -> int:
    from service.trading.kill_command import run

    return run(_load(args), args, args.action)


def _performance(args: argparse.Namespace) -> int:
    from service.monitor.performance_command import run

    return run(_load(args).settings, args)


def _store(args: argparse.Namespace) -> int:
    from service.store.command import run

    return run(_load(args), args)


def _sim(args: argparse.Namespace) -> int:
    from service.exchange.simulated.command import run

    return run(args)


def _simulate(args: argparse.Namespace) -> int:
    from service.simulation.command import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from service.bench.command import run

    return run(args)


def _archive(args: argparse.Namespace) -> int:
    from service.archive.command import run

    return run(args, _load)


def _dataset(args: argparse.Namespace) -> int:
    from service.learning.command import run

    return run(args, _load)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("perpd")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
