"""The account as it stands now, against the day's start and the peak, and against our books."""

import msgspec
import structlog

from service.errors import VenueError
from service.ports import Clock, Exchange, Recorder, StateStore
from service.records import Account
from service.trading.ledger import Ledger, LedgerCheck
from service.trading.risk import EquityMarks, marks_after, opening_marks

log = structlog.get_logger("trading.equity")

MARKS = "equity_marks"


class EquityWatch:
    """Reads the account once a cycle and keeps the marks that losses are measured against.

    An account that cannot be read is None, never guessed: entries stop until it can be.
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
        self.account: Account | None = None
        self.marks: EquityMarks | None = None
        self.check: LedgerCheck | None = None

    async def open(self) -> None:
        """Take up the marks of earlier runs."""
        text = await self._store.get_value(MARKS)
        if text:
            self.marks = msgspec.json.decode(text, type=EquityMarks)

    async def look(self) -> Account | None:
        """Read the account, move the marks, and keep them durably when they moved."""
        try:
            self.account = await self._exchange.account()
        except VenueError as error:
            self.account = self.check = None
            self._recorder.count("equity.unknown")
            log.warning("the account cannot be read, no entries", reason=str(error))
            return None
        self.check = self._ledger.compare(self.account)
        await self._move_marks(float(self.account.equity))
        return self.account

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
