"""How far a dataset marks the archive as seen: never past what a later dataset could still use."""

import pytest

from service.learning.processor import Kept, MLDataProcessor
from service.learning.seen import Mark, ends, marks
from service.learning.splits import Split
from tests.unit.learning.conftest import HOUR_MS, History

ALL = [Split("train", 0, 2**62)]


def marked(
    history: History, *, kept: Kept | None = None, splits: list[Split] | None = None, holes=None, **options
) -> dict[str, Mark]:
    """The marks of a build over all the history, or what the options leave of it."""
    kept = kept or Kept()
    last = ends(history.connection)
    processor = MLDataProcessor(history.connection, kept=kept, **options)
    for _ in processor.chunks(splits or ALL):
        pass
    return {mark.stream: mark for mark in marks(history.connection, processor, last, kept, holes or {})}


def traded(history: History, name: str, hour: int, *, closed: bool = True) -> str:
    """A signal with its outcome, its decision and a position."""
    signal_id = history.signal(name, hour * HOUR_MS)
    history.outcome(signal_id, hour * HOUR_MS, 1.0)
    history.decision(signal_id)
    history.position(signal_id, 0)
    if closed:
        history.position(signal_id, (hour + 1) * HOUR_MS)
    return signal_id


def test_a_history_that_is_taken_in_whole_is_marked_to_its_end(history: History):
    for hour in range(1, 6):
        traded(history, "A", hour)
    found = marked(history)
    assert {name: (mark.now, mark.last, mark.why) for name, mark in found.items()} == {
        "signals": (5, 5, ""),
        "shadow_outcomes": (5, 5, ""),
        "decisions": (5, 5, ""),
        "positions": (10, 10, ""),
    }


def test_no_mark_passes_a_signal_that_has_no_outcome_yet(history: History):
    traded(history, "A", 1)
    waiting = history.signal("B", 2 * HOUR_MS)
    history.decision(waiting)
    traded(history, "A", 3)
    found = marked(history)
    assert (found["signals"].now, found["signals"].why) == (1, "no outcome yet")
    assert found["shadow_outcomes"].now == 1  # the one of the later signal must stay with it
    assert (found["decisions"].now, found["positions"].now) == (1, 2)


def test_a_signal_that_is_given_up_stops_no_mark(history: History):
    history.signal("NEVER", HOUR_MS)
    traded(history, "A", 200)
    assert marked(history)["signals"].now == 0
    assert marked(history, given_up_ms=HOUR_MS)["signals"].now == 0  # not before it
    assert marked(history, given_up_ms=HOUR_MS + 1)["signals"].now == 2


def test_no_mark_passes_a_position_that_is_still_open(history: History):
    traded(history, "A", 1)
    traded(history, "B", 2, closed=False)
    traded(history, "A", 3)
    found = marked(history)
    assert (found["signals"].now, found["signals"].why) == (1, "its position is still open")
    assert (found["positions"].now, found["shadow_outcomes"].now) == (2, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"from_ms": 2 * HOUR_MS}, 0), ({"until_ms": 3 * HOUR_MS}, 3), ({"strategy": "s"}, 4)],
)
def test_no_mark_passes_what_the_dataset_did_not_look_at(history: History, options, expected: int):
    for hour in range(1, 5):
        traded(history, "A", hour)
    history.signal("A", 5 * HOUR_MS, strategy="other")
    found = marked(history, **options)
    assert found["signals"].now == found["shadow_outcomes"].now == found["decisions"].now == expected
    assert found["signals"].why == "outside --from and --until, or of another strategy"


def test_what_was_seen_before_may_lie_outside_the_span(history: History):
    for hour in range(1, 5):
        traded(history, "A", hour)
    found = marked(history, kept=Kept(seen={"signals": 2}), from_ms=3 * HOUR_MS)
    assert (found["signals"].before, found["signals"].now) == (2, 4)


def test_no_mark_passes_what_an_embargo_or_a_split_left_out(history: History):
    for hour in range(1, 9):
        traded(history, "A", hour)
    apart = [Split("train", 0, 4 * HOUR_MS), Split("test", 6 * HOUR_MS, 2**62)]
    found = marked(history, splits=apart)
    assert (found["signals"].now, found["signals"].why) == (2, "outcome known after train")
    kept = Kept(seen={"signals": 3})
    found = marked(history, splits=apart, kept=kept)
    assert (found["signals"].now, found["signals"].why) == (3, "in the embargo")


def test_a_signal_that_is_broken_for_good_stops_no_mark(history: History):
    traded(history, "A", 1)
    history.outcome(history.signal("NAN", 2 * HOUR_MS, x=float("nan"), y=1.0), 2 * HOUR_MS, 1.0)
    history.outcome(history.signal("HUGE", 2 * HOUR_MS), 2 * HOUR_MS, 1e9)
    history.outcome(history.signal("GONE", 2 * HOUR_MS), 2 * HOUR_MS, 0.0, reason="no_candles")
    traded(history, "A", 3)
    assert marked(history)["signals"].now == 5


def test_a_signal_with_other_features_waits_for_a_dataset_of_its_own(history: History):
    traded(history, "A", 1)
    history.outcome(history.signal("A", 2 * HOUR_MS, x=1.0, z=1.0), 2 * HOUR_MS, 1.0)
    found = marked(history)
    assert (found["signals"].now, found["signals"].why) == (1, "its features have other names")


def test_records_that_come_while_the_dataset_is_made_are_not_marked(history: History):
    traded(history, "A", 1)
    traded(history, "B", 2, closed=False)
    last = ends(history.connection)
    processor = MLDataProcessor(history.connection)
    history.position("s:B:7200000", 3 * HOUR_MS)  # closes after the processor has read positions
    traded(history, "A", 3)
    for _ in processor.chunks(ALL):
        pass
    found = {mark.stream: mark.now for mark in marks(history.connection, processor, last, Kept(), {})}
    assert found == {"signals": 1, "shadow_outcomes": 1, "decisions": 1, "positions": 2}


@pytest.mark.parametrize(
    ("stream", "others"),
    [
        ("signals", {"shadow_outcomes": 0, "decisions": 0}),
        ("decisions", {"signals": 4, "shadow_outcomes": 4}),
    ],
)
def test_a_stream_with_a_hole_is_not_marked(history: History, stream: str, others: dict[str, int]):
    for hour in range(1, 5):
        traded(history, "A", hour)
    history.connection.execute(f"delete from {stream} where seq = 2")
    found = marked(history)
    assert found[stream].now == 0
    assert "perpd archive verify" in found[stream].why
    assert {name: found[name].now for name in others} == others
    assert {mark.now for mark in marked(history, holes={stream: [(2, 2)]}).values()} == {4, 8}


def test_marks_go_on_after_retention_removed_what_was_seen(history: History):
    slow = traded(history, "SLOW", 1)
    for hour in range(2, 7):
        traded(history, "A", hour)
    # The outcome of the first signal came last of all, so it stays while its signal goes.
    history.connection.execute(
        "update shadow_outcomes set seq = 7, closed_ms = 9e7 where signal_id = ?", [slow]
    )
    history.connection.execute("update shadow_outcomes set seq = seq - 1")
    history.connection.execute("delete from signals where seq <= 3")
    history.connection.execute("delete from shadow_outcomes where seq <= 1")
    kept = Kept(seen={"signals": 3, "shadow_outcomes": 2}, pruned={"signals": 3, "shadow_outcomes": 1})
    found = marked(history, kept=kept)
    assert (found["signals"].now, found["shadow_outcomes"].now) == (6, 6)
    assert found["shadow_outcomes"].why == ""
