"""MLDataProcessor: the archive's signals joined to their outcomes, cleaned, encoded, in chunks.

Signals and outcomes meet by id, never by symbol. However long the history, memory holds one chunk: the
archive is read in windows of candle closes that have at most `chunk_records` signals. Runs in a process that
ends.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import HistoryUnusable
from service.learning.encoding import Matrix, encode
from service.learning.splits import Moment, Split

if TYPE_CHECKING:
    import duckdb

LARGEST_R = 100.0
"""A result beyond this many R is a broken record: the stop of such a position is no stop."""


class Chunk(NamedTuple):
    """Examples of one split, oldest first; every array has the same length n."""

    features: Matrix  # float32[n, features]
    outcome_r: npt.NDArray[np.float32]  # of the shadow position, after fees and funding
    real_r: npt.NDArray[np.float32]  # of the real position; NaN where the signal was not traded
    weight: npt.NDArray[
        np.float32
    ]  # signals of one candle close are one moment of the market: 1 / their count
    opened_ms: npt.NDArray[np.int64]
    closed_ms: npt.NDArray[np.int64]

    @property
    def won(self) -> npt.NDArray[np.bool_]:
        """The label: whether the position earned more than its fees and funding."""
        return self.outcome_r > 0.0


@dataclass(slots=True)
class Counts:
    """What was read and what became of it: read = kept + dropped."""

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by split
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    joined: int = 0  # signals that met exactly one outcome
    outcomes: int = 0  # in the archive, over the same span

    @property
    def one_to_one(self) -> bool:
        """Each outcome met exactly one signal, and no signal met two."""
        return self.joined == self.outcomes and not self.dropped["recorded twice"]


class Kept(NamedTuple):
    """What earlier datasets took in of each stream, and what retention has removed since, by last number."""

    seen: Mapping[str, int] = {}
    pruned: Mapping[str, int] = {}


NOTHING_YET = Kept()


class LeftOut(NamedTuple):
    """A signal that is not in the dataset and may be in a later one."""

    seq: int
    reason: str


class _Window(NamedTuple):
    from_ms: int
    until_ms: int


class MLDataProcessor:
    """Builds examples from the views `signals`, `decisions`, `positions` and `shadow_outcomes`.

    Args: names: of the features; None takes those of the history's first signal; strategy: whose
    signals; "" takes that of the first one; kept: tells an outcome that retention removed from one that
    is still to come; given_up_ms: a signal without outcome that closed before it is not waited for by
    `left_out`.
    """

    def __init__(
        self,
        history: "duckdb.DuckDBPyConnection",
        *,
        strategy: str = "",
        names: Sequence[str] | None = None,
        from_ms: int = 0,
        until_ms: int = 2**62,
        chunk_records: int = 50_000,
        kept: Kept = NOTHING_YET,
        given_up_ms: int = 0,
    ) -> None:
        """Raises HistoryUnusable: no signal lies in the span."""
        self._history = history
        self._kept = kept
        self._given_up_ms = given_up_ms
        self.left_out: LeftOut | None = None
        """The first signal that no dataset took in so far and a later one may; once all chunks are made."""
        self._chunk_records = chunk_records
        self._span = _Window(from_ms, until_ms)
        first = self._first(strategy)
        self.strategy: str = first[0]
        self._usual = tuple(first[1])  # a strategy writes its features in one order
        self.names: tuple[str, ...] = tuple(names) if names is not None else self._usual
        self.counts = Counts()
        self._prepare_real()
        self.moments = self._moments()

    def _first(self, strategy: str) -> tuple[str, dict[str, float]]:
        only = "and strategy = $strategy" if strategy else ""
        found = self._history.execute(
            f"""select strategy, features from signals
                where candle_close_ms between $from_ms and $until_ms {only}
                order by candle_close_ms limit 1""",
            self._bounds({"strategy": strategy} if strategy else {}),
        ).fetchone()
        if found is None:
            raise HistoryUnusable(
                "the archive has no signal"
                + (f" of strategy {strategy!r}" if strategy else "")
                + " in this span; run the daemon first, or name another span or archive"
            )
        return found[0], found[1] or {}

    def _bounds(self, more: dict[str, Any]) -> dict[str, Any]:
        return {"from_ms": self._span.from_ms, "until_ms": self._span.until_ms, **more}

    def _prepare_real(self) -> None:
        """What the real positions made, in R of what was risked; few, so they are kept at hand.

        A position is told again when funding is booked after its close: the newest record counts.
        """
        self._history.execute(
            """create or replace temp table real_outcomes as
               select d.signal_id, arg_max(
                   (p.realised_pnl::double - p.fees::double + p.funding::double) / d.risk_amount::double,
                   p.seq
               ) as real_r
               from decisions d join positions p using (signal_id)
               where d.outcome = 'accepted' and d.risk_amount::double > 0
                 and p.closed_ms > 0 and p.entry_price::double > 0
               group by d.signal_id"""
        )

    def _moments(self) -> list[Moment]:
        rows = self._history.execute(
            """select candle_close_ms, count(*) from signals
               where strategy = $strategy and candle_close_ms between $from_ms and $until_ms
               group by 1 order by 1""",
            self._bounds({"strategy": self.strategy}),
        ).fetchall()
        self.counts.outcomes = self._count_outcomes()
        return [Moment(*row) for row in rows]

    def _count_outcomes(self) -> int:
        found = self._history.execute(
            """select count(*) from shadow_outcomes
               where opened_ms between $from_ms and $until_ms and starts_with(signal_id, $prefix)""",
            self._bounds({"prefix": f"{self.strategy}:"}),
        ).fetchone()
        return (int(found[0]) if found else 0) - self._count_bereft()

    def _count_bereft(self) -> int:
        """Outcomes that are still in the archive while retention has removed their signals."""
        if not self._kept.pruned.get("signals"):
            return 0
        # A signal that was removed was archived before the first that is left, and its candle closed before.
        found = self._history.execute(
            """with oldest as (select arg_min(archived_ms, seq) as at_ms from signals)
               select count(*) from shadow_outcomes
               where opened_ms between $from_ms and $until_ms and starts_with(signal_id, $prefix)
                 and opened_ms <= (select at_ms from oldest)
                 and signal_id not in (select signal_id from signals
                                       where candle_close_ms <= (select at_ms from oldest))""",
            self._bounds({"prefix": f"{self.strategy}:"}),
        ).fetchone()
        return int(found[0]) if found else 0

    @property
    def span(self) -> tuple[int, int]:
        """First and last candle close asked for, in ms."""
        return self._span

    def chunks(self, splits: Sequence[Split]) -> Iterator[tuple[str, Chunk]]:
        """(split, examples) over the whole span, in the order of time; counts as it goes."""
        crowd = dict(self.moments)
        for window in self._windows():
            columns = self._read(window)
            yield from self._cleaned(columns, splits, crowd)

    def _windows(self) -> Iterator[_Window]:
        """Spans of candle closes with at most `chunk_records` signals each; one close is never cut."""
        begin, held = self.moments[0].candle_close_ms, 0
        for moment in self.moments:
            if held and held + moment.signals > self._chunk_records:
                yield _Window(begin, moment.candle_close_ms)
                begin, held = moment.candle_close_ms, 0
            held += moment.signals
        yield _Window(begin, self.moments[-1].candle_close_ms + 1)

    def _read(self, window: _Window) -> dict[str, npt.NDArray[Any]]:
        """Columns of the window's signals with what became of them; NULLs are NaN, or 0 in times."""
        if set(self.names) <= set(self._usual):
            found = self._fetch(window, [f"s.held[{self._usual.index(name) + 1}]" for name in self.names])
            if (found["usual"] == found["keys"]).all():
                return found
        # A name each costs three times a place each: only where a signal has its features in another order.
        return self._fetch(window, [f"s.features['{_quoted(name)}']" for name in self.names])

    def _fetch(self, window: _Window, features: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        listed = ", ".join(f"{value}::double as f{number}" for number, value in enumerate(features))
        found = self._history.execute(
            f"""select hash(s.signal_id) as id, hash(s.named) as keys, hash($usual::varchar[]) as usual,
                       s.seq as seq, s.candle_close_ms as opened_ms, o.closed_ms as closed_ms,
                       o.unknown as unknown, o.outcome_r::double as outcome_r, r.real_r as real_r, {listed}
                from (select signal_id, seq, candle_close_ms, features,
                             map_keys(features) as named, map_values(features) as held
                      from signals where strategy = $strategy
                      and candle_close_ms >= $from_ms and candle_close_ms < $until_ms) s
                left join (select signal_id, closed_ms, outcome_r,
                                  (close_reason = 'no_candles')::integer as unknown from shadow_outcomes
                           where opened_ms >= $from_ms and opened_ms < $until_ms) o using (signal_id)
                left join real_outcomes r using (signal_id)""",
            {
                "usual": list(self._usual),
                "strategy": self.strategy,
                "from_ms": window.from_ms,
                "until_ms": window.until_ms,
            },
        ).fetchnumpy()
        return {name: _plain(column) for name, column in found.items()}

    def _cleaned(
        self, columns: dict[str, npt.NDArray[Any]], splits: Sequence[Split], crowd: dict[int, int]
    ) -> Iterator[tuple[str, Chunk]]:
        opened, ended, result = columns["opened_ms"], columns["closed_ms"], columns["outcome_r"]
        encoded = encode({name: columns[f"f{n}"] for n, name in enumerate(self.names)}, self.names)
        self.counts.read += opened.size
        left = np.ones(opened.size, dtype=bool)

        def drop(where: Any, reason: str) -> None:
            nonlocal left
            gone = left & where
            self.counts.dropped[reason] += int(gone.sum())
            left = left & ~where

        drop(_again(columns["id"]), "recorded twice")
        seen = columns["seq"] <= self._kept.seen.get("signals", 0)
        if self._kept.pruned.get("shadow_outcomes"):
            drop((ended == 0) & seen, "outcome removed by retention")
        waiting = left & (ended == 0)
        drop(ended == 0, "no outcome yet")
        self._leave_out(columns, waiting & (opened >= self._given_up_ms), "no outcome yet")
        self.counts.joined += int(left.sum())
        drop(columns["unknown"] > 0, "market ended before the outcome")
        drop(~(np.abs(result) <= LARGEST_R), "result impossible")  # a comparison with NaN is false
        drop(ended < opened, "closed before it opened")
        incomplete = np.isnan(encoded).any(axis=1)
        others = left & incomplete & (columns["keys"] != columns["usual"])
        self._leave_out(columns, others, "its features have other names")
        drop(incomplete, "feature missing or not finite")
        weight = 1.0 / np.array([crowd[at] for at in opened.tolist()], dtype=np.float32)
        for split in splits:
            within = left & (opened >= split.from_ms) & (opened < split.until_ms)
            # What ended in a later split would carry its prices back into this one.
            known = ended < split.until_ms if split is not splits[-1] else np.ones_like(left)
            late = within & ~known
            self.counts.dropped[f"outcome known after {split.name}"] += int(late.sum())
            self._leave_out(columns, late, f"outcome known after {split.name}")
            left &= ~within
            kept = np.flatnonzero(within & known)
            kept = kept[np.argsort(opened[kept], kind="stable")]
            self.counts.kept[split.name] += kept.size
            if kept.size:
                yield (
                    split.name,
                    Chunk(
                        features=encoded[kept],
                        outcome_r=result[kept].astype(np.float32),
                        real_r=columns["real_r"][kept].astype(np.float32),
                        weight=weight[kept],
                        opened_ms=opened[kept],
                        closed_ms=ended[kept],
                    ),
                )
        self.counts.dropped["in the embargo"] += int(left.sum())
        self._leave_out(columns, left, "in the embargo")

    def _leave_out(
        self, columns: dict[str, npt.NDArray[Any]], where: npt.NDArray[np.bool_], why: str
    ) -> None:
        """Note the first of these that no earlier dataset took in. Not for what is broken for good."""
        numbers = columns["seq"][where]
        numbers = numbers[numbers > self._kept.seen.get("signals", 0)]
        if numbers.size and (self.left_out is None or numbers.min() < self.left_out.seq):
            self.left_out = LeftOut(int(numbers.min()), why)


def _plain(column: Any) -> npt.NDArray[Any]:
    """A column without a mask."""
    if not isinstance(column, np.ma.MaskedArray):
        plain: npt.NDArray[Any] = column
        return plain
    filled: npt.NDArray[Any] = column.filled(np.nan if column.dtype.kind == "f" else 0)
    return filled


def _again(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Where an id stands that stood before."""
    repeated = np.ones(ids.size, dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    return repeated


def _quoted(name: str) -> str:
    return name.replace("'", "''")
