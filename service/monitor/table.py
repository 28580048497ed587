"""Two columns for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any


def table(title: str, unit: str, rows: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    width = max(len(title), *(len(name) for name in rows), 40) if rows else len(title)
    yield f"{title:<{width}} {unit:>16}"
    for name, value in rows.items():
        yield f"{name:<{width}} {value:>16}"
