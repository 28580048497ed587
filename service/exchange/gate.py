"""What the state of a run says about sending: whether this perpd may, and until when a host wants silence."""

from collections.abc import Callable

import msgspec


def _nothing_against() -> str:
    return ""


def _no_silence(host: str) -> int:
    return 0


def _forget(host: str, until_ms: int) -> None:
    pass


class Gate(msgspec.Struct):
    """Asked by the adapter; made by the daemon from the lease and the kept bans.

    `may_send`: why no request that changes the account may be sent now, or ''. `silent_until_ms`: venue
    time until which a host asked for silence before the restart, or 0. `silenced`: it asks for it now.
    `may_open`: why no order that opens something may leave, or ''; set once there is a kill switch.
    """

    may_send: Callable[[], str] = _nothing_against
    silent_until_ms: Callable[[str], int] = _no_silence
    silenced: Callable[[str, int], None] = _forget
    may_open: Callable[[], str] = _nothing_against


OPEN = Gate()
"""For who sends nothing, or answers to nobody; never changed."""
