"""What became of a shadow position, candle by candle. Pure.

Assumptions, all against the shadow where they leave room: entry at the signal's price; a candle that opens
beyond the stop fills at its open, one that opens beyond the target at the target; a candle that touches
both is read again in 1m candles, and where these cannot tell, the stop came first; what a candle reached
in the shadow's favour after it touched the stop does not count; taker fees on both sides; funding as it was
settled, on the notional at its mark price.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from service.ports import CandleRow
from service.records import (
    TIMEFRAME_MS,
    CloseReason,
    FundingRate,
    PositionSide,
    Resolution,
    ShadowPosition,
    Signal,
)

CANDLE_MS = TIMEFRAME_MS["5m"]

Finer = Mapping[int, Sequence[CandleRow]]
"""The 1m candles of a 5m candle, by its open time; none where the venue has none."""

NO_FINER: Finer = {}
NO_FUNDING: Mapping[int, FundingRate] = {}


class Costs(NamedTuple):
    """What holding and closing a position costs, and how long it lives."""

    fee_fraction: float  # of notional, each side
    life_ms: int


class _Ending(NamedTuple):
    price: float
    reason: CloseReason
    resolution: Resolution


class Advanced(NamedTuple):
    """A shadow after some candles; `undecided_ms` is the 5m candle whose 1m candles it waits for."""

    shadow: ShadowPosition
    undecided_ms: int | None = None


def shadow_of(signal: Signal, *, traded: bool = False) -> ShadowPosition:
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
        traded=traded,
    )


def advance(
    shadow: ShadowPosition,
    candles: Iterable[CandleRow],
    costs: Costs,
    *,
    funding: Mapping[int, FundingRate] = NO_FUNDING,
    finer: Finer = NO_FINER,
) -> Advanced:
    """The shadow after closed 5m candles, oldest first; those already seen are ignored.

    Args: funding: settlements by the open time of their 5m candle, all that fell into these candles.
    It stops before a candle that touches stop and target and is not in `finer`.
    """
    best, worst = shadow.favourable_excursion, shadow.adverse_excursion
    paid, checked_ms = shadow.funding_fraction, shadow.checked_ms
    for candle in candles:
        if candle[0] < checked_ms:
            continue
        ending = _ending(shadow, candle)
        if ending is None and _touches_both(shadow, candle):
            if candle[0] not in finer:
                return Advanced(_moved(shadow, checked_ms, best, worst, paid), undecided_ms=candle[0])
            ending = _resolved(shadow, finer[candle[0]])
        checked_ms = candle[0] + CANDLE_MS
        paid += _funding(shadow, funding.get(candle[0]), candle)
        if ending is None and checked_ms - shadow.opened_ms >= costs.life_ms:
            ending = _Ending(candle[4], CloseReason.EXPIRED, Resolution.CANDLE)
        near, far = _reached(shadow, candle, ending)
        best, worst = max(best, near), max(worst, -far)
        if ending is not None:
            moved = _moved(shadow, checked_ms, best, worst, paid)
            return Advanced(closed(moved, ending.price, ending.reason, checked_ms, costs, ending.resolution))
    return Advanced(_moved(shadow, checked_ms, best, worst, paid))


def closed(
    shadow: ShadowPosition,
    price: float,
    reason: CloseReason,
    at_ms: int,
    costs: Costs,
    resolution: Resolution = Resolution.CANDLE,
) -> ShadowPosition:
    """The shadow closed at a price, with its result after fees and funding."""
    fees = (shadow.entry + price) * costs.fee_fraction
    funding = shadow.funding_fraction * shadow.entry
    result = (price - shadow.entry) * shadow.position_side.sign - fees + funding
    risk = abs(shadow.entry - shadow.stop)
    return msgspec.structs.replace(
        shadow,
        closed_ms=at_ms,
        exit_price=price,
        close_reason=reason.value,
        outcome_r=result / risk if risk else 0.0,
        pnl_fraction=result / shadow.entry if shadow.entry else 0.0,
        resolution=resolution.value,
    )


def _moved(shadow: ShadowPosition, checked_ms: int, best: float, worst: float, paid: float) -> ShadowPosition:
    if checked_ms == shadow.checked_ms:
        return shadow
    return msgspec.structs.replace(
        shadow,
        checked_ms=checked_ms,
        favourable_excursion=best,
        adverse_excursion=worst,
        funding_fraction=paid,
    )


def _ending(shadow: ShadowPosition, candle: CandleRow) -> _Ending | None:
    """How a candle ends the shadow; None when it does not, or when it alone cannot tell."""
    _, open_, high, low, _, _ = candle
    sign = shadow.position_side.sign
    if (open_ - shadow.stop) * sign <= 0.0:
        return _Ending(open_, CloseReason.STOP, Resolution.CANDLE)
    if (open_ - shadow.target) * sign >= 0.0:
        return _Ending(shadow.target, CloseReason.TARGET, Resolution.CANDLE)
    stopped, reached = _touched(shadow, high, low)
    if stopped and not reached:
        return _Ending(shadow.stop, CloseReason.STOP, Resolution.CANDLE)
    if reached and not stopped:
        return _Ending(shadow.target, CloseReason.TARGET, Resolution.CANDLE)
    return None


def _touched(shadow: ShadowPosition, high: float, low: float) -> tuple[bool, bool]:
    if shadow.position_side is PositionSide.LONG:
        return low <= shadow.stop, high >= shadow.target
    return high >= shadow.stop, low <= shadow.target


def _touches_both(shadow: ShadowPosition, candle: CandleRow) -> bool:
    return all(_touched(shadow, candle[2], candle[3]))


def _resolved(shadow: ShadowPosition, minutes: Sequence[CandleRow]) -> _Ending:
    """Which of stop and target came first, told by 1m candles; the stop where they cannot tell."""
    for minute in minutes:
        ending = _ending(shadow, minute)
        if ending is not None:
            return ending._replace(resolution=Resolution.FINER)
        if _touches_both(shadow, minute):
            break
    return _Ending(shadow.stop, CloseReason.STOP, Resolution.ASSUMED)


def _reached(shadow: ShadowPosition, candle: CandleRow, ending: _Ending | None) -> tuple[float, float]:
    """The best and the worst price of a candle while the shadow was held, in R."""
    _, open_, high, low, _, _ = candle
    near, far = (high, low) if shadow.position_side is PositionSide.LONG else (low, high)
    if ending is not None and ending.reason is CloseReason.STOP:
        near, far = open_, ending.price
    elif ending is not None and ending.reason is CloseReason.TARGET:
        near, far = ending.price, _before(shadow, far)
    risk = abs(shadow.entry - shadow.stop)
    if not risk:
        return 0.0, 0.0
    sign = shadow.position_side.sign
    return (near - shadow.entry) * sign / risk, (far - shadow.entry) * sign / risk


def _before(shadow: ShadowPosition, far: float) -> float:
    """A target that was reached was reached before the stop: no worse than the stop."""
    return max(far, shadow.stop) if shadow.position_side is PositionSide.LONG else min(far, shadow.stop)


def _funding(shadow: ShadowPosition, settled: FundingRate | None, candle: CandleRow) -> float:
    """What a settlement in this candle brings, as a fraction of the entry's notional. A position opened at
    the instant of a settlement does not take part in it; one that ends in its candle was held at it."""
    if settled is None or settled.at_ms <= shadow.opened_ms or not shadow.entry:
        return 0.0
    price = settled.mark_price or candle[1]
    return -shadow.position_side.sign * settled.rate * price / shadow.entry
