"""`perpd bench NAME`: run one benchmark in fresh processes and print what it found."""

import argparse
import json
from types import ModuleType

from service.errors import EXIT_OK, SettingsInvalid

NAMES = (
    "cycle",
    "memory",
    "features",
    "imports",
    "archive",
    "query",
    "dataset",
    "soak",
    "loop",
    "orders",
    "pool",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each benchmark."""
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME", dest="benchmark")
    for name in NAMES:
        module = _module(name)
        one = names.add_parser(name, help=module.SUMMARY, description=module.MEASURES)
        module.add_arguments(one)
        one.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises BenchFailed, SettingsInvalid."""
    from service.bench.place import cleaned_up_on_signal
    from service.bench.result import table

    _check(args)
    with cleaned_up_on_signal():
        result = _module(args.benchmark).measure(args)
    print(json.dumps(result.as_json()) if args.json else table(result))  # noqa: T201
    return EXIT_OK


BOUNDS = {
    "symbols": (1, 700),
    "candles": (120, 500),
    "workers": (0, 64),
    "rounds": (2, 10_000),
    "records": (1_000, 100_000_000),
    "cycles": (3, 10_000_000),
    "seconds": (1, 86_400),
    "seed": (0, 2**31),
    "positions": (1, 600),
}


def _check(args: argparse.Namespace) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise SettingsInvalid(f"--{name}: found {value}, allowed is {low} to {high}")


def _module(name: str) -> ModuleType:
    from importlib import import_module

    return import_module(f"service.bench.{name}")
