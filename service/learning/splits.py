"""Training, validation and test sets by time, so that none of them knows the future of another."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
HOUR_MS = 3_600_000
LARGEST_EMBARGO = 0.05
"""Of the whole span: a longer embargo would leave nothing of a short recording."""


class Split(NamedTuple):
    """Signals from `from_ms` to before `until_ms`, whose outcome was known before `until_ms`."""

    name: str
    from_ms: int
    until_ms: int


class Moment(NamedTuple):
    """How many signals a candle close has."""

    candle_close_ms: int
    signals: int


def split_by_time(
    moments: Sequence[Moment], fractions: tuple[float, float, float], embargo_ms: int
) -> list[Split]:
    """Cut the span where the fractions of the signals end.

    A split begins the embargo after the one before it ends: what is measured over past candles then has
    little left in common. An outcome that became known in a later split belongs to none (see `Split`).

    Args: moments: oldest first, not empty; fractions: of train, validation and test, sum 1.
    """
    total = sum(moment.signals for moment in moments)
    counted = list(accumulate(moment.signals for moment in moments))
    begin, end = moments[0].candle_close_ms, moments[-1].candle_close_ms + 1
    bounds = [begin]
    share = 0.0
    for fraction in fractions[:-1]:
        share += fraction
        place = next(n for n, count in enumerate(counted) if count >= share * total)
        bounds.append(moments[place].candle_close_ms + 1)
    bounds.append(end)
    splits: list[Split] = []
    for name, until_ms in zip(SPLITS, bounds[1:], strict=True):
        from_ms = splits[-1].until_ms + embargo_ms if splits else begin
        splits.append(Split(name, from_ms, max(until_ms, from_ms)))
    return splits


def embargo_within(asked_ms: int, span_ms: int) -> int:
    """The embargo asked for, or the largest a span of this length bears."""
    return min(asked_ms, int(span_ms * LARGEST_EMBARGO))
