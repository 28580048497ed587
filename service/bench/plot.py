"""Series over cycles as an SVG image: one panel each, with the fitted line behind its slope."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 900, 110, 110, 20, 60, 40


class Line(NamedTuple):
    """value = at_zero + slope * x, by least squares."""

    slope: float
    at_zero: float


class Panel(NamedTuple):
    """One series; `fitted` is the line and the x it holds from."""

    title: str
    values: Sequence[float]
    fitted: Line
    from_x: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Raises ValueError with fewer than two different x."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    if spread == 0.0:
        raise ValueError("a line needs two different x")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    return Line(slope, mean_y - slope * mean_x)


def svg(title: str, subtitle: str, x: Sequence[float], panels: Sequence[Panel]) -> str:
    """The image's text. Each panel spans from its smallest to its largest value, so that growth is seen."""
    height = TOP + len(panels) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{escape(title)}</text>',
        f'<text x="{LEFT}" y="42" fill="#555">{escape(subtitle)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, x, TOP + number * (PANEL + GAP) + 16)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, x: Sequence[float], top: float) -> list[str]:
    low, high = min(panel.values), max(panel.values)
    span = (high - low) or 1.0
    first, last = x[0], x[-1]

    def place(at: float, value: float) -> str:
        across = LEFT + (at - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{top + PANEL - (value - low) / span * PANEL:.1f}"

    points = " ".join(place(at, value) for at, value in zip(x, panel.values, strict=True))
    ends = (max(panel.from_x, first), last)
    line = " ".join(place(at, panel.fitted.at_zero + panel.fitted.slope * at) for at in ends)
    bottom = top + PANEL
    return [
        f'<text x="{LEFT}" y="{top - 5}">{escape(panel.title)}</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{PANEL}" '
        f'fill="none" stroke="#bbb"/>',
        f'<text x="{LEFT - 8}" y="{top + 10}" text-anchor="end">{high:,.2f}</text>',
        f'<text x="{LEFT - 8}" y="{bottom}" text-anchor="end">{low:,.2f}</text>',
        f'<text x="{LEFT}" y="{bottom + 14}" fill="#555">cycle {first:,.0f}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 14}" fill="#555" text-anchor="end">{last:,.0f}</text>',
        f'<polyline points="{points}" fill="none" stroke="#1f6fb4"/>',
        f'<polyline points="{line}" fill="none" stroke="#c0392b" stroke-dasharray="5 4"/>',
    ]
