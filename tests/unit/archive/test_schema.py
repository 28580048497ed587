"""The columns of every stream, held against the version under which they were released."""

from decimal import Decimal

import pytest

from service.archive.schema import STREAMS, columns, fingerprint, version
from service.records import Record

# A record that changed needs a `Change` in service/archive/schema.py; then its new fingerprint goes here.
# Before the first release there are no old archives to be read: until then the fingerprint alone is enough.
RELEASED = {
    "signals": (1, "9953b4b8b95b"),
    "decisions": (1, "27fc3334304b"),
    "orders": (1, "25dcdfa980cd"),
    "fills": (1, "bb37dadf5625"),
    "positions": (1, "7c3c8ce6da24"),
    "adjustments": (1, "e3d1d898a10e"),
    "shadow_outcomes": (1, "a38f087dd818"),
    "cycles": (1, "412bc5e71df6"),
}


@pytest.mark.parametrize("stream", sorted(STREAMS))
def test_a_record_that_changed_has_a_new_version(stream: str) -> None:
    assert RELEASED[stream] == (version(stream), fingerprint(stream))


def test_every_field_has_a_column_of_a_type_that_keeps_it() -> None:
    types = {column.name: column.type for column in columns("decisions")}
    assert types["seq"] == "BIGINT"
    assert types["equity"] == "DECIMAL(38,18)"
    assert types["outcome"] == "VARCHAR"
    assert {column.name: column.type for column in columns("signals")}["features"] == "MAP(VARCHAR, DOUBLE)"


def test_a_field_without_a_column_type_is_a_mistake_that_is_told() -> None:
    class Odd(Record, frozen=True, kw_only=True):
        amounts: tuple[Decimal, ...]

    with pytest.raises(TypeError, match="no column type"):
        columns("decisions", Odd)
