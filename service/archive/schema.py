"""What each stream's records look like, in every version that was ever written.

A line carries the version of its stream's schema as `v`. A record that gains a field needs a `Change` here:
readers then give older lines the default, and refuse lines of a version they do not know.
"""

import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from hashlib import blake2b

import msgspec

from service.errors import PerpdError
from service.records import (
    Adjustment,
    CycleReport,
    Decision,
    Fill,
    Order,
    Position,
    Record,
    ShadowPosition,
    Signal,
)

STREAMS: dict[str, type[Record]] = {
    "signals": Signal,
    "decisions": Decision,
    "orders": Order,
    "fills": Fill,
    "positions": Position,
    "adjustments": Adjustment,
    "shadow_outcomes": ShadowPosition,
    "cycles": CycleReport,
}


class Change(msgspec.Struct, frozen=True):
    """How one version differs from the one before."""

    added: Mapping[str, str] = {}  # column to what older lines count as, as SQL
    renamed: Mapping[str, str] = {}  # new name to old name


# A stream's version is one more than its changes. An entry that was released is never edited.
CHANGES: dict[str, tuple[Change, ...]] = {}


class Column(msgspec.Struct, frozen=True):
    """One column of a stream."""

    name: str
    type: str  # DuckDB's
    read_as: str  # the type in which JSON gives it
    since: int = 1
    older: str = ""  # what lines before `since` count as, as SQL


class SchemaNewer(PerpdError):
    """The archive was written by a newer perpd; this one would misread it."""


ENVELOPE = (
    Column("v", "INTEGER", "INTEGER"),
    Column("seq", "BIGINT", "BIGINT"),
    Column("archived_ms", "BIGINT", "BIGINT"),
)
# As wide as DuckDB has: twenty digits before the point, eighteen behind it.
DECIMAL = "DECIMAL(38,18)"


def version(stream: str) -> int:
    """The version in which a stream is written now."""
    return 1 + len(CHANGES.get(stream, ()))


def columns(stream: str, record: type[Record] | None = None) -> tuple[Column, ...]:
    """A stream's columns in its present version, the envelope's first."""
    hints = typing.get_type_hints(record or STREAMS[stream])
    since = {
        name: (number, older)
        for number, change in enumerate(CHANGES.get(stream, ()), 2)
        for name, older in (*change.added.items(), *_quoted(change.renamed))
    }
    own = (Column(name, *_types(hint), *since.get(name, (1, ""))) for name, hint in hints.items())
    return (*ENVELOPE, *own)


def _quoted(renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(new, f'"{old}"') for new, old in renamed.items()]


def former_columns(stream: str) -> dict[str, str]:
    """Names that older versions used, with the types in which JSON gives them."""
    types = {column.name: column.read_as for column in columns(stream)}
    renamed = [pair for change in CHANGES.get(stream, ()) for pair in change.renamed.items()]
    return {old: types[new] for new, old in renamed if new in types}


def _types(hint: object) -> tuple[str, str]:
    """A field's type in DuckDB, and the one to read it as."""
    plain = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}
    if isinstance(hint, type):
        if hint in plain:
            return plain[hint], plain[hint]
        if hint is Decimal:
            return DECIMAL, "VARCHAR"  # exact: JSON has it as text
        if issubclass(hint, StrEnum):
            return "VARCHAR", "VARCHAR"
    if isinstance(hint, types.UnionType):  # `float | None`: every column may be null
        (known,) = (part for part in typing.get_args(hint) if part is not type(None))
        return _types(known)
    if typing.get_origin(hint) is dict:
        key, value = (_types(part)[0] for part in typing.get_args(hint))
        return f"MAP({key}, {value})", f"MAP({key}, {value})"
    raise TypeError(f"the archive has no column type for {hint!r}")


def select_list(stream: str, *, strict: bool) -> str:
    """The columns as SQL over raw ones, in their present types: older records brought to the present version.

    Args: strict: a value that does not fit its type is an error, otherwise null.
    """
    cast = "CAST" if strict else "TRY_CAST"
    parts = []
    for column in columns(stream):
        if column.name == "v":
            parts.append(f"CAST(greatest(v, {version(stream)}) AS INTEGER) AS v")
            continue
        name = f'"{column.name}"'
        value = f"CASE WHEN v < {column.since} THEN {column.older} ELSE {name} END" if column.older else name
        parts.append(f"{cast}({value} AS {column.type}) AS {name}")
    return ", ".join(parts)


def fingerprint(stream: str) -> str:
    """Changes whenever the columns do: a test holds it against the version."""
    text = repr([(column.name, column.type) for column in columns(stream)])
    return blake2b(text.encode(), digest_size=6).hexdigest()


def check_version(stream: str, found: int, where: str) -> None:
    """Raises SchemaNewer."""
    known = version(stream)
    if found > known:
        raise SchemaNewer(
            f"{where} was written by a newer perpd: stream {stream} has version {found}, "
            f"this one reads up to {known}; read it with that perpd or a newer one"
        )
