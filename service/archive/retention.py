"""What may be removed, and its removal: by age and size, oldest first, never the newest, never unseen.

Age is measured against the newest record of its stream, at most now: neither a clock that jumps nor a record
stamped in the future makes the others old.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from service.archive.catalog import Segment, catalog, pruned_until, seen_by_training
from service.archive.manifest import manifest_path
from service.archive.numbers import PRUNED_NAME, SEEN_NAME, write_numbers
from service.archive.schema import STREAMS
from service.errors import SettingsInvalid

log = structlog.get_logger("archive.retention")

DAY_MS = 86_400_000
MB = 1_000_000
# Training joins these; of the others nothing has to be seen before it may go.
TRAINING_STREAMS = frozenset(("signals", "decisions", "positions", "shadow_outcomes"))


class Removal(msgspec.Struct, frozen=True):
    """One segment that retention removes, and why."""

    segment: Segment
    reason: str


class Held(msgspec.Struct, frozen=True):
    """The oldest segments of one stream, which the settings no longer keep and training has not seen."""

    stream: str
    segments: list[Segment]
    seen: int  # the last number that training has taken in; 0 when none

    @property
    def words(self) -> str:
        last = self.segments[-1].manifest
        assert last is not None
        size_bytes = sum(segment.size_bytes for segment in self.segments)
        seen = f"has seen up to {self.seen}" if self.seen else "has seen nothing"
        return (
            f"{self.stream}: {len(self.segments)} segments, {size_bytes} bytes, numbers "
            f"{self.segments[0].first} to {last.last}, are past archive.keep_days or keep_mb and stay: "
            f"training {seen} of this stream"
        )


def plan(
    directory: Path, keep_days: Mapping[str, float], keep_mb: Mapping[str, float], *, now_ms: int
) -> list[Removal]:
    """What the settings remove now. A stream without an entry, and without `default`, is kept for ever.

    The caller holds the lock of upkeep until it has pruned: a plan is of the segments that are there.
    Raises: SettingsInvalid: an entry names no stream.
    """
    return _planned(directory, keep_days, keep_mb, now_ms, seen_by_training(directory))


def held_back(
    directory: Path, keep_days: Mapping[str, float], keep_mb: Mapping[str, float], *, now_ms: int
) -> list[Held]:
    """What the settings would remove beyond `plan`, had training seen all. Raises as it does."""
    seen = seen_by_training(directory)
    removed = {one.segment.path for one in _planned(directory, keep_days, keep_mb, now_ms, seen)}
    beyond: dict[str, list[Segment]] = {}
    for removal in _planned(directory, keep_days, keep_mb, now_ms, None):
        if removal.segment.path not in removed:
            beyond.setdefault(removal.segment.stream, []).append(removal.segment)
    return [Held(stream, segments, seen.get(stream, 0)) for stream, segments in beyond.items()]


def _planned(
    directory: Path,
    keep_days: Mapping[str, float],
    keep_mb: Mapping[str, float],
    now_ms: int,
    seen: Mapping[str, int] | None,
) -> list[Removal]:
    """Args: seen: None is as if training had seen all."""
    for name, table in (("keep_days", keep_days), ("keep_mb", keep_mb)):
        if unknown := set(table) - set(STREAMS) - {"default"}:
            raise SettingsInvalid(
                f"archive.{name}: no stream {sorted(unknown)}; there are {', '.join(STREAMS)}, and default"
            )
    removals: list[Removal] = []
    for stream in STREAMS:
        found = catalog(directory, stream)
        newest_ms = max((segment.manifest.last_ms for segment in found if segment.manifest), default=0)
        days = keep_days.get(stream, keep_days.get("default", 0.0))
        size = keep_mb.get(stream, keep_mb.get("default", 0.0))
        unseen = seen.get(stream, 0) if seen is not None and stream in TRAINING_STREAMS else None
        removals += _plan_one(
            found, min(newest_ms, now_ms) - days * DAY_MS if days else None, size * MB or None, unseen
        )
    return removals


def _plan_one(
    segments: list[Segment], since_ms: float | None, limit_bytes: float | None, seen: int | None
) -> list[Removal]:
    """A prefix of the stream, so that what stays has no hole."""
    removals: list[Removal] = []
    size_bytes = sum(segment.size_bytes for segment in segments)
    for segment in segments[:-1]:
        manifest = segment.manifest
        if manifest is None or (seen is not None and manifest.last > seen):
            break
        if since_ms is not None and manifest.last_ms < since_ms:
            removals.append(Removal(segment, "older than archive.keep_days"))
        elif limit_bytes is not None and size_bytes > limit_bytes:
            removals.append(Removal(segment, "the stream exceeds archive.keep_mb"))
        else:
            break
        size_bytes -= segment.size_bytes
    return removals


def prune(directory: Path, removals: list[Removal]) -> int:
    """Remove them; the bytes that came free. What is removed is written down first."""
    freed = 0
    for removal in removals:
        segment = removal.segment
        assert segment.manifest is not None
        root = directory / segment.stream
        until = max(pruned_until(directory, segment.stream), segment.manifest.last)
        write_numbers(root / PRUNED_NAME, {"until": until})
        segment.path.unlink(missing_ok=True)
        manifest_path(segment.path).unlink(missing_ok=True)
        freed += segment.size_bytes
        log.info("a segment was pruned", segment=str(segment.path), reason=removal.reason)
    return freed


def mark_seen(directory: Path, sequences: Mapping[str, int]) -> None:
    """Training has taken in these streams up to these sequence numbers: what is older may be pruned.

    A mark never goes back. The caller holds the lock of upkeep. Raises OSError.
    """
    known = seen_by_training(directory)
    merged = {name: max(known.get(name, 0), sequences.get(name, 0)) for name in {*known, *sequences}}
    write_numbers(directory / SEEN_NAME, merged)
