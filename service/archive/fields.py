"""Whether a field that a condition asks for is there at all: a mistyped one would match nothing for ever."""

import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from service.archive.schema import STREAMS, columns

STREAM = "stream"  # `tail` adds it to each record


class FieldWatch:
    """Looks at records until each field was found once, or was said to be missing once.

    Args: streams: whose records come; fields: names as conditions write them, `symbol` or `features.rsi`.
    """

    def __init__(self, streams: Sequence[str], fields: Iterable[str]) -> None:
        self._names = [STREAM, *_columns(streams)]
        self._maps = {name for stream in streams for name in _maps(stream)}
        self._keys: dict[str, set[str]] = {}  # of each map, in the records so far
        self._open = [field for field in dict.fromkeys(fields) if not self._is_column(field)]

    def _is_column(self, field: str) -> bool:
        return field in self._names

    def look(self, record: Mapping[str, Any]) -> None:
        """Take in one record."""
        if not self._open:
            return
        for name in self._maps:
            inside = record.get(name)
            if isinstance(inside, dict):
                self._keys.setdefault(name, set()).update(inside)
        self._open = [field for field in self._open if not self._found(field)]

    def _found(self, field: str) -> bool:
        name, _, key = field.partition(".")
        return key in self._keys.get(name, ())

    def missing(self) -> list[str]:
        """What to say now, in words; each field once. A map tells its keys only once a record has some."""
        said = [
            field for field in self._open if field.partition(".")[0] not in self._maps or self._known(field)
        ]
        self._open = [field for field in self._open if field not in said]
        return [self._words(field) for field in said]

    def _known(self, field: str) -> bool:
        """Whether a record so far has had something in the map that the field names."""
        name, dot, _ = field.partition(".")
        return not dot or bool(self._keys.get(name))

    def _words(self, field: str) -> str:
        name, dot, _ = field.partition(".")
        if dot and name in self._maps:
            there = ", ".join(f"{name}.{key}" for key in sorted(self._keys[name]))
        else:
            there = ", ".join(f"{one}.NAME" if one in self._maps else one for one in self._names)
        return f"--where: no record so far has a field {field!r}; there are {there}"


def _columns(streams: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(column.name for stream in streams for column in columns(stream)))


def _maps(stream: str) -> list[str]:
    hints = typing.get_type_hints(STREAMS[stream])
    return [name for name, hint in hints.items() if typing.get_origin(hint) is dict]
