"""Times on the command line."""

import pytest

from service.clock import parse_time


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("2025-10-10T12:00", 1_760_097_600_000),
        ("2025-10-10T12:00:00Z", 1_760_097_600_000),
        ("2025-10-10 14:00+02:00", 1_760_097_600_000),
        ("2025-10-10", 1_760_054_400_000),
        ("1970-01-01T00:00:00.001", 1),
    ],
)
def test_a_time_without_a_zone_is_utc(text: str, at_ms: int) -> None:
    assert parse_time(text) == at_ms


@pytest.mark.parametrize("text", ["", "soon", "12:00", "2025-13-01", "1760097600000000000"])
def test_what_is_no_time_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="ISO 8601"):
        parse_time(text)
