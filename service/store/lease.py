"""Who may trade: one perpd at a time holds the lease, known by a fencing token that grows with each holder.

`may_send` is asked before each request that changes the account. It costs a comparison: the lease is
renewed in the background, and a holder stops a third of the lease before it could be taken over, so that
what it sent last has arrived or is lost by then.
"""

from collections.abc import Callable
from typing import Protocol

from service.clock import boot_s

SENDING_SHARE = 2 / 3  # of the lease, counted from the request that renewed it
RENEWALS = 6  # tries within one lease


class Lease(Protocol):
    """The right to trade. `epoch` is its fencing token."""

    @property
    def epoch(self) -> int: ...

    def may_send(self) -> str:
        """Why nothing may be sent now, or ''."""
        ...


class LocalLease:
    """Held as long as the lock on the data directory is, and so to the end of the process."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def may_send(self) -> str:
        return ""


class TimedLease:
    """A lease that runs out unless it is renewed.

    Args: lease_s: wall seconds after which another may take it, by the keeper's clock; asked_s: when the
    answered request was made; now_s: seconds that go on while the machine sleeps.
    """

    def __init__(
        self, epoch: int, lease_s: float, asked_s: float, now_s: Callable[[], float] = boot_s
    ) -> None:
        self.epoch = epoch
        self.lease_s = lease_s
        self._now_s = now_s
        self._sending_until_s = asked_s + lease_s * SENDING_SHARE
        self._lost = ""

    def renewed(self, asked_s: float) -> None:
        """It was renewed by a request made then."""
        self._sending_until_s = asked_s + self.lease_s * SENDING_SHARE

    def lose(self, why: str) -> None:
        """It is another's; that never changes back."""
        self._lost = self._lost or why

    @property
    def lost(self) -> str:
        return self._lost

    def may_send(self) -> str:
        if self._lost:
            return self._lost
        over_s = self._now_s() - self._sending_until_s
        if over_s < 0:
            return ""
        return f"the lease could not be renewed in time, {over_s:.0f} s ago: the database does not answer"
