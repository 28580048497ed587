"""What is asked of the venue and what is made of its answer."""

import pytest

from service.market.backfill import Request, cleaned, missing, newest_run

STEP = 300_000
NEWEST = 2_000 * STEP


def row(number: int, close: float = 1.0):
    return (number * STEP, 1.0, 2.0, 0.5, close, 3.0)


@pytest.mark.parametrize(
    ("last", "from_ms", "expected"),
    [
        (0, 0, Request(NEWEST - 199 * STEP, 200)),
        (NEWEST, 0, None),
        (NEWEST + STEP, 0, None),
        (NEWEST - STEP, 0, Request(NEWEST, 1)),
        (NEWEST - 7 * STEP, 0, Request(NEWEST - 6 * STEP, 7)),
        (NEWEST - 900 * STEP, 0, Request(NEWEST - 199 * STEP, 200)),
        (NEWEST, NEWEST - 2 * STEP, Request(NEWEST - 2 * STEP, 3)),
        (NEWEST - 4 * STEP, NEWEST - 2 * STEP, Request(NEWEST - 3 * STEP, 4)),
        (NEWEST, NEWEST - 900 * STEP, Request(NEWEST - 199 * STEP, 200)),
    ],
)
def test_exactly_what_is_missing_is_asked_for(last, from_ms, expected):
    assert missing(last, newest_ms=NEWEST, step_ms=STEP, keep=200, from_ms=from_ms) == expected


def test_an_answer_is_put_in_order_without_duplicates_malformed_or_open_candles():
    bad = (5 * STEP, 1.0, 0.5, 2.0, 1.0, 3.0)
    rows, malformed = cleaned(
        [row(4), row(2), row(3), bad, row(3, 1.5), row(9)], step_ms=STEP, newest_ms=8 * STEP
    )
    assert rows == [row(2), row(3, 1.5), row(4)]
    assert malformed == 1


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [([], []), ([3], [3]), ([1, 2, 3], [1, 2, 3]), ([1, 3, 4], [3, 4]), ([1, 2, 4, 7], [7])],
)
def test_the_newest_run_starts_behind_the_last_hole(numbers, kept):
    assert newest_run([row(n) for n in numbers], STEP) == [row(n) for n in kept]
