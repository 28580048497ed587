"""From finished segments of JSON lines to Parquet, in a process that ends and has a memory limit of its own.

One segment at a time: checked against its manifest, written beside it under another name, compared with it
row by row, renamed; only then the JSON lines go. Killed at any moment, each record is in one of the two.
"""

from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.archive.duck import DuckError, connected, json_rows, parquet_rows, text
from service.archive.manifest import Manifest, manifest_path, read_manifest, seal, sha256_of, write_manifest
from service.archive.quarantine import missing_ranges, set_aside
from service.archive.schema import STREAMS, check_version, columns, former_columns, version
from service.archive.segments import (
    LONGEST_LINE_BYTES,
    parquet_path,
    parquet_range,
    parquets,
    segments,
    sync_directory,
    sync_file,
)
from service.errors import EXIT_IO, PerpdError

log = structlog.get_logger("archive.compaction")

DEFAULT_MEMORY_MB = 128
ROW_GROUP_ROWS = 20_480  # a reader holds one row group of the columns it asks for


class Compacted(msgspec.Struct, frozen=True):
    """What one run did."""

    segments: int
    records: int
    json_bytes: int
    parquet_bytes: int
    refused: int  # segments left as they are, each with its reason in the log


class CompactionFailed(PerpdError):
    """A segment cannot be compacted; its JSON lines stay as they are."""

    exit_code = EXIT_IO


def compact(directory: Path, memory_mb: int = DEFAULT_MEMORY_MB, *, newest: bool = False) -> Compacted:
    """Compact every finished segment. The newest of each stream is the writer's.

    Args: newest: that one too; the caller holds the archive's lock.
    """
    count = records = json_bytes = parquet_bytes = refused = 0
    for stream in STREAMS:
        for segment in segments(directory, stream) if newest else finished(directory, stream):
            try:
                manifest = compact_one(directory, segment, stream, memory_mb)
            except (CompactionFailed, OSError, ValueError, PerpdError) as error:
                refused += 1
                log.error("a segment is not compacted", segment=str(segment), reason=str(error))
                continue
            if manifest is not None:
                count += 1
                records += manifest.records
                json_bytes += manifest.source_bytes
                parquet_bytes += manifest.size_bytes
    return Compacted(count, records, json_bytes, parquet_bytes, refused)


def finished(directory: Path, stream: str) -> list[Path]:
    """Segments of JSON lines that nothing is appended to any more."""
    return segments(directory, stream)[:-1]


def compact_one(directory: Path, segment: Path, stream: str, memory_mb: int) -> Manifest | None:
    """The manifest of the Parquet file; None for an empty segment, which goes, or one compacted before.

    Raises: CompactionFailed; SchemaNewer; OSError.
    """
    if _compacted_before(segment, stream, directory):
        _remove(segment)
        return None
    source = _checked(directory, segment, stream)
    if source is None:
        _remove(segment)
        return None
    check_version(stream, source.version, str(segment))
    _check_fields(segment, stream)
    target = parquet_path(segment, source.last)
    new = target.with_name(target.name + ".new")
    try:
        _write(segment, stream, new, source, memory_mb)
        sync_file(new)
        manifest = _manifest(source, new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
    write_manifest(target, manifest)
    sync_directory(target.parent)
    _remove(segment)
    return manifest


def _manifest(source: Manifest, parquet: Path) -> Manifest:
    size, sha256 = parquet.stat().st_size, sha256_of(parquet)
    number = version(source.stream)  # older records were brought up to it
    return msgspec.structs.replace(source, size_bytes=size, sha256=sha256, version=number)


def _compacted_before(segment: Path, stream: str, directory: Path) -> bool:
    """A run that was killed between the rename and the end left both: the Parquet file is whole."""
    first = int(segment.stem.rpartition("-")[2])
    for path in parquets(directory, stream):
        if parquet_range(path)[0] == first:
            source = read_manifest(segment)
            if read_manifest(path) is None and source is not None:
                write_manifest(path, _manifest(source, path))
            return read_manifest(path) is not None
    return False


def _checked(directory: Path, segment: Path, stream: str) -> Manifest | None:
    """The segment's manifest, once its bytes and numbers agree with it; a damaged middle is set aside."""
    manifest = read_manifest(segment)
    changed = manifest is not None and sha256_of(segment) != manifest.sha256
    known = manifest.missing if manifest is not None else []
    missing = missing_ranges(segment, manifest.last + 1 if manifest is not None else None)
    if missing and (changed or missing != known):
        return set_aside(directory, segment, stream, missing)
    if changed:
        raise CompactionFailed("its checksum differs from its manifest, though every line can be read")
    return manifest or seal(segment, stream)


def _check_fields(segment: Path, stream: str) -> None:
    """A field that has no column would be lost. All lines of a version have the same fields."""
    known = {column.name for column in columns(stream)} | set(former_columns(stream))
    with segment.open("rb") as file:
        first = file.readline()
        file.seek(max(segment.stat().st_size - LONGEST_LINE_BYTES, 0))
        *_, last = file
    for line in (first, last):
        fields: dict[str, Any] = msgspec.json.decode(line)
        if unknown := sorted(set(fields) - known):
            raise CompactionFailed(f"fields without a column, known to a newer perpd perhaps: {unknown}")


def _write(segment: Path, stream: str, new: Path, source: Manifest, memory_mb: int) -> None:
    # Read by one thread in the order of the lines, which is that of their numbers: no sort, little memory.
    rows = json_rows(stream, [segment], strict=True, longest_bytes=source.longest_bytes)
    with connected(memory_mb, ordered=True) as connection:
        try:
            connection.execute(
                f"COPY ({rows}) TO {text(new)} "
                f"(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 9, ROW_GROUP_SIZE {ROW_GROUP_ROWS})"
            )
            before = connection.execute(_content(rows)).fetchone()
            after = connection.execute(_content(parquet_rows(stream, [new]))).fetchone()
        except DuckError as error:
            raise CompactionFailed(" ".join(str(error).split())[:300]) from None
    if before != after or after is None or after[0] != source.records:
        raise CompactionFailed(f"what was written differs from the segment: {before} rows became {after}")


def _content(rows: str) -> str:
    """Count, range and an order-free hash of all values of all rows."""
    return f"SELECT count(*), min(seq), max(seq), sum(hash(r)::HUGEINT) FROM ({rows}) AS r"


def _remove(segment: Path) -> None:
    segment.unlink(missing_ok=True)
    manifest_path(segment).unlink(missing_ok=True)
