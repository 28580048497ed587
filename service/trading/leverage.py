"""Leverage from what the last trades earned. Pure.

Expectancy is the mean net result of a closed trade (fees and funding included) in percent of its
notional. Measured on margin instead, a higher leverage would raise the figure that allows it.
"""

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from service.records import Position, RefusalReason
from service.settings import RiskSettings
from service.trading.foreign import is_foreign
from service.trading.ranking import Refused

STEPS: tuple[tuple[float, float, int], ...] = ((1.5, 1.5, 17), (0.8, 1.0, 12), (0.3, 0.8, 7))
"""Expectancy (%) and profit factor to exceed, and the leverage they allow."""
LEVERAGE_ABOVE_ZERO = 4
STREAK_DEDUCTIONS: tuple[tuple[int, int], ...] = ((6, 5), (4, 3))
"""From this many losses in a row, this much less; the first that applies counts."""
DRAWDOWN_DEDUCTIONS: tuple[tuple[float, int], ...] = ((0.20, 7), (0.15, 4), (0.10, 2))
"""Beyond this drawdown (0 to 1), this much less; the first that applies counts."""
MINIMUM_BEYOND_DRAWDOWN = 0.25


class TradeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a series of closed trades says."""

    trades: int
    expectancy_pct: float  # of notional, net
    profit_factor: float  # gross wins over gross losses; infinite without a loss
    win_fraction: float
    loss_streak: int  # losses in a row, the newest trade last


def net_result(position: Position) -> Decimal:
    """What a closed position earned after fees and funding, quote currency."""
    return position.realised_pnl - position.fees + position.funding


def trade_statistics(closed: Sequence[Position]) -> TradeStatistics:
    """Args: closed: newest first, as the store returns them.

    Positions taken over say nothing about our signals, and those without an exit price vanished unseen:
    what they earned is in the ledger's corrections and not known of the trade.
    """
    closed = [p for p in closed if p.exit_price and not is_foreign(p)]
    results = [net_result(position) for position in closed]
    returns = [
        float(result / (position.margin * position.leverage)) * 100
        for result, position in zip(results, closed, strict=True)
        if position.margin > 0 and position.leverage > 0
    ]
    wins = sum((result for result in results if result > 0), Decimal(0))
    losses = -sum((result for result in results if result < 0), Decimal(0))
    streak = next((n for n, result in enumerate(results) if result >= 0), len(results))
    return TradeStatistics(
        trades=len(results),
        expectancy_pct=sum(returns) / len(returns) if returns else 0.0,
        profit_factor=float(wins / losses) if losses else float("inf"),
        win_fraction=sum(result > 0 for result in results) / len(results) if results else 0.0,
        loss_streak=streak,
    )


def choose_leverage(statistics: TradeStatistics, drawdown: float, risk: RiskSettings) -> int | Refused:
    """The leverage that the record of the last trades allows, within the settings' bounds.

    Fewer than `history_trades` closed trades are no history: they get the minimum, since a mean over a
    handful of trades would end trading for good at the first loss.
    Args: drawdown: from the equity's peak, 0 to 1.
    """
    if statistics.trades < risk.history_trades or drawdown > MINIMUM_BEYOND_DRAWDOWN:
        return risk.min_leverage
    base = _base(statistics)
    if base is None:
        return Refused(
            reason=RefusalReason.NEGATIVE_EXPECTANCY,
            detail=f"expectancy {statistics.expectancy_pct:.3f} % of notional over the last "
            f"{statistics.trades} trades, at least 0 is needed",
        )
    streak = next((less for losses, less in STREAK_DEDUCTIONS if statistics.loss_streak >= losses), 0)
    depth = next((less for limit, less in DRAWDOWN_DEDUCTIONS if drawdown > limit), 0)
    return min(max(base - streak - depth, risk.min_leverage), risk.max_leverage)


def _base(statistics: TradeStatistics) -> int | None:
    for expectancy, factor, leverage in STEPS:
        if statistics.expectancy_pct > expectancy and statistics.profit_factor > factor:
            return leverage
    return LEVERAGE_ABOVE_ZERO if statistics.expectancy_pct >= 0 else None
