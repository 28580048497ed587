"""When the header of a candle file is that of the file the books were made with."""

import msgspec
import pytest

from service.market.candle_file import decoded, doubt, encoded
from service.market.candles import Header

KEPT = Header(
    mark="f00d", capacity=5, candles=120, timeframes=("5m", "1h"), generation=40, boot="this machine's"
)


def found(**changes: object) -> Header:
    return msgspec.structs.replace(KEPT, **changes)


@pytest.mark.parametrize(
    "header",
    [
        KEPT,
        found(generation=41),  # the run did not end in order, or the books were put back from a backup
        found(generation=41, boot="now"),  # killed between opening the file and telling the books
    ],
)
def test_the_file_of_the_last_run_is_believed(header):
    assert doubt(header, KEPT, "now") == ""


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (found(mark="beef"), "another one"),
        (found(candles=200), "another one (5 symbols x 5m/1h x 200 candles, the books had 5 symbols"),
        (found(generation=39), "an older copy (generation 39, the books had 40)"),
        (found(generation=90, boot="elsewhere"), "used on another machine"),
        (found(boot="elsewhere"), "used on another machine"),
    ],
)
def test_any_other_is_doubted_in_words(header, words):
    why = doubt(header, KEPT, "now")
    assert words in why
    assert why.startswith("candles are fetched again")


def test_what_the_store_keeps_reads_back_and_what_cannot_be_read_is_nothing():
    assert decoded(encoded(KEPT)) == KEPT
    assert decoded(None) is None
    assert decoded('{"mark": 1}') is None
