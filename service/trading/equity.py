"""The account as it stands now, against the day's start and the peak, and against our books.

A transfer moves the venue's equity before our books hear of it, and would pass for a loss or a new peak.
So an equity that the books do not explain counts as unknown until they have been reconciled.
"""

from decimal import Decimal
from typing import Protocol

import msgspec
import structlog

from service.errors import VenueError
from service.ports import Clock, Exchange, Recorder, StateStore
from service.records import Account
from service.trading.ledger import Ledger, LedgerCheck
from service.trading.risk import EquityMarks, marks_after, opening_marks

log = structlog.get_logger("trading.equity")

MARKS = "equity_marks"
CENT = Decimal("0.01")
LOOKS = 3
LOOK_AGAIN_S = 0.2  # wall: an execution whose event is on its way makes the two differ for a moment
HISTORY_LAG_S = 30.0  # wall: the income history may tell of a transfer this much later


class Reconciliation(Protocol):
    """Who can say whether the books were compared with the venue since a moment."""

    @property
    def gap(self) -> int:
        """The number of the newest moment from which on something may be missed."""
        ...

    def on_gap(self) -> None:
        """Now is such a moment: reconcile."""
        ...

    def reconciled_since(self, gap: int) -> bool:
        """Whether a reconciliation that began after it is complete."""
        ...


class Doubt(msgspec.Struct, frozen=True):
    """A difference that nothing explains yet: since when, and the reconciliation that is awaited."""

    since_s: float
    gap: int


class EquityWatch:
    """Reads the account once a cycle and keeps the marks that losses are measured against.

    An account that cannot be read, or whose equity our books do not explain, is None, never guessed: entries
    stop, and no loss is measured, until it is known. What a complete reconciliation leaves unexplained is
    taken as it is. `reconciliation` is set by whoever opens the executor; without it a difference stays
    in doubt.
    """

    def __init__(
        self,
        exchange: Exchange,
        store: StateStore,
        ledger: Ledger,
        clock: Clock,
        recorder: Recorder,
    ) -> None:
        self._exchange = exchange
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._recorder = recorder
        self._doubt: Doubt | None = None
        self._accepted = Decimal(0)  # the difference that a reconciliation left
        self.reconciliation: Reconciliation | None = None
        self.account: Account | None = None
        self.marks: EquityMarks | None = None
        self.check: LedgerCheck | None = None

    async def open(self) -> None:
        """Take up the marks of earlier runs."""
        text = await self._store.get_value(MARKS)
        if text:
            self.marks = msgspec.json.decode(text, type=EquityMarks)

    async def look(self, attempts: int = LOOKS) -> Account | None:
        """Read the account, move the marks, and keep them durably when they moved.

        Args: attempts: how often it is read before a difference to our books is believed.
        """
        try:
            account, check = await self._read()
            while not self._explained(check.difference) and (attempts := attempts - 1) > 0:
                await self._clock.sleep_s(LOOK_AGAIN_S * self._clock.speed)
                account, check = await self._read()
        except VenueError as error:
            self.account = self.check = None
            self._recorder.count("equity.unknown")
            log.warning("the account cannot be read, no entries", reason=str(error))
            return None
        self.check = check
        self.account = None if self._in_doubt(check.difference) else account
        if self.account is not None:
            await self._move_marks(float(account.equity))
        return self.account

    async def _read(self) -> tuple[Account, LedgerCheck]:
        account = await self._exchange.account()
        return account, self._ledger.compare(account)

    def _explained(self, difference: Decimal) -> bool:
        return abs(difference) <= CENT or abs(difference - self._accepted) <= CENT

    def _in_doubt(self, difference: Decimal) -> bool:
        """Whether equity counts as unknown; begins and ends the doubt."""
        if self._explained(difference):
            self._doubt = None
            if abs(difference) <= CENT:
                self._accepted = Decimal(0)
            return False
        now_s = self._clock.monotonic_s()
        if self._doubt is None:
            log.warning("equity is not what our books say, reconciling", difference=str(difference))
            self._recorder.count("equity.in_doubt")
            self._ask_since(now_s)
            return True
        if self.reconciliation is None or not self.reconciliation.reconciled_since(self._doubt.gap):
            return True
        if now_s < self._doubt.since_s + HISTORY_LAG_S:
            self._ask_since(self._doubt.since_s)
            return True
        log.error("equity differs after reconciling, taken as the venue has it", difference=str(difference))
        self._doubt, self._accepted = None, difference
        return False

    def _ask_since(self, since_s: float) -> None:
        if self.reconciliation is not None:
            self.reconciliation.on_gap()
        self._doubt = Doubt(since_s, self.reconciliation.gap if self.reconciliation else 0)

    async def rebase(self) -> None:
        """Measure losses from now on: the next look at the account sets day start and peak."""
        self.marks = None
        await self._store.set_value(MARKS, "")

    async def _move_marks(self, equity: float) -> None:
        now_ms, deposits = self._clock.now_ms(), float(self._ledger.deposits)
        before = self.marks or opening_marks(equity, deposits, now_ms)
        after = marks_after(before, equity, deposits, now_ms)
        if after != self.marks:
            await self._store.set_value(MARKS, msgspec.json.encode(after).decode())
            self.marks = after
