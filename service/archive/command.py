"""`perpd archive ...`: a subcommand for each thing to do with the archive, beside a running daemon or not."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import EXIT_DATA, EXIT_OK
from service.settings import Settings

if TYPE_CHECKING:
    from service.archive.retention import Removal

AddFlags = Callable[[argparse.ArgumentParser], None]
Load = Callable[[argparse.Namespace], Any]
SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
Names = Any  # argparse's subparsers have no public type


def add_arguments(parser: argparse.ArgumentParser, add_run_flags: AddFlags) -> None:
    """One subcommand each. Args: add_run_flags: adds the flags that say which data directory is meant."""
    names = parser.add_subparsers(title="what to do", required=True, metavar="WHAT", dest="what")

    def add(name: str, words: str, function: Callable[..., int]) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = names.add_parser(name, help=words, description=words)
        add_run_flags(one)
        one.set_defaults(archive_function=function)
        return one

    listing = add("ls", "list streams: records, days, files, bytes", _ls)
    listing.add_argument("--files", action="store_true", help="list every segment")
    listing.add_argument("--json", action="store_true", help="print one JSON object a line")
    verify = add("verify", "check checksums, counts and sequence numbers; exit code 65 on any fault", _verify)
    verify.add_argument("--json", action="store_true", help="print one JSON object a line")
    query = add("query", "ask in SQL; there is a view for each stream", _query)
    query.add_argument("sql", metavar="SQL", help='for instance "SELECT count(*) FROM signals"')
    _add_output(query, "table")
    export = add("export", "write one stream to a file", _export)
    export.add_argument("--stream", required=True, metavar="S")
    export.add_argument("--where", metavar="SQL", help="a condition, as in SQL")
    _add_output(export, "parquet")
    tail = add("tail", "show records as they are written", _tail)
    tail.add_argument("--stream", action="append", default=[], metavar="S", help="only this; may be repeated")
    words = "FIELD OP VALUE with = != > < >= <= ~ (contains); may be repeated"
    tail.add_argument("--where", action="append", default=[], metavar="COND", help=words)
    tail.add_argument(
        "-n", "--lines", type=_at_least(0), default=10, metavar="N", help="of each stream, first"
    )
    tail.add_argument("--no-follow", action="store_true", help="end after these")
    compact = add("compact", "turn finished segments into Parquet", _compact)
    compact.add_argument("--all", action="store_true", help="the newest segments too; no daemon may run")
    compact.add_argument("--memory-mb", type=_at_least(1), default=128, metavar="MB")
    prune = add("prune", "remove what archive.keep_days and archive.keep_mb no longer keep", _prune)
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    _add_torture(names)


def _at_least(least: int) -> Callable[[str], int]:
    """A flag's whole number."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"is {text}, allowed is {least} or more")
        return number

    return read


def _add_output(parser: argparse.ArgumentParser, format: str) -> None:
    formats = ("table", "csv", "json", "parquet")
    words = f"default: what the suffix of --out says (.csv, .json, .jsonl, .parquet), else {format}"
    parser.add_argument("--format", choices=formats, help=words)
    parser.set_defaults(format_without_suffix=format)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there")
    parser.add_argument(
        "--memory-mb", type=_at_least(1), default=256, metavar="MB", help="for the whole process"
    )


def _add_torture(names: Names) -> None:
    words = "kill a process that records under load, N times; prints what was lost or duplicated"
    torture = names.add_parser("torture", help=words, description=words)
    torture.add_argument(
        "--kills", type=_at_least(1), default=500, metavar="N", help="how often (default 500)"
    )
    torture.add_argument("--daemon", action="store_true", help="kill `perpd run` on a simulated exchange")
    torture.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default 1)")
    torture.add_argument("--directory", type=Path, metavar="DIR", help="on the disk to use")
    torture.set_defaults(archive_function=_torture)


def run(args: argparse.Namespace, load: Load) -> int:
    """Do what was asked; returns the exit code."""
    if args.what == "torture":
        code: int = args.archive_function(args)
        return code
    from service.archive.catalog import existing
    from service.directory import data_path

    settings: Settings = load(args).settings
    code = args.archive_function(args, settings, existing(data_path(settings) / "archive"))
    return code


def _say(words: str) -> None:
    print(words, flush=True)  # noqa: T201


def _warn(words: str) -> None:
    print(words, file=sys.stderr, flush=True)  # noqa: T201


def _ls(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.listing import files, streams

    rows = files(directory) if args.files else streams(directory)
    _rows(rows, as_json=args.json)
    return EXIT_OK


def _rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    from service.archive.table import table

    if as_json:
        for row in rows:
            _say(json.dumps(row))
    elif rows:
        _say("\n".join(table(list(rows[0]), [list(row.values()) for row in rows])))


def _verify(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.verification import verify

    reports = verify(directory)
    rows: list[dict[str, Any]] = [
        {
            "stream": report.stream,
            "records": report.records,
            "first": report.first,
            "last": report.last,
            "segments": report.segments,
            "gaps": report.gaps,
            "faults": len(report.findings),
        }
        for report in reports
    ]
    findings = [finding for report in reports for finding in report.findings]
    if args.json:
        rows = [
            {**row, "findings": [f.words for f in report.findings], "notes": report.notes}
            for row, report in zip(rows, reports, strict=True)
        ]
    _rows(rows, as_json=args.json)
    if not args.json:
        for words in [f.words for f in findings] + [note for r in reports for note in r.notes]:
            _say(words)
        _say("the archive is whole" if not findings else f"{len(findings)} faults")
    return EXIT_DATA if findings else EXIT_OK


def _query(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.query import query

    query(directory, args.sql, **_output(args))
    return EXIT_OK


def _output(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of query() that say how and where to. Raises QueryFailed."""
    from service.archive.query import QueryFailed

    suffix = args.out.suffix.lower() if args.out else ""
    format = args.format or SUFFIXES.get(suffix, args.format_without_suffix)
    if format == "parquet" and args.out is None:
        raise QueryFailed("Parquet is not for a terminal: name a file with --out")
    return {"format": format, "out": args.out, "memory_mb": args.memory_mb}


def _export(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.query import query

    sql = f'SELECT * FROM "{_stream(args.stream)}"' + (f" WHERE {args.where}" if args.where else "")
    query(directory, f"{sql} ORDER BY seq", **_output(args))
    return EXIT_OK


def _stream(name: str) -> str:
    from service.archive.schema import STREAMS
    from service.archive.tail import ConditionInvalid

    if name not in STREAMS:
        raise ConditionInvalid(f"there is no stream {name!r}; there are {', '.join(STREAMS)}")
    return name


def _tail(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.tail import condition, tail

    streams = [_stream(name) for name in args.stream]
    conditions = [condition(text) for text in args.where]
    try:
        follow = not args.no_follow
        for record in tail(directory, streams, conditions, args.lines, follow=follow, warn=_warn):
            _say(json.dumps(record, separators=(",", ":"), ensure_ascii=False))
    except KeyboardInterrupt:
        sys.stdout.flush()
    return EXIT_OK


def _compact(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from contextlib import nullcontext

    from service.archive.compaction import compact
    from service.archive.lock import only_upkeep, only_writer

    with only_writer(directory) if args.all else nullcontext(), only_upkeep(directory):
        done = compact(directory, args.memory_mb, newest=args.all)
    ratio = f", {done.parquet_bytes / done.json_bytes:.1%} of it" if done.json_bytes else ""
    _say(
        f"compacted {done.segments} segments, {done.records} records: {done.json_bytes} bytes of JSON lines "
        f"became {done.parquet_bytes} of Parquet{ratio}; refused {done.refused}"
    )
    return EXIT_DATA if done.refused else EXIT_OK


def _prune(args: argparse.Namespace, settings: Settings, directory: Path) -> int:
    from service.archive.lock import only_upkeep
    from service.archive.retention import prune

    if args.dry_run:
        removals = _plan(settings, directory)
        total = sum(removal.segment.size_bytes for removal in removals)
        _say(f"would remove {len(removals)} segments, {total} bytes")
        _say_what_stays(settings, directory)
        return EXIT_OK
    with only_upkeep(directory):
        removals = _plan(settings, directory)
        freed = prune(directory, removals)
    _say(f"removed {len(removals)} segments, {freed} bytes")
    _say_what_stays(settings, directory)
    return EXIT_OK


def _say_what_stays(settings: Settings, directory: Path) -> None:
    from service.archive.retention import held_back
    from service.clock import WallClock

    keep = settings.archive
    if not (keep.keep_days or keep.keep_mb):
        _say("these settings have no archive.keep_days and no archive.keep_mb: everything is kept")
    held = held_back(directory, keep.keep_days, keep.keep_mb, now_ms=WallClock().now_ms())
    for one in held:
        _say(one.words)
    if held:
        _say("`perpd dataset build --out DIR --mark-seen` marks as seen what the dataset takes in")


def _plan(settings: Settings, directory: Path) -> list["Removal"]:
    """What retention removes, told."""
    from service.archive.retention import plan
    from service.clock import WallClock

    keep = settings.archive
    removals = plan(directory, keep.keep_days, keep.keep_mb, now_ms=WallClock().now_ms())
    for removal in removals:
        _say(f"{removal.segment.path.relative_to(directory)}  {removal.segment.size_bytes}  {removal.reason}")
    return removals


def _torture(args: argparse.Namespace) -> int:
    from service.archive.torture import run

    return run("daemon" if args.daemon else "archive", args.kills, args.seed, args.directory)
