"""A training set on disk: chunks of examples by split, and a manifest that says where they come from.

DIR/manifest.json
DIR/<split>-<number>.npz     arrays of one chunk, uncompressed, at most `chunk_records` examples
"""

import contextlib
import shutil
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from service.archive.segments import sync_directory, sync_file
from service.errors import HistoryUnusable
from service.learning.processor import Chunk, Counts, MLDataProcessor
from service.learning.splits import SPLITS, Split, embargo_within, split_by_time

VERSION = 1
MANIFEST = "manifest.json"


class SplitFiles(msgspec.Struct, frozen=True):
    """One split of a dataset."""

    name: str
    from_ms: int
    until_ms: int
    records: int
    chunks: tuple[str, ...]  # file names, oldest first


class Manifest(msgspec.Struct, frozen=True):
    """What a dataset holds and what it left out."""

    version: int
    strategy: str
    features: tuple[str, ...]  # the columns, in order
    splits: tuple[SplitFiles, ...]
    embargo_ms: int
    embargo_asked_ms: int
    read: int
    kept: int
    dropped: dict[str, int]  # by reason
    joined: int  # signals with exactly one outcome
    outcomes: int  # outcomes in the archive over the same span
    one_to_one: bool


class Dataset:
    """A dataset that is there. Raises HistoryUnusable: none is, or one of another version."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            found = msgspec.json.decode((directory / MANIFEST).read_bytes())
            if (version := found.get("version")) != VERSION:
                raise HistoryUnusable(
                    f"dataset {directory} has version {version}, this perpd reads {VERSION}; build it again"
                )
            self.manifest = msgspec.convert(found, Manifest)
        except (OSError, msgspec.MsgspecError, AttributeError) as error:
            why = f"{MANIFEST}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise HistoryUnusable(
                f"{directory} is no dataset: {why}; make one with `perpd dataset build --out {directory}`"
            ) from None

    def chunks(self, split: str) -> Iterator[Chunk]:
        """The split's chunks, oldest first, one in memory at a time."""
        for files in self.manifest.splits:
            if files.name != split:
                continue
            for name in files.chunks:
                with np.load(self._directory / name, allow_pickle=False) as arrays:
                    yield Chunk(**{key: arrays[key] for key in Chunk._fields})

    def verify(self) -> None:
        """Read it all and bring it to the disk. Raises HistoryUnusable: it is not as its manifest says."""
        for files in self.manifest.splits:
            try:
                found = sum(self._examples(chunk) for chunk in self.chunks(files.name))
            except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
                raise HistoryUnusable(
                    f"{self._directory}: {files.name} cannot be read back: {error}"
                ) from None
            if found != files.records:
                raise HistoryUnusable(
                    f"{self._directory}: {files.name} has {found} examples, its manifest says {files.records}"
                )
            for name in files.chunks:
                sync_file(self._directory / name)
        sync_file(self._directory / MANIFEST)
        for place in (self._directory, self._directory.resolve().parent):
            sync_directory(place)

    def _examples(self, chunk: Chunk) -> int:
        """How many a chunk has. Raises ValueError: its arrays do not fit each other."""
        records = chunk.opened_ms.size
        if chunk.features.shape != (records, len(self.manifest.features)):
            raise ValueError(f"features of the shape {chunk.features.shape} for {records} examples")
        if any(len(column) != records for column in chunk):
            raise ValueError(f"columns of different lengths, {records} examples")
        return int(records)


def build(
    processor: MLDataProcessor, directory: Path, *, fractions: tuple[float, float, float], embargo_ms: int
) -> Manifest:
    """Write the dataset; it appears under its name once it is whole.

    Raises HistoryUnusable: the directory is in use, or a split would be empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise HistoryUnusable(f"{directory} is not empty; name a new directory with --out")
    moments = processor.moments
    span_ms = moments[-1].candle_close_ms - moments[0].candle_close_ms
    embargo = embargo_within(embargo_ms, span_ms)
    splits = split_by_time(moments, fractions, embargo)
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        files = _write_chunks(processor, splits, new)
        manifest = _manifest(processor, splits, files, embargo, embargo_ms)
        (new / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        if empty := [split.name for split in manifest.splits if not split.records]:
            raise HistoryUnusable(_nothing_left(manifest, empty))
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        new.rename(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return manifest


def _write_chunks(processor: MLDataProcessor, splits: list[Split], directory: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {name: [] for name in SPLITS}
    for split, chunk in processor.chunks(splits):
        name = f"{split}-{len(files[split]):05d}.npz"
        np.savez(directory / name, **chunk._asdict())
        files[split].append(name)
    return files


def _manifest(
    processor: MLDataProcessor,
    splits: list[Split],
    files: dict[str, list[str]],
    embargo_ms: int,
    embargo_asked_ms: int,
) -> Manifest:
    counts: Counts = processor.counts
    return Manifest(
        version=VERSION,
        strategy=processor.strategy,
        features=processor.names,
        splits=tuple(
            SplitFiles(s.name, s.from_ms, s.until_ms, counts.kept[s.name], tuple(files[s.name]))
            for s in splits
        ),
        embargo_ms=embargo_ms,
        embargo_asked_ms=embargo_asked_ms,
        read=counts.read,
        kept=counts.kept.total(),
        dropped={reason: count for reason, count in counts.dropped.items() if count},
        joined=counts.joined,
        outcomes=counts.outcomes,
        one_to_one=counts.one_to_one,
    )


def _nothing_left(manifest: Manifest, empty: list[str]) -> str:
    dropped = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "nothing"
    return (
        f"{' and '.join(empty)} would be empty: of {manifest.read} signals these were dropped: {dropped}; "
        "record a longer span, or ask for a shorter --embargo-hours"
    )


def day_and_time(at_ms: int) -> str:
    """As 2025-10-10 21:15, UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
