"""`perpd dataset ...`: make a training set of the archive, and look at it."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.clock import parse_time
from service.errors import EXIT_OK, HistoryUnusable, SettingsInvalid
from service.output import check_output, output_errors

if TYPE_CHECKING:
    from service.learning.dataset import Manifest
    from service.learning.seen import Mark
    from service.settings import Settings

AddFlags = Callable[[argparse.ArgumentParser], None]
Load = Callable[[argparse.Namespace], Any]

FRACTIONS = (0.7, 0.15, 0.15)
EMBARGO_HOURS = 24.0
MEMORY_MB = 512
PROCESS_MB = 232  # of the limit for Python, numpy and one chunk; the rest is DuckDB's
LEAST_MB = 64  # less than this DuckDB cannot read lines in
HOUR_MS = 3_600_000
GRACE_HOURS = 1.0  # after which a signal without candles ends: see ShadowBook.expire


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
    words = (
        "mark what the dataset took in as seen by training: retention may then remove these records from the "
        "archive by keep_days and keep_mb; the dataset keeps them"
    )
    build.add_argument("--mark-seen", action="store_true", help=words)
    words = (
        "with --mark-seen: do not wait for the outcome of a signal whose candle closed H hours before the "
        "newest outcome, as a full book of shadows never followed it; default: wait for every one"
    )
    build.add_argument("--give-up-hours", type=float, metavar="H", help=words)
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

    settings = load(args).settings
    _check_give_up(args, settings)
    archive = existing(data_path(settings) / "archive")
    check_versions(archive)
    with only_upkeep(archive):  # no segment that is read may go meanwhile, and no other build may mark
        manifest, marks = _built(args, archive)
        if args.mark_seen:
            _mark(args.out, archive, marks)
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
    if args.mark_seen:
        _say("\n".join(_told(marks, settings)))
    return EXIT_OK


def _check_give_up(args: argparse.Namespace, settings: "Settings") -> None:
    hours = args.give_up_hours
    if hours is None:
        return
    if not args.mark_seen:
        raise SettingsInvalid("--give-up-hours: says what --mark-seen waits for; give both")
    least = settings.trading.shadow_hours + GRACE_HOURS
    if not hours >= least:
        raise SettingsInvalid(
            f"--give-up-hours: found {hours:g}, allowed is {least:g} or more: "
            f"a signal is followed for trading.shadow_hours, {settings.trading.shadow_hours:g}, and an hour"
        )


def _mark(out: Path, archive: Path, marks: "list[Mark]") -> None:
    """The dataset is there, whole and on disk, before the archive may lose what it was made of."""
    from service.archive.numbers import SEEN_NAME
    from service.archive.retention import mark_seen
    from service.learning.dataset import Dataset

    with output_errors(out):
        Dataset(out).verify()
    with output_errors(archive / SEEN_NAME):
        mark_seen(archive, {mark.stream: mark.now for mark in marks})


def _told(marks: "list[Mark]", settings: "Settings") -> Iterator[str]:
    yield "seen by training, up to the record numbered:"
    for mark in marks:
        why = f"; the next is left out: {mark.why}" if mark.why else ""
        yield f"  {mark.stream}: {mark.now:,} of {mark.last:,}, before {mark.before:,}{why}"
    keep = settings.archive
    if keep.keep_days or keep.keep_mb:
        yield "retention may remove these by archive.keep_days and archive.keep_mb; the dataset keeps them"
    else:
        yield "these settings have no archive.keep_days and no archive.keep_mb: nothing is removed"


def _built(args: argparse.Namespace, archive: Path) -> "tuple[Manifest, list[Mark]]":
    from service.archive.catalog import pruned_until, seen_by_training
    from service.archive.duck import DuckError, OutOfMemory, connected
    from service.archive.query import define_views
    from service.learning.dataset import build
    from service.learning.processor import Kept, MLDataProcessor
    from service.learning.seen import ends, make_durable, marks, newest_outcome_ms, set_aside

    memory_mb = max(args.memory_mb - PROCESS_MB, LEAST_MB)
    try:
        with output_errors(args.out), connected(memory_mb, threads=2) as history:
            define_views(history, archive)
            last = ends(history)
            kept = Kept(seen_by_training(archive), {stream: pruned_until(archive, stream) for stream in last})
            given_up_ms = 0
            if args.give_up_hours is not None:
                given_up_ms = newest_outcome_ms(history) - round(args.give_up_hours * HOUR_MS)
            processor = MLDataProcessor(
                history,
                strategy=args.strategy,
                from_ms=_time("--from", args.since) if args.since else 0,
                until_ms=_time("--until", args.until) if args.until else 2**62,
                chunk_records=args.chunk_records,
                kept=kept,
                given_up_ms=given_up_ms,
            )
            embargo_ms = round(args.embargo_hours * HOUR_MS)
            manifest = build(processor, args.out, fractions=FRACTIONS, embargo_ms=embargo_ms)
            if not args.mark_seen:
                return manifest, []
            make_durable(archive)
            return manifest, marks(history, processor, last, kept, set_aside(archive))
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
