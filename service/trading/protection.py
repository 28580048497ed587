"""What to do when a stop or target cannot be placed. Pure: failures in, the next step out.

The ladder for a stop: place it; once more; with the other working type; close at market. What shows
that the price is already beyond it, or that time is up, jumps to the last step.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

BREACHED = frozenset({-2021, -4142})
"""Would trigger immediately: the market is already beyond the level."""
ALREADY_THERE = frozenset({-4116, -4130})
"""The client id, or a closing order of this direction, is known: ask what rests there."""
POSITION_GONE = frozenset({-2022, -4118, -4509})
"""Nothing to reduce or protect: ask for the position."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt that left nothing resting on the venue."""

    code: int  # the venue's, 0 where it gave none
    detail: str


NOTHING_HELD = Failure(code=0, detail="the venue holds no position there")
"""There is nothing to protect: not a failure of the stop, and no reason to try again."""


class Step(StrEnum):
    """What to do next."""

    PLACE = "place"
    PLACE_OTHER_WORKING_TYPE = "place_other_working_type"
    ASK = "ask"
    CLOSE = "close"
    GIVE_UP = "give_up"  # a target only: the stop still protects


def next_stop_step(failures: Sequence[Failure], *, unprotected_s: float, limit_s: float) -> Step:
    """The step after these failures, oldest first, of one round of placing a stop."""
    if not failures:
        return Step.PLACE
    newest = failures[-1]
    if newest.code in BREACHED:
        return Step.CLOSE
    if newest.code in ALREADY_THERE | POSITION_GONE and len(failures) == 1:
        return Step.ASK
    if unprotected_s >= limit_s or len(failures) >= 3:
        return Step.CLOSE
    return Step.PLACE if len(failures) == 1 else Step.PLACE_OTHER_WORKING_TYPE


def next_target_step(failures: Sequence[Failure]) -> Step:
    """A target that would trigger at once has been reached: take it. Otherwise try once more."""
    if not failures:
        return Step.PLACE
    if failures[-1].code in BREACHED:
        return Step.CLOSE
    return Step.PLACE if len(failures) == 1 else Step.GIVE_UP


def other_working_type(working_type: str) -> str:
    return "CONTRACT_PRICE" if working_type == "MARK_PRICE" else "MARK_PRICE"
