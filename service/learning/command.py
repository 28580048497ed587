"""`perpd dataset ...`: make a training set of the archive, and look at it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.clock import parse_time
from service.errors import EXIT_OK, HistoryUnusable, SettingsInvalid
from service.output import check_output, output_errors

if TYPE_CHECKING:
    from service.learning.dataset import Manifest

AddFlags = Callable[[argparse.ArgumentParser], None]
Load = Callable[[argparse.Namespace], Any]

FRACTIONS = (0.7, 0.15, 0.15)
EMBARGO_HOURS = 24.0
MEMORY_MB = 512
PROCESS_MB = 232  # of the limit for Python, numpy and one chunk; the rest is DuckDB's
LEAST_MB = 64  # less than this DuckDB cannot read lines in
HOUR_MS = 3_600_000


def add_arguments(parser: argparse.ArgumentParser, add_source: AddFlags) -> None:
    """Args: add_source: adds the flags that say which data directory is meant."""
    names = parser.add_subparsers(title="what to do", required=True, metavar="WHAT", dest="what")

    def add(name: str, words: str, function: Callable[..., int]) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = names.add_parser(name, help=words, description=words)
        one.set_defaults(dataset_function=function)
        return one

    build = add("build", "join signals to their outcomes, clean, encode, split, write chunks", _build)
    add_source(build)
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    build.add_argument("--from", dest="since", metavar="T", help="first candle close, ISO 8601, UTC")
    build.add_argument("--until", metavar="T", help="last candle close, ISO 8601, UTC")
    build.add_argument("--strategy", default="", metavar="NAME", help="whose signals; default the first's")
    build.add_argument(
        "--embargo-hours",
        type=float,
        default=EMBARGO_HOURS,
        metavar="H",
        help=f"between two splits (default {EMBARGO_HOURS:g}); at most 5 %% of the span",
    )
    build.add_argument(
        "--chunk-records", type=int, default=50_000, metavar="N", help="in memory at once (default 50000)"
    )
    build.add_argument(
        "--memory-mb", type=int, default=MEMORY_MB, metavar="MB", help=f"for the process ({MEMORY_MB})"
    )
    describe = add(
        "describe", "class balance, feature ranges, missing values, drift between splits", _describe
    )
    describe.add_argument("dataset", type=Path, metavar="DIR")
    describe.add_argument("--json", action="store_true", help="print one JSON object")
    describe.add_argument("--image", type=Path, metavar="FILE", help="write an SVG image there")
    make = add("generate", "make up a history of any size, for benchmarks", _generate)
    make.add_argument("--records", type=int, default=100_000, metavar="N", help="signals (default 100000)")
    make.add_argument("--symbols", type=int, default=100, metavar="N", help="default 100")
    make.add_argument("--seed", type=int, default=1, metavar="N", help="default 1")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new data directory")


def run(args: argparse.Namespace, load: Load) -> int:
    """Do what was asked; returns the exit code."""
    code: int = args.dataset_function(args, load)
    return code


def _say(words: str) -> None:
    print(words)  # noqa: T201


def _build(args: argparse.Namespace, load: Load) -> int:
    from service.archive.catalog import check_versions, existing
    from service.archive.lock import only_upkeep
    from service.directory import data_path

    archive = existing(data_path(load(args).settings) / "archive")
    check_versions(archive)
    with only_upkeep(archive):  # no segment that is read may go meanwhile
        manifest = _built(args, archive)
    _say(f"{args.out}: {manifest.kept:,} of {manifest.read:,} signals of {manifest.strategy}")
    for split in manifest.splits:
        _say(f"  {split.name}: {split.records:,} in {len(split.chunks)} chunks")
    for reason, count in manifest.dropped.items():
        _say(f"  dropped, {reason}: {count:,}")
    cut = " (5 % of the span)" if manifest.embargo_ms < manifest.embargo_asked_ms else ""
    _say(f"  embargo {manifest.embargo_ms / HOUR_MS:.1f} h{cut}")
    _say(
        f"  labels joined one to one: {'yes' if manifest.one_to_one else 'no'} "
        f"({manifest.joined:,} signals, {manifest.outcomes:,} outcomes)"
    )
    return EXIT_OK


def _built(args: argparse.Namespace, archive: Path) -> "Manifest":
    from service.archive.duck import DuckError, OutOfMemory, connected
    from service.archive.query import define_views
    from service.learning.dataset import build
    from service.learning.processor import MLDataProcessor

    memory_mb = max(args.memory_mb - PROCESS_MB, LEAST_MB)
    try:
        with output_errors(args.out), connected(memory_mb, threads=2) as history:
            define_views(history, archive)
            processor = MLDataProcessor(
                history,
                strategy=args.strategy,
                from_ms=_time("--from", args.since) if args.since else 0,
                until_ms=_time("--until", args.until) if args.until else 2**62,
                chunk_records=args.chunk_records,
            )
            embargo_ms = round(args.embargo_hours * HOUR_MS)
            return build(processor, args.out, fractions=FRACTIONS, embargo_ms=embargo_ms)
    except OutOfMemory:
        raise HistoryUnusable(
            f"{memory_mb} MB, which --memory-mb {args.memory_mb} leaves for the history, are not enough; "
            f"give more, or take fewer records at once than --chunk-records {args.chunk_records}"
        ) from None
    except DuckError as error:
        raise HistoryUnusable(
            f"the archive at {archive} cannot be read: {' '.join(str(error).split())[:300]}; "
            "`perpd archive verify` tells what is damaged"
        ) from None


def _time(flag: str, text: str) -> int:
    try:
        return parse_time(text)
    except ValueError as error:
        raise SettingsInvalid(f"{flag}: {error}") from None


def _describe(args: argparse.Namespace, load: Load) -> int:
    from service.learning.dataset import Dataset
    from service.learning.describe import as_json, describe, lines
    from service.learning.picture import svg

    if args.image:
        check_output(args.image)
    description = describe(Dataset(args.dataset))
    if args.image:
        with output_errors(args.image):
            args.image.write_text(svg(description), encoding="utf-8")
    _say(json.dumps(as_json(description)) if args.json else "\n".join(lines(description)))
    return EXIT_OK


def _generate(args: argparse.Namespace, load: Load) -> int:
    from service.learning.synthetic import Size, generate

    with output_errors(args.out):
        made = generate(args.out / "archive", Size(args.records, args.symbols, args.seed))
    _say(f"{args.out}: {made:,} signals, each with its outcome")
    return EXIT_OK
