"""DuckDB on the archive: the only file that imports it, loaded by processes that end, never by the daemon."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from service.archive.schema import columns, former_columns, select_list

_SHORTEST_BUFFER_BYTES = 1 << 20
_EXPLAIN = re.compile(r"\s*explain\b(\s+analyze\b)?(\s*\(\s*(analyze|format)\b[^()]*\))?", re.IGNORECASE)
_CHANGES = re.compile(r"\b(copy|insert|update|delete|merge)\b", re.IGNORECASE)
_READS = re.compile(r"\s*(select|from|pivot|unpivot)\b", re.IGNORECASE)

DuckError = duckdb.Error
OutOfMemory = duckdb.OutOfMemoryException
Connection = duckdb.DuckDBPyConnection


@contextmanager
def connected(memory_mb: int, threads: int = 1, *, ordered: bool = False) -> Iterator[Connection]:
    """A database in memory, within its limit; what does not fit goes to a temporary directory.

    Args: ordered: rows keep the order of their files, which costs memory where there is more than one thread.
    """
    with tempfile.TemporaryDirectory(prefix="perpd-duckdb-") as spill:
        connection = duckdb.connect()
        try:
            connection.execute(f"SET memory_limit = '{memory_mb}MiB'")
            connection.execute("SET autoinstall_known_extensions = false")  # never the network
            connection.execute(f"SET threads = {threads}")
            connection.execute(f"SET temp_directory = {text(spill)}")
            connection.execute(f"SET preserve_insertion_order = {str(ordered).lower()}")
            yield connection
        finally:
            connection.close()


def confine(connection: Connection, directory: Path, out: Path | None) -> None:
    """From here on SQL opens files below the archive alone, and `out`; the session cannot undo it.

    Args: directory: resolved, as the files in the SQL of the views must be: links are followed first.
    """
    written = [] if out is None else [out.absolute(), out.resolve()]
    # What replaces a file is written beside it first, under this name of DuckDB's.
    written += [path.with_name(f"tmp_{path.name}") for path in written]
    connection.execute(f"SET allowed_directories = {_list([directory])}")
    connection.execute(f"SET allowed_paths = {_list(written)}")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def only_reads(connection: Connection, sql: str) -> str:
    """Why this is not one statement that only reads; empty when it is.

    Raises DuckError: it is no SQL, or asks for what is not there.
    """
    statements = connection.extract_statements(sql)
    if not statements:
        return "the query is empty; ask for instance SELECT count(*) FROM signals"
    if len(statements) > 1:
        return f"{len(statements)} statements; ask one at a time"
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what it explains.
        asked = _EXPLAIN.match(sql)
        return only_reads(connection, sql[asked.end() :]) if asked else "EXPLAIN must come first"
    # A PIVOT without its values is several statements inside, and so is a COPY of one.
    if kind == duckdb.StatementType.SELECT or (kind == duckdb.StatementType.MULTI and _READS.match(sql)):
        if _CHANGES.search(sql):
            # WITH may hold a COPY or an INSERT, but only at the top level: one level down it does not bind.
            connection.execute(f"EXPLAIN SELECT * FROM ({sql}\n)")
        return ""
    reading = "SELECT, WITH, DESCRIBE, SUMMARIZE, SHOW, EXPLAIN"
    return f"{kind.name} is not allowed, a query only reads ({reading}); a file is written with --out FILE"


def json_rows(stream: str, paths: Sequence[Path], *, strict: bool, longest_bytes: int) -> str:
    """SQL for the records of segments of JSON lines, typed.

    Args: strict: a line or value that cannot be read is an error; otherwise it is left out or null;
    longest_bytes: no line is longer. The reader's buffers are twice as large.
    """
    types = {column.name: column.read_as for column in columns(stream)} | former_columns(stream)
    fields = ", ".join(f"{text(name)}: {text(kind)}" for name, kind in types.items())
    return (
        f"SELECT {select_list(stream, strict=strict)} FROM read_json({_list(paths)}, "
        f"format = 'newline_delimited', columns = {{{fields}}}, ignore_errors = {str(not strict).lower()}, "
        f"maximum_object_size = {max(longest_bytes, _SHORTEST_BUFFER_BYTES)}, compression = 'none')"
        + ("" if strict else " WHERE seq IS NOT NULL")  # a line that cannot be read is a row of nulls
    )


def parquet_rows(stream: str, paths: Sequence[Path]) -> str:
    """SQL for the records of compacted segments, in the present schema."""
    wanted = ", ".join(f'NULL::{column.read_as} AS "{column.name}"' for column in columns(stream))
    former = "".join(f', NULL::{kind} AS "{name}"' for name, kind in former_columns(stream).items())
    # An older file lacks the columns that came later: an empty relation beside it adds them as null.
    raw = (
        f"SELECT * FROM (SELECT {wanted}{former}) WHERE false UNION ALL BY NAME "
        f"SELECT * FROM read_parquet({_list(paths)}, union_by_name = true)"
    )
    return f"SELECT {select_list(stream, strict=False)} FROM ({raw})"


def no_rows(stream: str) -> str:
    """SQL for nothing, with the stream's columns."""
    wanted = ", ".join(f'NULL::{column.type} AS "{column.name}"' for column in columns(stream))
    return f"SELECT * FROM (SELECT {wanted}) WHERE false"


def text(value: str | Path) -> str:
    """As an SQL literal."""
    return "'" + str(value).replace("'", "''") + "'"


def _list(paths: Sequence[Path]) -> str:
    return "[" + ", ".join(text(path) for path in paths) + "]"
