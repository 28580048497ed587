"""SQL over the archive: a view for each stream, over hot and compacted segments together.

Beside it, `<stream>_once` has one row for each thing that the stream tells of. A change is told again, and
after an older state was restored what happened since is booked and told again.
"""

import csv
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import msgspec

from service.archive.catalog import catalog, check_versions
from service.archive.duck import (
    Connection,
    DuckError,
    confine,
    connected,
    json_rows,
    no_rows,
    only_reads,
    parquet_rows,
    text,
)
from service.archive.schema import STREAMS
from service.archive.segments import LONGEST_LINE_BYTES
from service.archive.table import table
from service.errors import EXIT_USAGE, DataDirectoryUnusable, PerpdError
from service.output import check_output, output_errors

PROCESS_MB = 128  # what the process needs beside what DuckDB counts
LEAST_MB = 64  # less than this DuckDB cannot read lines in
ONCE = {
    "signals": "signal_id",
    "decisions": "signal_id",
    "orders": "client_order_id",
    "fills": "symbol, trade_id",
    "positions": "position_id",
    # The private stream and the income history number a payment differently: the ledger knows it by its hour.
    "adjustments": "CASE WHEN kind = 'funding' THEN symbol || ':' || round(at_ms / 3600000.0)::BIGINT "
    "ELSE adjustment_id END",
    "shadow_outcomes": "position_id",
}
"""What tells one thing from another in a stream, as SQL. Cycles are told once."""
_SHOWN_ROWS = 1_000
_TRIES = 3


class QueryFailed(PerpdError):
    """The SQL cannot be run, or needs more memory than it may have."""

    exit_code = EXIT_USAGE


def define_views(connection: Connection, directory: Path, *, longest_bytes: int = LONGEST_LINE_BYTES) -> None:
    """The views on the files that are there now. Args: longest_bytes: of a line."""
    for stream in STREAMS:
        segments = catalog(directory, stream)
        compacted = [segment.path for segment in segments if segment.compacted]
        hot = [segment.path for segment in segments if not segment.compacted and segment.size_bytes]
        parts = [parquet_rows(stream, compacted)] if compacted else []
        parts += [json_rows(stream, hot, strict=False, longest_bytes=longest_bytes)] if hot else []
        rows = " UNION ALL ".join(f"({part})" for part in parts) or no_rows(stream)
        connection.execute(f'CREATE OR REPLACE VIEW "{stream}" AS {rows}')
        if key := ONCE.get(stream):  # by number alone: whole records would be held to be sorted
            newest = f'SELECT max(seq) FROM "{stream}" GROUP BY {key}'
            connection.execute(
                f'CREATE OR REPLACE VIEW "{stream}_once" AS SELECT * FROM "{stream}" WHERE seq IN ({newest})'
            )


def query(directory: Path, sql: str, *, format: str, out: Path | None, memory_mb: int) -> None:
    """Run one statement that only reads and write its result; files are written to `out` alone, and none
    outside the archive is read.

    Raises: QueryFailed, SchemaNewer, DataDirectoryUnusable: `out` cannot be written.
    """
    check_versions(directory)
    if out is not None:
        _check_out(out, directory)
    sql, directory = sql.strip().rstrip(";"), directory.resolve()
    with connected(max(memory_mb - PROCESS_MB, LEAST_MB)) as connection:
        confine(connection, directory, out)
        longest_bytes = 0
        for attempt in range(_TRIES):
            try:
                define_views(connection, directory, longest_bytes=longest_bytes)
                if refusal := only_reads(connection, sql):
                    raise QueryFailed(refusal)
                _answer(connection, sql, format, out)
                return
            except DuckError as error:
                words = " ".join(str(error).split())
                # A segment that was compacted meanwhile is under its new name when asked again.
                if attempt < _TRIES - 1 and ("No files found" in words or "No such file" in words):
                    continue
                if not longest_bytes and "maximum_object_size" in words:
                    longest_bytes = LONGEST_LINE_BYTES
                    continue
                if "disabled by configuration" in words or "disabled through configuration" in words:
                    words = f"a query reads the archive at {directory} and nothing else: {words}"
                raise QueryFailed(words[:1_000]) from None


def _check_out(out: Path, directory: Path) -> None:
    if out.resolve().is_relative_to(directory.resolve()):
        raise DataDirectoryUnusable(f"{out}: is inside the archive; name a file elsewhere")
    check_output(out)


def _answer(connection: Connection, sql: str, format: str, out: Path | None) -> None:
    if out is not None and format != "table":
        connection.execute(f"COPY ({sql}\n) TO {text(out)} ({_copy_options(format)})")
        return
    result = connection.execute(sql)
    names = [column[0] for column in result.description or ()]
    rows = _rows(result)
    if out is None:
        _print(names, rows, format, sys.stdout)
        return
    with output_errors(out), out.open("w", encoding="utf-8") as file:
        _print(names, rows, format, file)


def _copy_options(format: str) -> str:
    return {
        "csv": "FORMAT csv, HEADER",
        "json": "FORMAT json",
        "parquet": "FORMAT parquet, COMPRESSION zstd",
    }[format]


def _rows(result: Any) -> Iterator[tuple[Any, ...]]:
    while some := result.fetchmany(1_000):
        yield from some


def _print(names: list[str], rows: Iterator[tuple[Any, ...]], format: str, file: TextIO) -> None:
    if format == "json":
        for row in rows:
            file.write(msgspec.json.encode(dict(zip(names, row, strict=True))).decode() + "\n")
    elif format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        shown = list(islice(rows, _SHOWN_ROWS))
        file.write("\n".join(table(names, shown)) + "\n")
        if next(rows, None) is not None:
            file.write(f"(the first {_SHOWN_ROWS} rows; --format csv or json gives all)\n")
