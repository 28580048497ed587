"""Shadow positions: every signal that is not traded, followed on real candles to its outcome.

Assumptions, all against the shadow: entry at the signal's price; when a candle touches stop and target,
the stop came first; a candle that opens beyond the stop fills at its open, one that opens beyond the
target at the target; taker fees on both sides. Funding is left out.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import msgspec

from service.ports import Archive, CandleRow, Recorder, StateStore
from service.records import TIMEFRAME_MS, CloseReason, PositionSide, ShadowPosition, Signal

CANDLE_MS = TIMEFRAME_MS["5m"]
MOVED_PER_FLUSH = 250  # keeps a cycle with a full book short
HOUR_MS = 3_600_000


def shadow_of(signal: Signal) -> ShadowPosition:
    """The shadow of a signal, opened at the close of its candle."""
    return ShadowPosition(
        position_id=f"shadow:{signal.signal_id}",
        signal_id=signal.signal_id,
        symbol=signal.symbol,
        position_side=signal.position_side,
        entry=signal.entry,
        stop=signal.stop,
        target=signal.target,
        opened_ms=signal.candle_close_ms,
        checked_ms=signal.candle_close_ms,
    )


def advance(
    shadow: ShadowPosition, candles: Iterable[CandleRow], *, fee_fraction: float, life_ms: int
) -> ShadowPosition:
    """The shadow after closed 5m candles, oldest first; those already seen are ignored. Pure."""
    long = shadow.position_side is PositionSide.LONG
    risk = abs(shadow.entry - shadow.stop)
    best, worst = shadow.favourable_excursion, shadow.adverse_excursion
    checked_ms = shadow.checked_ms
    for open_ms, open_, high, low, close, _ in candles:
        if open_ms < checked_ms:
            continue
        checked_ms = open_ms + CANDLE_MS
        near, far = (high, low) if long else (low, high)
        best = max(best, _in_r(shadow, near, risk))
        worst = max(worst, -_in_r(shadow, far, risk))
        ended = _ending(shadow, open_, high, low)
        if ended is None and checked_ms - shadow.opened_ms >= life_ms:
            ended = (close, CloseReason.EXPIRED)
        if ended is not None:
            price, reason = ended
            moved = msgspec.structs.replace(
                shadow,
                checked_ms=checked_ms,
                favourable_excursion=best,
                adverse_excursion=worst,
            )
            return _closed(moved, price, reason, checked_ms, fee_fraction)
    if checked_ms == shadow.checked_ms:
        return shadow
    return msgspec.structs.replace(
        shadow, checked_ms=checked_ms, favourable_excursion=best, adverse_excursion=worst
    )


def _ending(
    shadow: ShadowPosition, open_: float, high: float, low: float
) -> tuple[float, CloseReason] | None:
    if shadow.position_side is PositionSide.LONG:
        if low <= shadow.stop:
            return min(open_, shadow.stop), CloseReason.STOP
        return (shadow.target, CloseReason.TARGET) if high >= shadow.target else None
    if high >= shadow.stop:
        return max(open_, shadow.stop), CloseReason.STOP
    return (shadow.target, CloseReason.TARGET) if low <= shadow.target else None


def _in_r(shadow: ShadowPosition, price: float, risk: float) -> float:
    return (price - shadow.entry) * shadow.position_side.sign / risk if risk else 0.0


def _closed(
    shadow: ShadowPosition, price: float, reason: CloseReason, at_ms: int, fee_fraction: float
) -> ShadowPosition:
    fees = (shadow.entry + price) * fee_fraction
    result = (price - shadow.entry) * shadow.position_side.sign - fees
    risk = abs(shadow.entry - shadow.stop)
    return msgspec.structs.replace(
        shadow,
        closed_ms=at_ms,
        exit_price=price,
        close_reason=reason.value,
        outcome_r=result / risk if risk else 0.0,
        pnl_fraction=result / shadow.entry if shadow.entry else 0.0,
    )


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
        self._fee_fraction = fee_fraction
        self._life_ms = round(life_hours * HOUR_MS)
        self._max_shadows = max_shadows
        self._open: dict[str, dict[str, ShadowPosition]] = {}
        self._count = 0
        self._closed_count = 0
        self._unsaved: dict[str, ShadowPosition] = {}  # opened or closed: written at the next flush
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

    def open(self, signal: Signal) -> ShadowPosition | None:
        """Follow a signal; once only, None when it is followed already or the book is full."""
        shadow = shadow_of(signal)
        if shadow.position_id in self._open.get(signal.symbol, {}):
            return None
        if self._count >= self._max_shadows:
            self._recorder.count("shadows.refused")
            return None
        self._keep(shadow)
        self._unsaved[shadow.position_id] = shadow
        return shadow

    def update(self, symbol: str, candles: Sequence[CandleRow]) -> list[ShadowPosition]:
        """Check the symbol's shadows against closed 5m candles, oldest first. Returns those that closed."""
        shadows = self._open.get(symbol)
        if not shadows or not candles:
            return []
        closed: list[ShadowPosition] = []
        newest_ms = candles[-1][0] + CANDLE_MS
        for name, shadow in list(shadows.items()):
            if shadow.checked_ms >= newest_ms:
                continue
            moved = advance(shadow, candles, fee_fraction=self._fee_fraction, life_ms=self._life_ms)
            if moved is shadow:
                continue
            if moved.closed_ms:
                self._unsaved[name] = moved
                closed.append(moved)
                self._drop(moved)
            else:
                shadows[name] = moved
                unsaved = self._unsaved if name in self._unsaved else self._moved
                unsaved[name] = moved
        return closed

    def expire(self, now_ms: int) -> list[ShadowPosition]:
        """Close what outlived its hours without candles (a delisted symbol), at the entry price.

        An hour of grace lets late candles decide first.
        """
        closed: list[ShadowPosition] = []
        for shadows in list(self._open.values()):
            for shadow in list(shadows.values()):
                if now_ms - shadow.opened_ms >= self._life_ms + HOUR_MS:
                    ended = _closed(shadow, shadow.entry, CloseReason.EXPIRED, now_ms, self._fee_fraction)
                    self._unsaved[ended.position_id] = ended
                    self._drop(ended)
                    closed.append(ended)
        return closed

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
