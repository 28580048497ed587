"""What a benchmark found, and how it is shown: figures with their unit, direction and goal."""

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Literal, NamedTuple

Better = Literal["less", "more", ""]

_SIGNIFICANT_DIGITS = 4


class Figure(NamedTuple):
    """One measured number."""

    name: str
    value: float
    unit: str
    better: Better = ""
    goal: float | None = None  # inclusive, in the direction of `better`

    @property
    def verdict(self) -> str:
        """Whether the unrounded value meets the goal; "" without one."""
        if self.goal is None:
            return ""
        met = self.value <= self.goal if self.better == "less" else self.value >= self.goal
        return "met" if met else "missed"

    @property
    def goal_words(self) -> str:
        return "" if self.goal is None else f"{'<=' if self.better == 'less' else '>='} {self.goal:g}"


class Result(NamedTuple):
    """One run of one benchmark."""

    name: str
    measures: str  # what is measured and how, in sentences
    parameters: Mapping[str, Any]
    machine: Mapping[str, Any]
    figures: tuple[Figure, ...]
    details: Mapping[str, Any] = {}  # for machines only: series, lists
    notes: tuple[str, ...] = ()  # what no number says, in sentences

    def as_json(self) -> dict[str, Any]:
        """Values as they were measured, never rounded."""
        return {
            "benchmark": self.name,
            "measures": self.measures,
            "parameters": dict(self.parameters),
            "machine": dict(self.machine),
            "figures": {
                figure.name: {
                    "value": figure.value,
                    "unit": figure.unit,
                    "goal": figure.goal,
                    "better": figure.better,
                    "verdict": figure.verdict,
                }
                for figure in self.figures
            },
            "notes": list(self.notes),
            "details": dict(self.details),
        }


def quantile(values: list[float], fraction: float) -> float:
    """The smallest value that at least this share of the values does not exceed: never between two."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * fraction), len(ordered) - 1)]


def shown(figure: Figure) -> str:
    """The value with four significant digits, rounded against us: up where less is better, else down."""
    if not math.isfinite(figure.value):
        return str(figure.value)
    if figure.value == int(figure.value) and abs(figure.value) < 1e15:
        return f"{int(figure.value):,}"
    exact = Decimal(repr(figure.value))
    digits = max(_SIGNIFICANT_DIGITS - exact.adjusted() - 1, 0)
    rounding = ROUND_FLOOR if figure.better == "more" else ROUND_CEILING
    return f"{exact.quantize(Decimal(1).scaleb(-digits), rounding=rounding):,}"


def table(result: Result) -> str:
    """The result as text for a terminal."""
    rows = [("", "value", "unit", "goal", "")]
    rows += [(f.name, shown(f), f.unit, f.goal_words, f.verdict) for f in result.figures]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{result.name}: {result.measures}",
        "parameters: " + words(result.parameters),
        "machine: " + words(result.machine),
    ]
    for name, value, unit, goal, verdict in rows:
        line = f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {unit:<{widths[2]}}  {goal:<{widths[3]}}"
        lines.append(f"{line}  {verdict}".rstrip())
    return "\n".join([*lines, *result.notes])


def words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
