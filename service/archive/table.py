"""Rows as aligned text for a terminal."""

from collections.abc import Sequence
from typing import Any

_CELL = 60


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows as aligned text; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(names)]
    right = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(names))]
    lines = [_line(names, widths, right), _line(["-" * width for width in widths], widths, right)]
    return [*lines, *(_line(row, widths, right) for row in cells)]


def _line(cells: Sequence[str], widths: list[int], right: list[bool]) -> str:
    aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
    return "  ".join(aligned).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    words = f"{value:.6g}" if isinstance(value, float) else str(value)
    return words if len(words) <= _CELL else words[: _CELL - 3] + "..."
