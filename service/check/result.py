"""What one check found, and what to do about it."""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import msgspec


class Verdict(StrEnum):
    PASS = "pass"
    WARN = "warn"  # trading is possible, and the user should know
    FAIL = "fail"  # live trading does not start
    SKIP = "skip"  # could not be looked at, because of a failure above


class Check(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""  # what to do; "" where nothing is to be done


def passed(name: str, found: str) -> Check:
    return Check(name, Verdict.PASS, found)


def warned(name: str, found: str, advice: str) -> Check:
    return Check(name, Verdict.WARN, found, advice)


def failed(name: str, found: str, advice: str) -> Check:
    return Check(name, Verdict.FAIL, found, advice)


def skipped(name: str, because: str) -> Check:
    return Check(name, Verdict.SKIP, f"not looked at: {because}")


def failures(checks: Iterable[Check]) -> list[Check]:
    """What forbids live trading: what failed, and what could not be looked at."""
    return [check for check in checks if check.verdict in (Verdict.FAIL, Verdict.SKIP)]


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """The table for a reader."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{check.verdict.value:<5} {check.name:<{width}}  {check.found}"
        if check.advice:
            yield f"{'':<5} {'':<{width}}  -> {check.advice}"
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}
    yield ""
    yield ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    return {"ready": not failures(checks), "checks": msgspec.to_builtins(checks)}
