"""Whether the archive holds what it should: checksums, counts and sequence numbers of every stream."""

import fcntl
import os
from pathlib import Path

import msgspec

from service.archive.catalog import Segment, catalog, check_versions, pruned_until
from service.archive.duck import DuckError, connected, text
from service.archive.manifest import SUFFIX as MANIFEST_SUFFIX
from service.archive.manifest import sha256_of
from service.archive.numbers import LAST_NAME, read_numbers
from service.archive.quarantine import missing_ranges
from service.archive.schema import STREAMS
from service.archive.segments import envelope_of

VERIFY_MEMORY_MB = 128


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be. A gap names the sequence numbers that are missing."""

    stream: str
    what: str
    gap: tuple[int, int] | None = None

    @property
    def words(self) -> str:
        if self.gap is None:
            return f"{self.stream}: {self.what}"
        first, last = self.gap
        return f"{self.stream}: records {first} to {last} ({last - first + 1}) are missing: {self.what}"


class StreamReport(msgspec.Struct, frozen=True):
    """One stream. first is 0 where it holds nothing."""

    stream: str
    records: int
    first: int
    last: int
    segments: int
    gaps: int
    findings: list[Finding]
    notes: list[str]


def verify(directory: Path) -> list[StreamReport]:
    """Read everything. Raises SchemaNewer."""
    check_versions(directory)
    return [_verify_stream(directory, stream, being_written(directory)) for stream in STREAMS]


def being_written(directory: Path) -> bool:
    """Whether a process holds the archive's lock."""
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _verify_stream(directory: Path, stream: str, live: bool) -> StreamReport:
    findings: list[Finding] = []
    notes: list[str] = []
    noted = read_numbers(directory / LAST_NAME).get(stream, 0)  # before the files, which grow meanwhile
    segments = catalog(directory, stream)
    rows = _parquet_rows([segment.path for segment in segments if segment.compacted], stream, findings)
    expected = pruned_until(directory, stream) + 1
    records, first, last = 0, 0, 0
    for segment in segments:
        newest = segment is segments[-1]
        try:
            count, end = _verify_segment(segment, rows, findings, notes, live=live and newest)
        except FileNotFoundError:  # compacted or pruned while we read others
            return _verify_stream(directory, stream, live)
        if not count:
            continue
        if segment.first > expected:
            gap = (expected, segment.first - 1)
            findings.append(Finding(stream, _cause(directory, stream, gap), gap))
        first = first or segment.first
        records += count
        last = max(last, end)
        expected = max(expected, end + 1)
    if noted >= expected:
        gap = (expected, noted)
        findings.append(Finding(stream, _cause(directory, stream, gap), gap))
    gaps = sum(finding.gap is not None for finding in findings)
    return StreamReport(stream, records, first, last, len(segments), gaps, findings, notes)


def _cause(directory: Path, stream: str, gap: tuple[int, int]) -> str:
    """Why no segment holds them: a manifest left behind tells the name of the one that is gone."""
    left = sorted((directory / stream).rglob(f"*{MANIFEST_SUFFIX}"))
    for path in left:
        segment = path.name.removesuffix(MANIFEST_SUFFIX)
        if not any(path.with_name(segment + suffix).exists() for suffix in (".jsonl", ".parquet")):
            first = int(segment.removeprefix(f"{stream}-").split("-")[0])
            if gap[0] <= first <= gap[1]:
                return f"the segment {path.parent.name}/{segment} is gone"
    return "no segment holds them"


def _verify_segment(
    segment: Segment, rows: dict[Path, int], findings: list[Finding], notes: list[str], *, live: bool
) -> tuple[int, int]:
    """(records, last sequence number) of one segment; what is wrong with it goes to `findings`."""
    stream, manifest = segment.stream, segment.manifest
    where = f"{segment.path.parent.name}/{segment.path.name}"
    if manifest is not None and sha256_of(segment.path) != manifest.sha256:
        findings.append(Finding(stream, f"{where} differs from its checksum"))
    if segment.compacted:
        assert segment.last is not None
        if manifest is None:
            findings.append(Finding(stream, f"{where} has no manifest"))
            return rows.get(segment.path, 0), segment.last
        count, missing, end = rows.get(segment.path, 0), manifest.missing, segment.last
    else:
        count, end, torn = _scan(segment.path)
        missing = missing_ranges(segment.path, manifest.last + 1 if manifest else None)
        if torn and not live:
            notes.append(f"{stream}: {where} ends with a torn line of {torn} bytes, cut at the next start")
    if manifest is not None and count != manifest.records:
        findings.append(Finding(stream, f"{where} has {count} records, its manifest says {manifest.records}"))
    for gap in missing:
        aside = manifest is not None and list(gap) in [list(known) for known in manifest.missing]
        why = f"set aside in quarantine with {segment.path.stem}" if aside else f"{where} is damaged there"
        findings.append(Finding(stream, why, (gap[0], gap[1])))
    return count, end


def _scan(path: Path) -> tuple[int, int, int]:
    """(readable records, last sequence number, bytes of an unfinished last line)."""
    count = end = 0
    line = b""
    with path.open("rb") as file:
        for line in file:
            envelope = envelope_of(line)
            if envelope is not None and line.endswith(b"\n"):
                count, end = count + 1, envelope.seq
    return count, end, 0 if line.endswith(b"\n") else len(line)


def _parquet_rows(paths: list[Path], stream: str, findings: list[Finding]) -> dict[Path, int]:
    """Rows by file, from the files themselves."""
    rows: dict[Path, int] = {}
    if not paths:
        return rows
    with connected(VERIFY_MEMORY_MB) as connection:
        for path in paths:
            try:
                sql = f"SELECT num_rows FROM parquet_file_metadata({text(path)})"
                found = connection.execute(sql).fetchone()
            except DuckError as error:
                if path.exists():
                    words = " ".join(str(error).split())[:200]
                    findings.append(Finding(stream, f"{path.name} cannot be read: {words}"))
                continue
            rows[path] = int(found[0]) if found else 0
    return rows
