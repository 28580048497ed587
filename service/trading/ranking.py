"""Which signals of a cycle are candidates for trading, best first."""

from collections.abc import Sequence

import msgspec

from service.records import RefusalReason, Signal


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """A signal and its place in the cycle. `refused` is why it is not a candidate, or None."""

    signal: Signal
    rank: int  # 1 is the best
    refused: "Refused | None"


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The answer no, with the value and the limit in words. A value, not an exception."""

    reason: RefusalReason
    detail: str


def rank_signals(signals: Sequence[Signal], *, max_signals: int, top_signals: int) -> list[Ranked]:
    """Order by confidence, ties by signal id, so that the order never depends on arrival.

    Only the best `max_signals` are considered and only the best `top_signals` may be traded; the others
    are refused and followed as shadows.
    """
    ordered = sorted(signals, key=lambda signal: (-signal.confidence, signal.signal_id))
    places = min(max_signals, top_signals)
    return [
        Ranked(signal=signal, rank=rank, refused=_outside(rank, places))
        for rank, signal in enumerate(ordered, start=1)
    ]


def _outside(rank: int, places: int) -> Refused | None:
    if rank <= places:
        return None
    return Refused(reason=RefusalReason.NOT_IN_TOP, detail=f"rank {rank}, the best {places} are traded")
