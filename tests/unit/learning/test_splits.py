from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.learning.splits import HOUR_MS, Moment, embargo_within, split_by_time

FRACTIONS = (0.7, 0.15, 0.15)


def test_the_fractions_are_of_signals_not_of_time():
    moments = [Moment(at * HOUR_MS, 90 if at < 10 else 1) for at in range(110)]
    train, validation, test = split_by_time(moments, (0.5, 0.25, 0.25), 0)
    assert train.until_ms == 5 * HOUR_MS + 1
    assert (validation.from_ms, validation.until_ms) == (5 * HOUR_MS + 1, 8 * HOUR_MS + 1)
    assert (test.from_ms, test.until_ms) == (8 * HOUR_MS + 1, 109 * HOUR_MS + 1)


@given(
    st.lists(st.integers(1, 50), min_size=3, max_size=60),
    st.integers(0, 10),
)
def test_splits_never_overlap_and_lie_an_embargo_apart(counts, embargo):
    moments = [Moment(n * HOUR_MS, count) for n, count in enumerate(counts)]
    splits = split_by_time(moments, FRACTIONS, embargo * HOUR_MS)
    for before, after in pairwise(splits):
        assert before.from_ms <= before.until_ms <= after.from_ms
        at_the_end = after.from_ms > moments[-1].candle_close_ms
        assert at_the_end or after.from_ms - before.until_ms >= embargo * HOUR_MS


def test_an_embargo_never_eats_a_short_recording():
    assert embargo_within(24 * HOUR_MS, 1000 * HOUR_MS) == 24 * HOUR_MS
    assert embargo_within(24 * HOUR_MS, 100 * HOUR_MS) == 5 * HOUR_MS
