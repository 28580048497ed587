"""`perpd archive ...`: a subcommand for each thing to do with the archive, beside a running daemon or not."""

import argparse
from collections.abc import Callable
from pathlib import Path

AddFlags = Callable[[argparse.ArgumentParser], None]


def add_arguments(parser: argparse.ArgumentParser, add_run_flags: AddFlags) -> None:
    """One subcommand each. Args: add_run_flags: adds the flags that say which data directory is meant."""
    names = parser.add_subparsers(title="what to do", required=True, metavar="WHAT", dest="what")
    _add_torture(names)


def _add_torture(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    words = "kill a process that records under load, N times; prints what was lost or duplicated"
    torture = names.add_parser("torture", help=words, description=words)
    torture.add_argument("--kills", type=int, default=500, metavar="N", help="how often (default 500)")
    torture.add_argument("--daemon", action="store_true", help="kill `perpd run` on a simulated exchange")
    torture.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default 1)")
    torture.add_argument("--directory", type=Path, metavar="DIR", help="on the disk to use")
    torture.set_defaults(archive_function=_torture)


def _torture(args: argparse.Namespace) -> int:
    from service.archive.torture import run

    return run("daemon" if args.daemon else "archive", args.kills, args.seed, args.directory)


def run(args: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code."""
    code: int = args.archive_function(args)
    return code
