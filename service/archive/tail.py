"""`perpd archive tail`: records as they come, from the hot segments; like `tail -f`, over several streams."""

import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from service.archive.fields import FieldWatch
from service.archive.schema import STREAMS
from service.archive.segments import segments
from service.errors import EXIT_USAGE, PerpdError

POLL_S = 0.25
_CONDITION = re.compile(r"\s*([\w.]+)\s*(!=|>=|<=|=|>|<|~)\s*(.*?)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}

Record = dict[str, Any]


class Condition(NamedTuple):
    """A test of a record, and the field it looks at."""

    field: str
    matches: Callable[[Record], bool]


class ConditionInvalid(PerpdError):
    """A condition of --where cannot be read."""

    exit_code = EXIT_USAGE


def condition(text: str) -> Condition:
    """A test of a record, from words like `symbol=BTCUSDT`, `features.rsi>70`, `reason~margin`.

    Numbers are compared as numbers where both sides are; `~` looks for text within. Raises ConditionInvalid.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise ConditionInvalid(f"--where {text!r}: allowed is FIELD OP VALUE with = != > < >= <= ~")
    path, sign, wanted = found[1].split("."), found[2], found[3].strip("'\"")

    def test(record: Record) -> bool:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            return sign == "!="
        if sign == "~":
            return wanted in str(value)
        try:
            return _OPERATORS[sign](float(value), float(wanted))
        except (TypeError, ValueError):
            return _OPERATORS[sign](str(value), wanted)

    return Condition(found[1], test)


def tail(
    directory: Path,
    streams: Sequence[str],
    conditions: Sequence[Condition],
    lines: int,
    *,
    follow: bool,
    warn: Callable[[str], None],
) -> Iterator[Record]:
    """The last `lines` matching records of each stream, then those that come; each with its `stream`.

    Args: warn: is told once of each field of a condition that no record so far has.
    """
    streams = streams or list(STREAMS)
    watch = FieldWatch(streams, (one.field for one in conditions))

    def matching(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            watch.look(record)
            if all(one.matches(record) for one in conditions):
                yield record

    followers = [_Follower(directory, stream) for stream in streams]
    for follower in followers:
        found = list(matching(follower.last()))
        yield from found[-lines:] if lines else []
    while True:
        for words in watch.missing():
            warn(words)
        if not follow:
            return
        new = [record for follower in followers for record in follower.new()]
        yield from matching(new)
        if not new:
            time.sleep(POLL_S)


class _Follower:
    """One stream: where its reading goes on."""

    def __init__(self, directory: Path, stream: str) -> None:
        self._directory = directory
        self._stream = stream
        found = segments(directory, stream)
        self._path = found[-1] if found else None
        self._at = 0

    def last(self) -> list[Record]:
        """The newest segment's records so far; `new` goes on behind them."""
        return list(self._read())

    def new(self) -> Iterator[Record]:
        yield from self._read()
        for path in segments(self._directory, self._stream):
            if self._path is None or path.stem > self._path.stem:
                self._path, self._at = path, 0
                yield from self._read()

    def _read(self) -> Iterator[Record]:
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # still being written
                    self._at += len(line)
                    try:
                        record = msgspec.json.decode(line)
                    except msgspec.DecodeError:
                        continue
                    yield {"stream": self._stream, **record}
        except FileNotFoundError:
            return  # compacted: what follows is in the next segment
