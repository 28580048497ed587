"""Whether a signal may be traded now: one pure function per rule, asked in one stated order.

Every limit is read from `RiskSettings` and `TradingSettings` and nowhere else. Losses and drawdowns are
fractions of equity, open positions included. What ends entries for a day or for good is the kill switch's.
"""

from collections.abc import Callable, Mapping

import msgspec

from service.records import RefusalReason, Signal
from service.settings import RiskSettings, TradingSettings
from service.trading.cooldowns import refused as cooldown_refused
from service.trading.leverage import TradeStatistics
from service.trading.ranking import Refused

DAY_MS = 86_400_000


class EquityMarks(msgspec.Struct, frozen=True, kw_only=True):
    """What equity is measured against. Kept in the store, so that a restart forgives nothing."""

    day: int  # UTC days since the Unix epoch
    day_start: float
    peak: float
    deposits: float  # money in, so that a withdrawal is not taken for a loss


def opening_marks(equity: float, deposits: float, now_ms: int) -> EquityMarks:
    return EquityMarks(day=now_ms // DAY_MS, day_start=equity, peak=equity, deposits=deposits)


def marks_after(marks: EquityMarks, equity: float, deposits: float, now_ms: int) -> EquityMarks:
    """The marks after one look at the equity: new day, new peak."""
    moved = deposits - marks.deposits
    today = now_ms // DAY_MS
    return EquityMarks(
        day=max(today, marks.day),
        day_start=equity if today > marks.day else marks.day_start + moved,
        peak=max(marks.peak + moved, equity),
        deposits=deposits,
    )


def fall(start: float, now: float) -> float:
    """How far `now` is below `start`, as a fraction of it; everything is lost where nothing was there."""
    if start <= 0:
        return 1.0 if now < start else 0.0
    return max(0.0, (start - now) / start)


class RiskContext(msgspec.Struct, frozen=True, kw_only=True):
    """All that the rules may look at."""

    equity: float | None  # with open positions; None when it cannot be read
    available_balance: float | None
    marks: EquityMarks | None
    statistics: TradeStatistics
    open_positions: int  # meant to be ones included
    held_symbols: frozenset[str]  # held, being opened or closed, or blocked
    stale_symbols: frozenset[str] = frozenset()
    cooling: Mapping[str, float] = {}  # symbol to the minutes left of its cooldown
    accepted: int = 0  # in this cycle so far
    entries_off: str = ""  # why no entry is allowed at all, or ""
    halt: Refused | None = None  # the kill switch's answer to every signal while it is tripped

    @property
    def drawdown(self) -> float:
        return fall(self.marks.peak, self.equity or 0.0) if self.marks else 0.0

    @property
    def day_loss(self) -> float:
        return fall(self.marks.day_start, self.equity or 0.0) if self.marks else 0.0


def after_entry(context: RiskContext, symbol: str, margin: float) -> RiskContext:
    """The context for the next signal of the same cycle, once one was approved."""
    available = context.available_balance
    return msgspec.structs.replace(
        context,
        open_positions=context.open_positions + 1,
        accepted=context.accepted + 1,
        held_symbols=context.held_symbols | {symbol},
        available_balance=None if available is None else available - margin,
    )


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that the rules read."""

    trading: TradingSettings
    risk: RiskSettings


Rule = Callable[[Signal, RiskContext, Limits], Refused | None]


def entries_allowed(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    if not limits.trading.entries:
        return Refused(reason=RefusalReason.ENTRIES_OFF, detail="trading.entries is false, true is needed")
    if context.entries_off:
        return Refused(reason=RefusalReason.ENTRIES_OFF, detail=context.entries_off)
    return None


def confident_enough(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    least = limits.trading.min_confidence
    if signal.confidence >= least:
        return None
    return Refused(
        reason=RefusalReason.LOW_CONFIDENCE,
        detail=f"confidence {signal.confidence:.4f}, at least {least} is needed",
    )


def balance_known(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    if context.equity is None or context.available_balance is None or context.marks is None:
        return Refused(
            reason=RefusalReason.BALANCE_UNKNOWN, detail="equity unknown, the venue's answer is needed"
        )
    if context.equity <= 0:
        return Refused(
            reason=RefusalReason.MARGIN_INSUFFICIENT, detail=f"equity {context.equity:.2f}, above 0 is needed"
        )
    return None


def not_halted(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    return context.halt


def drawdown_breaker(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    limit = limits.risk.breaker_drawdown_fraction
    if context.drawdown < limit:
        return None
    return Refused(
        reason=RefusalReason.DRAWDOWN_BREAKER,
        detail=f"drawdown {context.drawdown:.4f} from the peak, below {limit} is needed",
    )


def caution(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    """After a streak of losses or a bad day only strong signals pass, and only on a winning record."""
    risk, statistics = limits.risk, context.statistics
    if statistics.loss_streak >= risk.caution_losses:
        why = f"{statistics.loss_streak} losses in a row (limit {risk.caution_losses})"
    elif context.day_loss >= risk.caution_day_loss_fraction:
        why = f"day loss {context.day_loss:.4f} (limit {risk.caution_day_loss_fraction})"
    else:
        return None
    if signal.confidence >= risk.caution_confidence and statistics.win_fraction >= risk.caution_win_fraction:
        return None
    return Refused(
        reason=RefusalReason.CAUTION,
        detail=f"{why}: confidence {signal.confidence:.4f} of {risk.caution_confidence} and "
        f"win rate {statistics.win_fraction:.4f} of {risk.caution_win_fraction} are needed",
    )


def data_fresh(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    if signal.symbol not in context.stale_symbols:
        return None
    return Refused(reason=RefusalReason.STALE_DATA, detail="1 stale series, 0 are allowed")


def symbol_free(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    if signal.symbol not in context.held_symbols:
        return None
    return Refused(
        reason=RefusalReason.SYMBOL_HELD, detail="1 position or order on the symbol, 0 are allowed"
    )


def cooled_down(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    left = context.cooling.get(signal.symbol)
    return None if left is None else cooldown_refused(left, limits.risk.cooldown_minutes)


def room_for_position(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    most = limits.trading.max_positions
    if context.open_positions < most:
        return None
    return Refused(
        reason=RefusalReason.MAX_POSITIONS, detail=f"{context.open_positions} positions open, at most {most}"
    )


def room_in_cycle(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    most = limits.trading.top_signals
    if context.accepted < most:
        return None
    return Refused(
        reason=RefusalReason.NOT_IN_TOP, detail=f"{context.accepted} of this cycle traded, at most {most}"
    )


RULES: tuple[Rule, ...] = (
    entries_allowed,
    not_halted,
    confident_enough,
    balance_known,
    drawdown_breaker,
    caution,
    data_fresh,
    symbol_free,
    cooled_down,
    room_for_position,
    room_in_cycle,
)
"""In this order: the first rule that refuses names the reason. First what stops everything, then what
the account says, then the symbol, and last the room that another close may free."""


def assess(signal: Signal, context: RiskContext, limits: Limits) -> Refused | None:
    """None when no rule objects."""
    for rule in RULES:
        refused = rule(signal, context, limits)
        if refused is not None:
            return refused
    return None
