"""A dataset's description as an SVG image: balance of the classes above, drift of the features below."""

from html import escape

from service.learning.describe import LARGE_DRIFT, NOTABLE_DRIFT, Description, SplitFacts
from service.learning.splits import SPLITS

WIDTH, LEFT, RIGHT = 900, 200, 40
ROW, TOP = 18, 70
_COLOURS = {"validation": "#1f6fb4", "test": "#e08a1e"}
_WON, _LOST = "#3a9a5b", "#c9c9c9"


def svg(description: Description) -> str:
    """The image's text."""
    below = TOP + len(description.splits) * (ROW + 6) + 60
    height = below + len(description.features) * ROW + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="20" y="26" font-size="16">{escape(description.strategy)}: '
            f"{description.kept:,} examples</text>",
            '<text x="20" y="50">won (green) and lost, by split</text>',
            *_balance(description.splits),
            f'<text x="20" y="{below - 24}">drift against train (population stability index): '
            f'<tspan fill="{_COLOURS["validation"]}">validation</tspan>, '
            f'<tspan fill="{_COLOURS["test"]}">test</tspan></text>',
            *_drift(description, below),
            "</svg>",
            "",
        ]
    )


def _balance(splits: tuple[SplitFacts, ...]) -> list[str]:
    most = max((split.records for split in splits), default=1) or 1
    parts = []
    for number, split in enumerate(splits):
        top = TOP + number * (ROW + 6)
        whole = split.records / most * (WIDTH - LEFT - RIGHT)
        won = whole * split.win_fraction
        parts += [
            f'<text x="20" y="{top + 13}">{split.name}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{whole:.1f}" height="{ROW}" fill="{_LOST}"/>',
            f'<rect x="{LEFT}" y="{top}" width="{won:.1f}" height="{ROW}" fill="{_WON}"/>',
            f'<text x="{LEFT + 4}" y="{top + 13}">{split.records:,}, {split.win_fraction:.1%} won</text>',
        ]
    return parts


def _drift(description: Description, top: int) -> list[str]:
    features = description.features
    most = max([LARGE_DRIFT * 1.5, *(value for f in features for value in f.drift.values())])

    def across(value: float) -> float:
        return value / most * (WIDTH - LEFT - RIGHT)

    bottom = top + len(features) * ROW
    parts = [
        f'<line x1="{LEFT + across(at):.1f}" y1="{top}" x2="{LEFT + across(at):.1f}" y2="{bottom}" '
        f'stroke="#999" stroke-dasharray="4 3"/>'
        f'<text x="{LEFT + across(at):.1f}" y="{bottom + 16}" text-anchor="middle">{at:g}</text>'
        for at in (NOTABLE_DRIFT, LARGE_DRIFT)
    ]
    for number, feature in enumerate(features):
        y = top + number * ROW
        parts.append(f'<text x="20" y="{y + 13}">{escape(feature.name)}</text>')
        for place, split in enumerate(SPLITS[1:]):
            width = across(feature.drift.get(split, 0.0))
            parts.append(
                f'<rect x="{LEFT}" y="{y + 2 + place * 7}" width="{width:.1f}" height="6" '
                f'fill="{_COLOURS[split]}"/>'
            )
    return parts
