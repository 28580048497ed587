"""From a ranked signal to its decision: rules, leverage, size, in that order. Pure."""

from collections.abc import Sequence
from decimal import Decimal

from service.records import Bracket, Decision, DecisionOutcome, Instrument, RefusalReason
from service.trading.leverage import choose_leverage
from service.trading.ranking import Ranked, Refused
from service.trading.risk import Limits, RiskContext, assess
from service.trading.sizing import Approved, size_position


def decide(
    ranked: Ranked,
    context: RiskContext,
    limits: Limits,
    instrument: Instrument | None,
    brackets: Sequence[Bracket],
    taker_fee_fraction: Decimal,
) -> Approved | Refused:
    """What is to become of one signal. A rule's refusal comes before its place in the ranking, so that
    the archive says what was wrong with a signal rather than only that others were better."""
    signal = ranked.signal
    refused = assess(signal, context, limits) or ranked.refused
    if refused:
        return refused
    if instrument is None:
        return Refused(reason=RefusalReason.BELOW_MINIMUM, detail="the symbol's rules are unknown")
    leverage = choose_leverage(context.statistics, context.drawdown, limits.risk)
    if isinstance(leverage, Refused):
        return leverage
    if context.equity is None or context.available_balance is None:
        return Refused(
            reason=RefusalReason.BALANCE_UNKNOWN, detail="equity unknown, the venue's answer is needed"
        )
    return size_position(
        signal,
        instrument,
        brackets,
        equity=Decimal(repr(context.equity)),
        available=Decimal(repr(context.available_balance)),
        leverage=leverage,
        taker_fee_fraction=taker_fee_fraction,
        risk=limits.risk,
    )


def as_decision(ranked: Ranked, answer: Approved | Refused, *, cycle: int, now_ms: int) -> Decision:
    """The record of what became of the signal."""
    signal = ranked.signal
    if isinstance(answer, Refused):
        return Decision(
            signal_id=signal.signal_id,
            symbol=signal.symbol,
            position_side=signal.position_side,
            outcome=DecisionOutcome.REFUSED,
            reason=answer.reason.value,
            detail=answer.detail,
            rank=ranked.rank,
            cycle=cycle,
            decided_ms=now_ms,
        )
    return Decision(
        signal_id=signal.signal_id,
        symbol=signal.symbol,
        position_side=signal.position_side,
        outcome=DecisionOutcome.ACCEPTED,
        reason="",
        detail=f"loss at the stop {answer.risk_amount:.4f} of equity {answer.equity:.2f}",
        rank=ranked.rank,
        cycle=cycle,
        decided_ms=now_ms,
        leverage=answer.leverage,
        quantity=answer.quantity,
        notional=answer.notional,
        margin=answer.margin,
        risk_amount=answer.risk_amount,
        equity=answer.equity,
    )
