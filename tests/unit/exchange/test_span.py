import pytest

from service.errors import SettingsInvalid
from service.exchange.span import span


def test_a_span_is_in_ms_and_open_where_nothing_is_said():
    assert span("1970-01-01T00:01", "1970-01-01T00:02") == (60_000, 120_000)
    assert span("", "1970-01-01T00:02") == (None, 120_000)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (("soon", ""), "--from: found 'soon'"),
        (("", "late"), "--until: found 'late'"),
        (("2025-01-02", "2025-01-02"), "allowed is a time after --from"),
    ],
)
def test_a_span_that_cannot_be_is_one_message(times: tuple[str, str], words: str):
    with pytest.raises(SettingsInvalid, match=words):
        span(*times)
