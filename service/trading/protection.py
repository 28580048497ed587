"""What to do when a stop or target cannot be placed. Pure: failures in, the next step out.

The ladder for a stop: place it; again; with the other working type; as a reduce-only order; then perpd
watches the price itself and goes on trying; and when time is up it closes at market. What shows that the
price is already beyond the stop jumps to the last step, what shows a surprise asks the venue first.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from service.reactions import Reaction, reaction_to


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt that left nothing resting on the venue."""

    code: int  # the venue's, 0 where it gave none
    detail: str
    reached: bool = True  # false where nothing was sent, as the venue was not reached: nobody refused

    @property
    def reaction(self) -> Reaction:
        return reaction_to(self.code)


NOTHING_HELD = Failure(code=0, detail="the venue holds no position there")
"""There is nothing to protect: not a failure of the stop, and no reason to try again."""
SURPRISES = (Reaction.LOOK_FOR_STOP, Reaction.LOOK_AT_POSITION, Reaction.UNKNOWN, Reaction.MAKE_ROOM)
"""Something else rests there, or nothing is held: ask, and clear away what is in the way."""


class Step(StrEnum):
    """What to do next."""

    PLACE = "place"
    PLACE_OTHER_WORKING_TYPE = "place_other_working_type"
    PLACE_REDUCE_ONLY = "place_reduce_only"  # another order type: a quantity instead of the whole position
    ASK = "ask"
    WATCH = "watch"  # perpd closes it when the price gets there, and goes on trying to place the stop
    CLOSE = "close"
    GIVE_UP = "give_up"  # a target only: the stop still protects


PLACING = (Step.PLACE, Step.PLACE, Step.PLACE_OTHER_WORKING_TYPE, Step.PLACE_REDUCE_ONLY)


def next_stop_step(failures: Sequence[Failure], *, unprotected_s: float, limit_s: float) -> Step:
    """The step after these failures, oldest first, of one round of placing a stop."""
    if not failures:
        return Step.PLACE
    newest = failures[-1].reaction
    if newest is Reaction.CLOSE_NOW or unprotected_s >= limit_s:
        return Step.CLOSE
    if newest in SURPRISES and len(failures) == 1:
        return Step.ASK
    return PLACING[len(failures)] if len(failures) < len(PLACING) else Step.WATCH


def next_target_step(failures: Sequence[Failure]) -> Step:
    """A target that would trigger at once has been reached: take it. Otherwise try once more."""
    if not failures:
        return Step.PLACE
    if failures[-1].reaction is Reaction.CLOSE_NOW:
        return Step.CLOSE
    return Step.PLACE if len(failures) == 1 else Step.GIVE_UP


def other_working_type(working_type: str) -> str:
    return "CONTRACT_PRICE" if working_type == "MARK_PRICE" else "MARK_PRICE"


def stop_breached(stop: float, price: float, sign: int) -> bool:
    """Whether the price is at the stop or beyond it. Args: sign: 1 of a long position, -1 of a short."""
    return (price - stop) * sign <= 0
