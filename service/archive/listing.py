"""`perpd archive ls`: what there is, without reading more than names, manifests and the newest segments."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.archive.catalog import Segment, catalog, seen_by_training
from service.archive.retention import TRAINING_STREAMS
from service.archive.schema import STREAMS
from service.archive.segments import last_envelope


def streams(directory: Path) -> list[dict[str, Any]]:
    """A row for each stream. `seen`: the last number that training has taken in; None where it takes none."""
    seen = seen_by_training(directory)
    rows = []
    for stream in STREAMS:
        found = catalog(directory, stream)
        last, last_ms = _end(found[-1]) if found else (0, 0)
        if not last and len(found) > 1 and found[-2].manifest:
            last, last_ms = found[-2].manifest.last, found[-2].manifest.last_ms
        by_state = {
            state: sum(segment.size_bytes for segment in found if segment.state == state)
            for state in ("hot", "sealed", "compacted")
        }
        rows.append(
            {
                "stream": stream,
                "first": found[0].first if found and last else 0,
                "last": last,
                "from": found[0].path.parent.name if found else "",
                "until": _moment(last_ms),
                "files": len(found),
                "seen": seen.get(stream, 0) if stream in TRAINING_STREAMS else None,
                **{f"{state}_bytes": size for state, size in by_state.items()},
            }
        )
    return rows


def files(directory: Path) -> list[dict[str, Any]]:
    """A row for each segment."""
    return [
        {
            "file": str(segment.path.relative_to(directory)),
            "state": segment.state,
            "first": segment.first,
            "last": segment.last or _end(segment)[0],
            "bytes": segment.size_bytes,
        }
        for stream in STREAMS
        for segment in catalog(directory, stream)
    ]


def _end(segment: Segment) -> tuple[int, int]:
    """Number and time of the last record; (0, 0) for an empty segment."""
    if segment.manifest is not None:
        return segment.manifest.last, segment.manifest.last_ms
    if segment.last is not None:
        return segment.last, 0
    last = last_envelope(segment.path)
    return (last.seq, last.archived_ms) if last is not None else (0, 0)


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if at_ms else ""
