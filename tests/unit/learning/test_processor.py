import numpy as np
import pytest

from service.errors import HistoryUnusable
from service.learning.processor import Kept, MLDataProcessor
from service.learning.splits import Split
from tests.unit.learning.conftest import HOUR_MS, History

ALL = [Split("train", 0, 2**62)]


def drained(processor: MLDataProcessor, splits=ALL):
    return list(processor.chunks(splits))


def test_signals_meet_their_outcome_by_id_and_not_by_symbol(history: History):
    first = history.signal("A", HOUR_MS, x=1.0)
    second = history.signal("A", 2 * HOUR_MS, x=2.0)
    history.outcome(second, 2 * HOUR_MS, 2.0)
    history.outcome(first, HOUR_MS, -1.0)
    processor = MLDataProcessor(history.connection)
    ((_, chunk),) = drained(processor)
    assert list(zip(chunk.features[:, 0], chunk.outcome_r, strict=True)) == [(1.0, -1.0), (2.0, 2.0)]
    assert chunk.won.tolist() == [False, True]
    assert processor.counts.one_to_one


def test_what_is_dropped_is_counted_with_its_reason(history: History):
    at = HOUR_MS
    history.outcome(history.signal("GOOD", at, x=1.0), at, 1.0)
    history.signal("OPEN", at, x=1.0)
    history.outcome(history.signal("NAN", at, x=float("nan")), at, 1.0)
    history.outcome(history.signal("ABSENT", at, z=1.0), at, 1.0)
    history.outcome(history.signal("HUGE", at, x=1.0), at, 1e9)
    history.outcome(history.signal("BACK", at, x=1.0), at, 1.0, held_h=-2.0)
    history.outcome(history.signal("GONE", at, x=1.0), at, 0.0, reason="no_candles")
    twice = history.signal("TWICE", at, x=1.0)
    history.outcome(twice, at, 1.0)
    history.outcome(twice, at, 1.0)
    processor = MLDataProcessor(history.connection, names=("x",))
    ((_, chunk),) = drained(processor)
    assert chunk.outcome_r.tolist() == [1.0, 1.0]
    assert dict(processor.counts.dropped) == {
        "recorded twice": 1,
        "no outcome yet": 1,
        "market ended before the outcome": 1,
        "result impossible": 1,
        "closed before it opened": 1,
        "feature missing or not finite": 2,
        "outcome known after train": 0,
        "in the embargo": 0,
    }
    assert processor.counts.read == processor.counts.kept.total() + processor.counts.dropped.total()
    assert not processor.counts.one_to_one


def test_an_outcome_known_only_in_a_later_split_is_in_none(history: History):
    early = history.signal("A", HOUR_MS)
    history.outcome(early, HOUR_MS, 1.0, held_h=5.0)
    late = history.signal("A", 4 * HOUR_MS)
    history.outcome(late, 4 * HOUR_MS, 1.0, held_h=5.0)
    between = history.signal("A", 3 * HOUR_MS)
    history.outcome(between, 3 * HOUR_MS, 1.0)
    splits = [Split("train", 0, 3 * HOUR_MS), Split("test", 4 * HOUR_MS, 5 * HOUR_MS)]
    processor = MLDataProcessor(history.connection)
    assert [(name, chunk.opened_ms.tolist()) for name, chunk in drained(processor, splits)] == [
        ("test", [4 * HOUR_MS])  # the last split waits for its outcomes
    ]
    assert processor.counts.dropped["outcome known after train"] == 1
    assert processor.counts.dropped["in the embargo"] == 1


@pytest.mark.parametrize("chunk_records", [1, 3, 4, 1_000])
def test_examples_do_not_depend_on_the_size_of_the_chunks(history: History, chunk_records: int):
    history.hours(10)
    whole = [chunk for _, chunk in drained(MLDataProcessor(history.connection))]
    chunks = [c for _, c in drained(MLDataProcessor(history.connection, chunk_records=chunk_records))]
    assert max(chunk.won.size for chunk in chunks) <= max(chunk_records, 2)  # a moment is never cut
    for field in ("outcome_r", "weight", "opened_ms", "closed_ms"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(c, field) for c in chunks]),
            np.concatenate([getattr(c, field) for c in whole]),
        )


def test_signals_of_one_moment_share_its_weight(history: History):
    history.hours(2, symbols=4)
    ((_, chunk),) = drained(MLDataProcessor(history.connection))
    assert chunk.weight.tolist() == [0.25] * 8


def test_a_real_position_brings_its_own_result_in_what_was_risked(history: History):
    name = history.signal("A", HOUR_MS)
    history.outcome(name, HOUR_MS, 1.9)
    other = history.signal("B", HOUR_MS)
    history.outcome(other, HOUR_MS, -1.0)
    history.decision(name, risk_amount="50")
    history.connection.execute(
        "insert into positions values (?, 0, '10', '0', '1', '0', 1), (?, 99, '10', '95', '4', '-1', 2)",
        [name, name],
    )
    ((_, chunk),) = drained(MLDataProcessor(history.connection))
    real = dict(zip(chunk.outcome_r.tolist(), chunk.real_r.tolist(), strict=True))
    assert real[np.float32(1.9)] == pytest.approx((95 - 4 - 1) / 50)
    assert np.isnan(real[-1.0])


def test_another_strategys_signals_are_left_alone(history: History):
    history.hours(3)
    other = history.signal("A", HOUR_MS // 2, strategy="other", z=1.0)
    history.outcome(other, HOUR_MS // 2, 1.0)
    processor = MLDataProcessor(history.connection, strategy="s")
    drained(processor)
    assert (processor.names, processor.counts.read, processor.counts.one_to_one) == (("x", "y"), 6, True)


def test_an_empty_span_says_so(history: History):
    history.hours(3)
    with pytest.raises(HistoryUnusable, match="no signal in this span"):
        MLDataProcessor(history.connection, from_ms=100 * HOUR_MS)
    with pytest.raises(HistoryUnusable, match="no signal of strategy 'unknown'"):
        MLDataProcessor(history.connection, strategy="unknown")


def test_of_a_position_told_again_the_newest_record_counts(history: History):
    name = history.signal("A", HOUR_MS)
    history.outcome(name, HOUR_MS, 1.0)
    history.decision(name)
    for seq, funding in ((7, "-2"), (9, "-4"), (8, "-3")):
        history.connection.execute(
            "insert into positions values (?, 99, '10', '20', '1', ?, ?)", [name, funding, seq]
        )
    ((_, chunk),) = drained(MLDataProcessor(history.connection))
    assert chunk.real_r.tolist() == [1.5]


def test_what_retention_removed_is_neither_awaited_nor_a_label_without_signal(history: History):
    history.hours(6, symbols=1)
    history.connection.execute("delete from signals where seq <= 2")
    history.connection.execute("delete from shadow_outcomes where seq in (1, 3)")
    kept = Kept(seen={"signals": 4, "shadow_outcomes": 4}, pruned={"signals": 2, "shadow_outcomes": 3})
    processor = MLDataProcessor(history.connection, kept=kept)
    ((_, chunk),) = drained(processor)
    assert chunk.opened_ms.tolist() == [4 * HOUR_MS, 5 * HOUR_MS, 6 * HOUR_MS]
    assert processor.counts.dropped["outcome removed by retention"] == 1
    assert processor.counts.dropped["no outcome yet"] == 0
    assert (processor.counts.joined, processor.counts.outcomes) == (3, 3)
    assert processor.counts.one_to_one


def test_a_label_that_never_had_a_signal_is_seen_after_retention_too(history: History):
    history.hours(6, symbols=1)
    history.connection.execute("delete from signals where seq <= 2 or seq = 5")
    kept = Kept(seen={"signals": 2}, pruned={"signals": 2})
    processor = MLDataProcessor(history.connection, kept=kept)
    drained(processor)
    assert (processor.counts.joined, processor.counts.outcomes) == (3, 4)
    assert not processor.counts.one_to_one
