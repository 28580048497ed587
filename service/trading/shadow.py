"""Shadow positions: every signal followed on real candles to its outcome, traded or not."""

from collections.abc import Mapping, Sequence
from itertools import islice

from service.ports import Archive, CandleRow, Recorder, StateStore
from service.records import CloseReason, FundingRate, ShadowPosition, Signal
from service.trading.outcomes import (
    CANDLE_MS,
    NO_FINER,
    NO_FUNDING,
    Costs,
    Finer,
    advance,
    closed,
    shadow_of,
)

MOVED_PER_FLUSH = 250  # keeps a cycle with a full book short
HOUR_MS = 3_600_000


class ShadowBook:
    """Open shadows by symbol, at most `max_shadows`.

    A full book takes no new ones and counts them: to close an open one early would cut its outcome
    short, and outcomes that depend on how busy the market was would mislead whoever learns from them.
    """

    def __init__(
        self,
        store: StateStore,
        archive: Archive,
        recorder: Recorder,
        *,
        fee_fraction: float,
        life_hours: float,
        max_shadows: int,
    ) -> None:
        self._store = store
        self._archive = archive
        self._recorder = recorder
        self._costs = Costs(fee_fraction, life_ms=round(life_hours * HOUR_MS))
        self._max_shadows = max_shadows
        self._open: dict[str, dict[str, ShadowPosition]] = {}
        self._count = 0
        self._closed_count = 0
        self._unsaved: dict[str, ShadowPosition] = {}  # opened or closed: written at the next flush
        self._undecided: set[tuple[str, int]] = set()  # symbol and 5m candle to be read in 1m candles
        self._moved: dict[str, ShadowPosition] = {}  # looked at: written a few at a time, oldest first

    async def restore(self) -> None:
        """Go on with what the store has; feed candles from `checked_ms` of each symbol on."""
        for shadow in await self._store.open_shadows():
            self._keep(shadow)

    @property
    def open_count(self) -> int:
        return self._count

    @property
    def closed_count(self) -> int:
        """Closed since the start of this run."""
        return self._closed_count

    def symbols(self) -> frozenset[str]:
        return frozenset(self._open)

    def checked_ms(self, symbol: str) -> int:
        """Candles of the symbol are needed from here on; 0 when it has no shadow."""
        return min((s.checked_ms for s in self._open.get(symbol, {}).values()), default=0)

    def take_undecided(self) -> list[tuple[str, int]]:
        """(symbol, open time) of the 5m candles whose 1m candles `update` has asked for since."""
        found, self._undecided = sorted(self._undecided), set()
        return found

    def oldest_ms(self) -> int:
        """Candles and funding of any symbol are needed from here on; 0 when nothing is followed."""
        return min((s.checked_ms for shadows in self._open.values() for s in shadows.values()), default=0)

    def open(self, signal: Signal, *, traded: bool = False) -> ShadowPosition | None:
        """Follow a signal; once only, None when it is followed already or the book is full.

        `traded`: it has a real position as well; the shadow then shows what slippage cost.
        """
        shadow = shadow_of(signal, traded=traded)
        if shadow.position_id in self._open.get(signal.symbol, {}):
            return None
        if self._count >= self._max_shadows:
            self._recorder.count("shadows.refused")
            return None
        self._keep(shadow)
        self._unsaved[shadow.position_id] = shadow
        return shadow

    def update(
        self,
        symbol: str,
        candles: Sequence[CandleRow],
        *,
        funding: Mapping[int, FundingRate] = NO_FUNDING,
        finer: Finer = NO_FINER,
    ) -> list[ShadowPosition]:
        """Check the symbol's shadows against closed 5m candles, oldest first. Returns those that closed.

        A candle that touches stop and target of one holds that one until it comes again with its 1m
        candles in `finer`: see `take_undecided`.
        """
        shadows = self._open.get(symbol)
        if not shadows or not candles:
            return []
        ended: list[ShadowPosition] = []
        newest_ms = candles[-1][0] + CANDLE_MS
        for name, shadow in list(shadows.items()):
            if shadow.checked_ms >= newest_ms:
                continue
            moved, undecided_ms = advance(shadow, candles, self._costs, funding=funding, finer=finer)
            if undecided_ms is not None:
                self._undecided.add((symbol, undecided_ms))
            if moved is shadow:
                continue
            if moved.closed_ms:
                self._unsaved[name] = moved
                ended.append(moved)
                self._drop(moved)
            else:
                shadows[name] = moved
                unsaved = self._unsaved if name in self._unsaved else self._moved
                unsaved[name] = moved
        return ended

    def expire(self, now_ms: int) -> list[ShadowPosition]:
        """Close what outlived its hours without candles (a delisted symbol), at the entry price.

        An hour of grace lets late candles decide first.
        """
        expired: list[ShadowPosition] = []
        for shadows in list(self._open.values()):
            for shadow in list(shadows.values()):
                if now_ms - shadow.opened_ms >= self._costs.life_ms + HOUR_MS:
                    ended = closed(shadow, shadow.entry, CloseReason.EXPIRED, now_ms, self._costs)
                    self._unsaved[ended.position_id] = ended
                    self._drop(ended)
                    expired.append(ended)
        return expired

    async def flush(self, *, everything: bool = False) -> None:
        """Write what opened and closed in one transaction, and archive what closed. Call once a cycle.

        Of those merely looked at only some are written, unless `everything` is asked for: a restart
        looks again at the candles since, and comes to the same.
        """
        changed, self._unsaved = self._unsaved, {}
        looked_at = list(islice(self._moved, None if everything else MOVED_PER_FLUSH))
        changed |= {name: self._moved.pop(name) for name in looked_at}
        if not changed:
            return
        try:
            await self._store.save_shadows(list(changed.values()))
        except BaseException:
            self._unsaved = {**changed, **self._unsaved}
            raise
        for shadow in changed.values():
            if shadow.closed_ms:
                await self._archive.put("shadow_outcomes", shadow)

    def _keep(self, shadow: ShadowPosition) -> None:
        self._open.setdefault(shadow.symbol, {})[shadow.position_id] = shadow
        self._count += 1

    def _drop(self, shadow: ShadowPosition) -> None:
        shadows = self._open[shadow.symbol]
        del shadows[shadow.position_id]
        self._moved.pop(shadow.position_id, None)
        if not shadows:
            del self._open[shadow.symbol]
        self._count -= 1
        self._closed_count += 1
