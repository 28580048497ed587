"""Each decision is recorded once, whatever happens on the way.

What is about to be recorded is first written to the store, with the archive's sequence numbers: after a
crash those tell how much of it the archive has, and the rest follows. One who takes over on another host
has another archive, of which they tell nothing: it records the whole group, which both may hold then. A
signal counts as decided only once the archive has it. An entry's decision is written before its order may
leave, so that no position lacks the decision that opened it. The shadows of decided signals are written
with the mark that these are decided, so that no decided signal goes unfollowed.
"""

from collections.abc import Sequence

import msgspec
import structlog

from service.ports import Archive, StateStore
from service.records import Decision, DecisionOutcome, Signal
from service.trading.positions import position_id_of
from service.trading.shadow import ShadowBook

log = structlog.get_logger("trading.decisions")

PENDING = "decisions.pending"
Pair = tuple[Signal, Decision]


class _Pending(msgspec.Struct, frozen=True):
    """Decisions on their way to the archive, whose streams ended at these numbers before them."""

    signals: int
    decisions: int
    pairs: list[Pair]
    provisional: bool  # an entry is being tried: it was decided if it was written down
    archive: str = ""  # whose numbers these are


_decode = msgspec.json.Decoder(_Pending).decode


class DecisionLog:
    """Records decisions and opens their shadows, group after group. Call `recover` before the first."""

    def __init__(self, store: StateStore, archive: Archive, shadows: ShadowBook) -> None:
        self._store = store
        self._archive = archive
        self._shadows = shadows
        self._unfinished = False  # a group was begun in this run and did not end

    async def begin(self, pair: Pair) -> None:
        """An approved signal is about to be entered: note the decision before anything is sent."""
        await self._note([pair], provisional=True)

    async def keep(self, pairs: Sequence[Pair]) -> None:
        """Record decisions for good. Interrupted, it is finished by `recover`."""
        await self._note(pairs, provisional=False)
        await self._archive_from(pairs, 0, 0)
        await self._decided(pairs)

    async def resume(self) -> list[Pair]:
        """Finish a group of this run that was cut short or failed; returns what was decided by it."""
        return await self.recover() if self._unfinished else []

    async def recover(self) -> list[Pair]:
        """Finish what the last run did not; returns the decisions it finished."""
        text = await self._store.get_value(PENDING)
        pending = _decode(text) if text else None
        if pending is None or await self._is_decided(pending.pairs):
            self._unfinished = False
            return []
        if pending.provisional and not await self._entered(pending.pairs[0]):
            self._unfinished = False
            return []
        if pending.archive not in ("", self._archive.identity):
            pending = await self._note(pending.pairs, provisional=False)
        signals = self._archive.sequence("signals") - pending.signals
        decisions = self._archive.sequence("decisions") - pending.decisions
        missing = max(len(pending.pairs) - decisions, 0)
        log.warning("decisions that were cut short are finished now", of=len(pending.pairs), recorded=missing)
        await self._archive_from(pending.pairs, signals, decisions)
        await self._decided(pending.pairs)
        return pending.pairs

    async def _decided(self, pairs: Sequence[Pair]) -> None:
        for signal, decision in pairs:
            self._shadows.open(signal, traded=decision.outcome is DecisionOutcome.ACCEPTED)
        await self._store.save_signal_decided(pairs, self._shadows.new())
        self._unfinished = False

    async def _is_decided(self, pairs: Sequence[Pair]) -> bool:
        """Whether the group got to its end: it is marked whole or not at all."""
        oldest_ms = min(signal.candle_close_ms for signal, _ in pairs)
        return {signal.signal_id for signal, _ in pairs} <= await self._store.decided_since(oldest_ms)

    async def _note(self, pairs: Sequence[Pair], *, provisional: bool) -> _Pending:
        self._unfinished = True
        pending = _Pending(
            self._archive.sequence("signals"),
            self._archive.sequence("decisions"),
            list(pairs),
            provisional,
            self._archive.identity,
        )
        await self._store.set_value(PENDING, msgspec.json.encode(pending).decode())
        return pending

    async def _archive_from(self, pairs: Sequence[Pair], signals: int, decisions: int) -> None:
        """Put what the archive lacks: it has the first `signals` and the first `decisions` of them."""
        for at, (signal, decision) in enumerate(pairs):
            if at >= signals:
                await self._archive.put("signals", signal)
            if at >= decisions:
                await self._archive.put("decisions", decision)

    async def _entered(self, pair: Pair) -> bool:
        """Whether the entry got as far as being written down, and so may have been sent."""
        signal, decision = pair
        assert decision.outcome is DecisionOutcome.ACCEPTED
        return await self._store.position(position_id_of(signal.signal_id)) is not None
