"""What one check found, and what to do about it."""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from service.errors import EXIT_FAILURE, EXIT_OK, EXIT_UNAVAILABLE, PerpdError


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
    transient: bool = (
        False  # a failure that may pass by itself, or hangs on another row: starting again helps
    )


def passed(name: str, found: str) -> Check:
    return Check(name, Verdict.PASS, found)


def warned(name: str, found: str, advice: str) -> Check:
    return Check(name, Verdict.WARN, found, advice)


def failed(name: str, found: str, advice: str, *, transient: bool = False) -> Check:
    return Check(name, Verdict.FAIL, found, advice, transient)


def failed_with(name: str, error: PerpdError) -> Check:
    return failed(name, str(error), error.advice, transient=error.transient)


def skipped(name: str, because: str, *, transient: bool = False) -> Check:
    return Check(name, Verdict.SKIP, f"not looked at: {because}", transient=transient)


def failures(checks: Iterable[Check]) -> list[Check]:
    """What forbids live trading: what failed, and what could not be looked at."""
    return [check for check in checks if check.verdict in (Verdict.FAIL, Verdict.SKIP)]


def exit_code(checks: Iterable[Check]) -> int:
    """Of `perpd check`: 69 where all that fails may pass by itself, as an outage does."""
    bad = failures(checks)
    if not bad:
        return EXIT_OK
    return EXIT_UNAVAILABLE if all(check.transient for check in bad) else EXIT_FAILURE


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """The table for a reader."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        passes = " (may pass by itself)" if check.verdict is Verdict.FAIL and check.transient else ""
        yield f"{check.verdict.value:<5} {check.name:<{width}}  {check.found}{passes}"
        if check.advice:
            yield f"{'':<5} {'':<{width}}  -> {check.advice}"
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}
    yield ""
    yield ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    if exit_code(checks) == EXIT_UNAVAILABLE:
        yield "all that fails may pass by itself: perpd can be started again until it does"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    bad = failures(checks)
    transient = bool(bad) and all(check.transient for check in bad)
    return {"ready": not bad, "transient": transient, "checks": msgspec.to_builtins(checks)}
