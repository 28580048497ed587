"""Shadow positions: every signal followed on real candles to its outcome, traded or not."""

from collections.abc import Iterable, Mapping, Sequence

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
from service.trading.shadow_rows import ShadowRows

OUTCOMES = "shadow_outcomes"
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
        self._open = ShadowRows()
        self._closed_count = 0
        self._unsaved: dict[str, ShadowPosition] = {}  # opened or closed: written at the next flush
        self._unarchived: dict[str, ShadowPosition] = {}  # closed and written, not in the archive yet
        self._undecided: set[tuple[str, int]] = set()  # symbol and 5m candle to be read in 1m candles
        self._moved: dict[str, None] = {}  # symbols looked at: written a few at a time, oldest first

    async def restore(self) -> None:
        """Go on with what the store has; feed candles from `checked_ms` of each symbol on."""
        for shadow in await self._store.open_shadows():
            self._open.add(shadow)
        for outcome in await self._store.unarchived(OUTCOMES):
            if isinstance(outcome, ShadowPosition):
                self._unarchived[outcome.position_id] = outcome

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def closed_count(self) -> int:
        """Closed since the start of this run."""
        return self._closed_count

    def symbols(self) -> frozenset[str]:
        return self._open.symbols()

    def checked_ms(self, symbol: str) -> int:
        """Candles of the symbol are needed from here on; 0 when it has no shadow."""
        return self._open.checked_ms(symbol)

    def take_undecided(self) -> list[tuple[str, int]]:
        """(symbol, open time) of the 5m candles whose 1m candles `update` has asked for since."""
        found, self._undecided = sorted(self._undecided), set()
        return found

    def oldest_ms(self) -> int:
        """Candles and funding of any symbol are needed from here on; 0 when nothing is followed."""
        return min(map(self._open.checked_ms, self._open.symbols()), default=0)

    def open(self, signal: Signal, *, traded: bool = False) -> ShadowPosition | None:
        """Follow a signal; once only, None when it is followed already or the book is full.

        `traded`: it has a real position as well; the shadow then shows what slippage cost.
        """
        shadow = shadow_of(signal, traded=traded)
        if self._open.holds(shadow):
            return None
        if len(self._open) >= self._max_shadows:
            self._recorder.count("shadows.refused")
            return None
        self._open.add(shadow)
        self._unsaved[shadow.position_id] = shadow
        return shadow

    def new(self) -> list[ShadowPosition]:
        """Opened and not written yet."""
        return [shadow for shadow in self._unsaved.values() if not shadow.closed_ms]

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
        if not candles:
            return []
        ended: list[ShadowPosition] = []
        newest_ms = candles[-1][0] + CANDLE_MS

        def step(shadow: ShadowPosition) -> ShadowPosition:
            if shadow.checked_ms >= newest_ms:
                return shadow
            moved, undecided_ms = advance(shadow, candles, self._costs, funding=funding, finer=finer)
            if undecided_ms is not None:
                self._undecided.add((symbol, undecided_ms))
            if moved.closed_ms:
                ended.append(moved)
            if moved is not shadow:
                self._note(moved)
            return moved

        self._open.change(symbol, step)
        self._closed_count += len(ended)
        return ended

    def _note(self, moved: ShadowPosition) -> None:
        """It changed, so it must be written."""
        if moved.closed_ms or moved.position_id in self._unsaved:
            self._unsaved[moved.position_id] = moved
        else:
            self._moved[moved.symbol] = None

    def expire(self, now_ms: int, symbols: Iterable[str]) -> list[ShadowPosition]:
        """Close what outlived its hours on symbols that have no candles any more (delisted), as `no_candles`.

        The price is that of the entry, which is no outcome: who learns leaves these out. An hour of grace
        lets late candles decide first.
        """
        born_ms = now_ms - self._costs.life_ms - HOUR_MS
        expired: list[ShadowPosition] = []

        def step(shadow: ShadowPosition) -> ShadowPosition:
            if shadow.opened_ms > born_ms:
                return shadow
            ended = closed(shadow, shadow.entry, CloseReason.NO_CANDLES, now_ms, self._costs)
            expired.append(ended)
            self._note(ended)
            return ended

        for symbol in symbols:
            if self._open.opened_ms(symbol) <= born_ms:
                self._open.change(symbol, step)
        self._closed_count += len(expired)
        return expired

    async def flush(self, *, everything: bool = False) -> None:
        """Write what opened and closed in one transaction, and archive what closed. Call once a cycle.

        Of those merely looked at only some are written, unless `everything` is asked for: a restart
        looks again at the candles since, and comes to the same.
        """
        changed, self._unsaved = self._unsaved, {}
        looked_at = self._looked_at(None if everything else MOVED_PER_FLUSH)
        changed = {shadow.position_id: shadow for shadow in looked_at} | changed
        if changed:
            try:
                await self._store.save_shadows(list(changed.values()))
            except BaseException:
                self._unsaved = {**changed, **self._unsaved}
                raise
            self._unarchived.update((name, shadow) for name, shadow in changed.items() if shadow.closed_ms)
        await self._archive_outcomes()

    async def _archive_outcomes(self) -> None:
        """Put what closed into the archive; what is cut short or fails stays for the next flush or start."""
        put: list[tuple[str, ShadowPosition]] = []
        try:
            for name, outcome in list(self._unarchived.items()):
                await self._archive.put(OUTCOMES, outcome)
                del self._unarchived[name]
                put.append((OUTCOMES, outcome))
        finally:
            if put:
                await self._store.archived(put)

    def _looked_at(self, enough: int | None) -> list[ShadowPosition]:
        """All shadows of the symbols looked at longest ago, until there are enough."""
        found: list[ShadowPosition] = []
        while self._moved and (enough is None or len(found) < enough):
            symbol = next(iter(self._moved))
            del self._moved[symbol]
            found += self._open.of(symbol)
        return found
