"""How much to trade: margin by confidence, loss at the stop within the budget, on the venue's grid. Pure."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

import msgspec

from service.records import Bracket, Instrument, OrderPurpose, PositionSide, RefusalReason, Signal
from service.settings import RiskSettings
from service.trading.ranking import Refused


class Approved(msgspec.Struct, frozen=True, kw_only=True):
    """What may be traded. `margin` and `notional` are at the expected entry price."""

    quantity: Decimal
    leverage: int
    entry: Decimal  # expected: the close of the signal's candle
    stop: Decimal
    target: Decimal
    notional: Decimal
    margin: Decimal
    risk_amount: Decimal  # loss at the stop with both fees
    equity: Decimal


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """Entry, stop and target as the venue takes them."""

    entry: Decimal
    stop: Decimal
    target: Decimal


def size_position(
    signal: Signal,
    instrument: Instrument,
    brackets: Sequence[Bracket],
    *,
    equity: Decimal,
    available: Decimal,
    leverage: int,
    taker_fee_fraction: Decimal,
    risk: RiskSettings,
) -> Approved | Refused:
    """Quantity, leverage and levels of one signal.

    The smallest of the margin rule, the loss budget, the bracket and the venue's largest market order
    counts; the loss budget wins over the least margin, so a wide stop may use less than it.
    """
    levels = venue_levels(signal, instrument)
    if isinstance(levels, Refused):
        return levels
    bracket = _bracket_for(brackets, leverage, risk)
    if isinstance(bracket, Refused):
        return bracket
    leverage, most_notional = bracket
    loss_per_unit = loss_at_stop(Decimal(1), levels, taker_fee_fraction)
    wanted = equity * margin_fraction(signal.confidence, risk) * leverage / levels.entry
    bearable = equity * _decimal(risk.loss_fraction) / loss_per_unit
    quantity = on_grid(min(wanted, bearable, most_notional / levels.entry), instrument)
    too_small = _below_minimum(quantity, levels.entry, instrument)
    if too_small:
        return too_small
    notional = quantity * levels.entry
    margin = notional / leverage
    needed = margin + notional * taker_fee_fraction
    if needed > available:
        return Refused(
            reason=RefusalReason.MARGIN_INSUFFICIENT,
            detail=f"margin and fee {needed:.4f}, available {available:.4f}",
        )
    beyond = _beyond_liquidation(signal.position_side, levels, quantity, margin, brackets)
    if beyond:
        return beyond
    return Approved(
        quantity=quantity,
        leverage=leverage,
        entry=levels.entry,
        stop=levels.stop,
        target=levels.target,
        notional=notional,
        margin=margin,
        risk_amount=loss_at_stop(quantity, levels, taker_fee_fraction),
        equity=equity,
    )


def margin_fraction(confidence: float, risk: RiskSettings) -> Decimal:
    """Margin over equity: the base scaled by confidence, within its bounds."""
    scaled = _decimal(risk.margin_fraction) * _decimal(confidence)
    return min(max(scaled, _decimal(risk.min_margin_fraction)), _decimal(risk.max_margin_fraction))


def loss_at_stop(quantity: Decimal, levels: Levels, taker_fee_fraction: Decimal) -> Decimal:
    """What is lost when the stop fills at its price, with the fees of entry and exit."""
    fees = (levels.entry + levels.stop) * taker_fee_fraction
    return quantity * (abs(levels.entry - levels.stop) + fees)


def venue_levels(signal: Signal, instrument: Instrument) -> Levels | Refused:
    """Stop and target on the tick grid, both rounded towards the entry.

    Towards the entry is the careful side for both: the stop loses less than was planned, and the
    target is reached no later.
    """
    if not _finite_positive(signal.entry, signal.stop, signal.target):
        return _stop_invalid(f"levels {signal.entry}, {signal.stop}, {signal.target}: all must be above 0")
    long = signal.position_side is PositionSide.LONG
    below, above = ROUND_CEILING, ROUND_FLOOR  # a level below the entry rises to the grid, one above falls
    tick = instrument.tick_size
    levels = Levels(
        entry=_decimal(signal.entry),
        stop=on_tick(_decimal(signal.stop), tick, below if long else above),
        target=on_tick(_decimal(signal.target), tick, above if long else below),
    )
    low, high = (levels.stop, levels.target) if long else (levels.target, levels.stop)
    if not low < levels.entry < high:
        return _stop_invalid(f"stop {levels.stop} and target {levels.target} must enclose {levels.entry}")
    if abs(levels.entry - levels.stop) < tick:
        return _stop_invalid(f"stop {levels.stop} is less than one tick ({tick}) from {levels.entry}")
    floor = max(instrument.min_price, levels.entry * instrument.multiplier_down)
    ceiling = instrument.max_price or high
    if instrument.multiplier_up > 0:
        ceiling = min(ceiling, levels.entry * instrument.multiplier_up)
    if low < floor or high > ceiling:
        return _stop_invalid(f"levels {low} to {high}, the venue takes {floor} to {ceiling}")
    return levels


def fitted_quantity(quantity: Decimal, entry: Decimal, instrument: Instrument) -> Decimal | Refused:
    """A quantity decided on other rules, on the grid of these; never larger. Entry: for the notional."""
    fitted = on_grid(quantity, instrument)
    return _below_minimum(fitted, entry, instrument) or fitted


def fitted_trigger(
    price: Decimal, side: PositionSide, purpose: OrderPurpose, instrument: Instrument
) -> Decimal:
    """A stop or target decided on other rules, on these ticks, rounded towards the entry."""
    rises = (side is PositionSide.LONG) == (purpose is OrderPurpose.STOP)
    return on_tick(price, instrument.tick_size, ROUND_CEILING if rises else ROUND_FLOOR)


def liquidation_estimate(
    side: PositionSide, entry: Decimal, quantity: Decimal, margin: Decimal, bracket: Bracket | None
) -> Decimal:
    """The mark price at which an isolated position is liquidated; 0 when none is.

    There margin plus profit equals the maintenance margin:
    margin + sign x quantity x (price - entry) = quantity x price x fraction - amount.
    """
    fraction = bracket.maintenance_margin_fraction if bracket else Decimal(0)
    amount = bracket.maintenance_amount if bracket else Decimal(0)
    signed = quantity * side.sign
    divisor = quantity * fraction - signed
    return max((margin + amount - signed * entry) / divisor, Decimal(0)) if divisor else Decimal(0)


def _beyond_liquidation(
    side: PositionSide, levels: Levels, quantity: Decimal, margin: Decimal, brackets: Sequence[Bracket]
) -> Refused | None:
    notional = quantity * levels.entry
    bracket = next((row for row in brackets if notional <= row.notional_cap), None)
    liquidation = liquidation_estimate(side, levels.entry, quantity, margin, bracket)
    if (levels.stop - liquidation) * side.sign > 0:
        return None
    return _stop_invalid(f"stop {levels.stop} lies beyond the liquidation estimate {liquidation:.8f}")


def _bracket_for(
    brackets: Sequence[Bracket], leverage: int, risk: RiskSettings
) -> tuple[int, Decimal] | Refused:
    """The leverage the venue grants, and the largest notional it grants it for."""
    if not brackets:
        return Refused(reason=RefusalReason.ABOVE_BRACKET, detail="0 leverage brackets known, 1 is needed")
    highest = max(row.max_leverage for row in brackets)
    if highest < risk.min_leverage:
        return Refused(
            reason=RefusalReason.ABOVE_BRACKET,
            detail=f"the venue grants {highest}x, at least {risk.min_leverage}x is set",
        )
    granted = min(leverage, highest)
    return granted, max(row.notional_cap for row in brackets if row.max_leverage >= granted)


def on_grid(quantity: Decimal, instrument: Instrument) -> Decimal:
    """The largest market order not above `quantity`."""
    most = instrument.market_max_quantity or instrument.max_quantity
    step = max(instrument.market_step_size, instrument.step_size)
    capped = min(quantity, most) if most > 0 else quantity
    return capped // step * step


def _below_minimum(quantity: Decimal, entry: Decimal, instrument: Instrument) -> Refused | None:
    least = max(instrument.market_min_quantity, instrument.min_quantity)
    if quantity < least or quantity <= 0:
        return Refused(
            reason=RefusalReason.BELOW_MINIMUM, detail=f"quantity {quantity}, at least {least} is needed"
        )
    if quantity * entry < instrument.min_notional:
        return Refused(
            reason=RefusalReason.BELOW_MINIMUM,
            detail=f"notional {quantity * entry:.4f}, at least {instrument.min_notional} is needed",
        )
    return None


def _stop_invalid(detail: str) -> Refused:
    return Refused(reason=RefusalReason.STOP_INVALID, detail=detail)


def on_tick(price: Decimal, tick: Decimal, rounding: str) -> Decimal:
    """The price on the tick grid. Args: rounding: of `decimal`."""
    return (price / tick).to_integral_value(rounding) * tick


def _finite_positive(*values: float) -> bool:
    return all(0 < value < float("inf") for value in values)


def _decimal(value: float) -> Decimal:
    """The decimal a person would read, not the binary fraction behind it."""
    return Decimal(repr(value))
