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


def rank_signals(signals: Sequence[Signal], *, max_signals: int) -> list[Ranked]:
    """Order by confidence, ties by signal id, so that the order never depends on arrival.

    Only the best `max_signals` are candidates; the others are refused and followed as shadows. How many
    of the candidates a cycle trades is a rule of `risk.py`.
    """
    ordered = sorted(signals, key=lambda signal: (-signal.confidence, signal.signal_id))
    return [
        Ranked(signal=signal, rank=rank, refused=_outside(rank, max_signals))
        for rank, signal in enumerate(ordered, start=1)
    ]


def _outside(rank: int, candidates: int) -> Refused | None:
    if rank <= candidates:
        return None
    return Refused(
        reason=RefusalReason.NOT_IN_TOP, detail=f"rank {rank}, the best {candidates} are candidates"
    )
