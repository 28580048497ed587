"""The account as it stands now, against the day's start and the peak, and against our books.

A transfer moves the venue's equity before our books hear of it, and would pass for a loss or a new peak.
So an equity that the books do not explain counts as unknown until they have been reconciled. What is
unexplained even then is measured as the venue has it, and nothing is opened until it is explained or a
person has it booked.
"""

from decimal import Decimal
from typing import Protocol

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.ports import Clock, Exchange, Recorder, StateStore
from service.records import Account, Adjustment
from service.trading.ledger import Ledger, LedgerCheck
from service.trading.risk import EquityMarks, marks_after, opening_marks

log = structlog.get_logger("trading.equity")

MARKS = "equity_marks"
CENT = Decimal("0.01")
LOOKS = 3
LOOK_AGAIN_S = 0.2  # wall: an execution whose event is on its way makes the two differ for a moment
HISTORY_LAG_S = 30.0  # wall: the income history may tell of a transfer this much later
TRIFLE_FRACTION = Decimal("0.00001")
"""Of equity: what rounding may leave between books and venue over months; more is a mistake or a loss."""
SETTLE_ATTEMPTS = 3


SETTLING = (
    "look at the venue for what our books miss; `perpd resume --reason TEXT`, while perpd runs, books the "
    "difference once as an adjustment of kind settlement"
)


def unexplained_words(difference: float) -> str:
    """Args: difference: of equity, ours less the venue's."""
    side = "below" if difference > 0 else "above"
    return (
        f"the venue's equity is {abs(difference):.4f} {side} what our books explain, limit {CENT}: {SETTLING}"
    )


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

    @property
    def revision(self) -> int:
        """Counts what is booked."""
        ...

    async def events_applied(self, limit_s: float | None = None) -> bool:
        """Returns once every event taken so far is in the books."""
        ...

    async def book_settlement(
        self, amount: Decimal, why: str, at_ms: int, *, revision: int
    ) -> Adjustment | None:
        """Book an amount that nothing explains. None when something was booked since `revision`."""
        ...


class Doubt(msgspec.Struct, frozen=True):
    """A difference that nothing explains yet: since when, and the reconciliation that is awaited."""

    since_s: float
    gap: int


class EquityWatch:
    """Reads the account once a cycle and keeps the marks that losses are measured against.

    An account that cannot be read, or whose equity our books do not explain, is None, never guessed: entries
    stop, and no loss is measured, until it is known. Where a complete reconciliation leaves a difference,
    losses are measured on the venue's equity again and `unexplained` is that difference, ours less theirs:
    entries stay off until it is explained or settled. `unexplained` is None where it cannot be known now.
    `reconciliation` is set by whoever opens the executor; without it a difference stays in doubt.
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
        self._accepted = Decimal(0)  # a trifle that a reconciliation left
        self.unexplained: Decimal | None = None
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
            self.account = self.check = self.unexplained = None
            self._recorder.count("equity.unknown")
            log.warning("the account cannot be read, no entries", reason=str(error))
            return None
        self.check = check
        self.account = None if self._in_doubt(check) else account
        if self.account is not None:
            await self._move_marks(float(account.equity))
        return self.account

    async def _read(self) -> tuple[Account, LedgerCheck]:
        account = await self._exchange.account()
        return account, self._ledger.compare(account)

    def _explained(self, difference: Decimal) -> bool:
        return abs(difference) <= CENT or abs(difference - self._accepted) <= CENT

    @property
    def words(self) -> str:
        """Why the account keeps entries off, or ''."""
        return "" if not self.unexplained else unexplained_words(float(self.unexplained))

    def _in_doubt(self, check: LedgerCheck) -> bool:
        """Whether equity counts as unknown; begins and ends the doubt."""
        difference = check.difference
        if self._explained(difference):
            self._doubt = None
            if self.unexplained:
                log.warning("equity is explained again", difference=str(difference))
            self.unexplained = Decimal(0)
            if abs(difference) <= CENT:
                self._accepted = Decimal(0)
            return False
        if self.unexplained:
            self.unexplained = difference  # it may change; what settles it is the same
            return False
        self.unexplained = None
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
        self._doubt = None
        if abs(difference) <= TRIFLE_FRACTION * abs(check.venue_equity):
            log.warning(
                "equity differs after reconciling by a trifle, left as it is", difference=str(difference)
            )
            self._accepted, self.unexplained = difference, Decimal(0)
            return False
        self.unexplained = difference
        self._recorder.count("equity.unexplained")
        log.error(
            "equity differs after reconciling, no entries",
            ours=str(check.ledger_equity),
            venue=str(check.venue_equity),
            difference=str(difference),
            what_to_do=SETTLING,
        )
        return False

    def _ask_since(self, since_s: float) -> None:
        if self.reconciliation is not None:
            self.reconciliation.on_gap()
        self._doubt = Doubt(since_s, self.reconciliation.gap if self.reconciliation else 0)

    async def settle(self, reason: str, by: str) -> bool:
        """Book what is unexplained, once, at a person's word. False where it is not known or not settled.

        The difference is taken anew, at a moment since which nothing was booked. While quantities differ it
        is no amount yet: reconciliation comes first.
        """
        if self.unexplained is None or self.reconciliation is None:
            return False
        try:
            for _ in range(SETTLE_ATTEMPTS):
                await self.reconciliation.events_applied()
                revision = self.reconciliation.revision
                account, check = await self._read()
                if self._explained(check.difference):
                    break
                if check.mismatched:
                    log.error("not settled: quantities differ, reconciling first", symbols=check.mismatched)
                    self.reconciliation.on_gap()
                    return False
                booked = await self.reconciliation.book_settlement(
                    -check.difference, f"{reason} ({by})", account.at_ms, revision=revision
                )
                if booked is not None:
                    log.warning(
                        "unexplained equity is booked", amount=str(booked.amount), by=by, reason=reason
                    )
                    break
            else:
                log.error("not settled: executions came meanwhile, resume again")
                return False
        except (VenueError, DataDirectoryUnusable) as error:
            log.error("not settled, resume again", error=str(error))
            return False
        self.unexplained, self._accepted = Decimal(0), Decimal(0)
        return True

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
