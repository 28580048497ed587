"""How far a dataset has taken in the archive: the numbers up to which retention may remove records.

A signal is taken in when the dataset holds it, or when it is broken for good and counted as such. The mark of
the signals stops before the first that a later dataset may still use; the marks of the other streams stop
before the first record that belongs to a signal beyond that. Taking in is proven for what is in the archive
alone, so a stream with a hole that nothing explains is not marked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from service.archive.catalog import catalog
from service.archive.segments import sync_file
from service.learning.processor import Kept, LeftOut, MLDataProcessor

if TYPE_CHECKING:
    import duckdb

FOLLOWING = ("shadow_outcomes", "positions", "decisions")
"""Streams whose records belong to a signal, which the archive had before them."""
SIGNALS = "signals"

Holes = Mapping[str, Sequence[tuple[int, int]]]


class Mark(NamedTuple):
    """One stream: how far it was taken in before, is now, and goes; and what stops it."""

    stream: str
    before: int
    now: int
    last: int
    why: str  # "" where it was taken in to its end


def ends(history: "duckdb.DuckDBPyConnection") -> dict[str, int]:
    """The last number of each stream now: what a daemon adds later is not looked at.

    The signals come last, so that the signal of every record up to these numbers is among them.
    """
    return {stream: _number(history, f"select max(seq) from {stream}") for stream in (*FOLLOWING, SIGNALS)}


def newest_outcome_ms(history: "duckdb.DuckDBPyConnection") -> int:
    """When the newest outcome was archived."""
    return _number(history, "select max(archived_ms) from shadow_outcomes")


def make_durable(archive: Path) -> None:
    """Sync what can be read of the newest segments: numbers that a power loss frees must not be marked."""
    for stream in (*FOLLOWING, SIGNALS):
        for segment in catalog(archive, stream):
            if not segment.compacted:
                sync_file(segment.path)


def set_aside(archive: Path) -> dict[str, list[tuple[int, int]]]:
    """By stream, the ranges that were unreadable and lie in quarantine."""
    return {
        stream: [
            (gap[0], gap[1])
            for segment in catalog(archive, stream)
            if segment.manifest
            for gap in segment.manifest.missing
        ]
        for stream in (*FOLLOWING, SIGNALS)
    }


def marks(
    history: "duckdb.DuckDBPyConnection",
    processor: MLDataProcessor,
    last: Mapping[str, int],
    kept: Kept,
    holes: Holes,
) -> list[Mark]:
    """How far each stream is taken in, once the processor has made all its chunks.

    Args: last: as `ends` gave it before the processor began; holes: ranges that can never be read, by stream.
    """
    # Where signals are missing, so is the proof that a record without one belongs to one that was taken in.
    everything = Mark(SIGNALS, 0, last[SIGNALS], last[SIGNALS], "")
    if (broken := _whole(history, everything, kept, holes)).why:
        return [_mark(stream, LeftOut(0, broken.why), last, kept) for stream in (SIGNALS, *FOLLOWING)]
    stops = (processor.left_out, _outside(history, processor, last, kept), _still_held(history, last, kept))
    first = min((stop for stop in stops if stop and stop.seq <= last[SIGNALS]), default=None)
    found = [_mark(SIGNALS, first, last, kept)]
    for stream in FOLLOWING:
        stop = _of_a_later_signal(history, stream, found[0].now, last, kept)
        found.append(_whole(history, _mark(stream, stop, last, kept), kept, holes))
    return found


def _mark(stream: str, stop: LeftOut | None, last: Mapping[str, int], kept: Kept) -> Mark:
    before = kept.seen.get(stream, 0)
    reach = stop.seq - 1 if stop else last[stream]
    return Mark(stream, before, max(before, reach), last[stream], stop.reason if stop else "")


def _outside(
    history: "duckdb.DuckDBPyConnection", processor: MLDataProcessor, last: Mapping[str, int], kept: Kept
) -> LeftOut | None:
    """The first signal that this dataset did not even look at."""
    from_ms, until_ms = processor.span
    found = _number(
        history,
        """select min(seq) from signals where seq > $seen and seq <= $last
           and not coalesce(
               strategy = $strategy and candle_close_ms between $from_ms and $until_ms, false)""",
        seen=kept.seen.get(SIGNALS, 0),
        last=last[SIGNALS],
        strategy=processor.strategy,
        from_ms=from_ms,
        until_ms=until_ms,
    )
    return LeftOut(found, "outside --from and --until, or of another strategy") if found else None


def _still_held(history: "duckdb.DuckDBPyConnection", last: Mapping[str, int], kept: Kept) -> LeftOut | None:
    """The first signal whose real position had not closed: its real result is still to come."""
    found = _number(
        history,
        """select min(seq) from signals where seq > $seen and seq <= $last and signal_id in (
               select signal_id from positions where seq <= $positions
               group by signal_id having max(coalesce(closed_ms, 0)) = 0)""",
        seen=kept.seen.get(SIGNALS, 0),
        last=last[SIGNALS],
        positions=last["positions"],
    )
    return LeftOut(found, "its position is still open") if found else None


def _of_a_later_signal(
    history: "duckdb.DuckDBPyConnection", stream: str, taken: int, last: Mapping[str, int], kept: Kept
) -> LeftOut | None:
    """The first record that belongs to a signal beyond the mark.

    One without a signal in the archive belongs to one that was taken in and removed, or to none at all.
    """
    found = _number(
        history,
        f"""select min(seq) from {stream} where seq > $seen and seq <= $last
            and signal_id in (select signal_id from signals where seq > $taken)""",
        seen=kept.seen.get(stream, 0),
        last=last[stream],
        taken=taken,
    )
    return LeftOut(found, "its signal is not taken in") if found else None


def _whole(history: "duckdb.DuckDBPyConnection", mark: Mark, kept: Kept, holes: Holes) -> Mark:
    """The mark, or the one before where records up to it are missing."""
    begin = kept.pruned.get(mark.stream, 0)
    expected = (
        mark.now
        - begin
        - sum(
            max(min(gap[1], mark.now) - max(gap[0], begin + 1) + 1, 0) for gap in holes.get(mark.stream, ())
        )
    )
    there = _number(
        history,
        f"select count(*) from {mark.stream} where seq > $begin and seq <= $now",
        begin=begin,
        now=mark.now,
    )
    if there == expected:
        return mark
    words = f"{there} of the {expected} records up to {mark.now} of {mark.stream} are there"
    return mark._replace(now=mark.before, why=f"{words}; `perpd archive verify` tells which are missing")


def _number(history: "duckdb.DuckDBPyConnection", sql: str, **values: int | str) -> int:
    found = history.execute(sql, values).fetchone()
    return int(found[0]) if found and found[0] is not None else 0
