from decimal import Decimal

import msgspec
import pytest

from service.records import Position, PositionSide, RefusalReason
from service.settings import RiskSettings
from service.trading.leverage import TradeStatistics, choose_leverage, trade_statistics
from service.trading.ranking import Refused

RISK = RiskSettings()


def stats(expectancy: float, factor: float, streak: int = 0, trades: int = 30) -> TradeStatistics:
    return TradeStatistics(
        trades=trades, expectancy_pct=expectancy, profit_factor=factor, win_fraction=0.5, loss_streak=streak
    )


def closed(realised: str, fees: str = "0", funding: str = "0") -> Position:
    return Position(
        position_id=realised + fees,
        signal_id="",
        symbol="X",
        position_side=PositionSide.LONG,
        quantity=Decimal(0),
        entry_price=Decimal(1),
        stop=Decimal(1),
        target=Decimal(1),
        leverage=10,
        margin=Decimal(10),
        opened_ms=1,
        closed_ms=2,
        exit_price=Decimal(1),
        realised_pnl=Decimal(realised),
        fees=Decimal(fees),
        funding=Decimal(funding),
    )


@pytest.mark.parametrize(
    ("expectancy", "factor", "leverage"),
    [
        (1.6, 1.6, 17),
        (1.5, 1.6, 12),
        (1.6, 1.5, 12),
        (0.9, 1.1, 12),
        (0.9, 1.0, 7),
        (0.4, 0.9, 7),
        (0.3, 2.0, 4),
        (0.4, 0.8, 4),
        (0.0, 1.0, 4),
    ],
)
def test_leverage_follows_the_founding_table(expectancy, factor, leverage):
    assert choose_leverage(stats(expectancy, factor), 0.0, RISK) == leverage


def test_a_negative_expectancy_is_no_trade_and_says_the_value():
    answer = choose_leverage(stats(-0.01, 0.9), 0.0, RISK)
    assert isinstance(answer, Refused)
    assert answer.reason is RefusalReason.NEGATIVE_EXPECTANCY
    assert "-0.010" in answer.detail


def test_less_than_a_full_history_gets_the_minimum_even_after_a_loss():
    assert choose_leverage(stats(-5.0, 0.0, trades=29), 0.0, RISK) == 3


@pytest.mark.parametrize(("streak", "leverage"), [(3, 17), (4, 14), (5, 14), (6, 12), (9, 12)])
def test_losses_in_a_row_lower_it(streak, leverage):
    assert choose_leverage(stats(2.0, 2.0, streak), 0.0, RISK) == leverage


@pytest.mark.parametrize(
    ("drawdown", "leverage"),
    [(0.10, 17), (0.11, 15), (0.16, 13), (0.21, 10), (0.25, 10), (0.26, 3)],
)
def test_drawdown_lowers_it(drawdown, leverage):
    assert choose_leverage(stats(2.0, 2.0), drawdown, RISK) == leverage


def test_it_never_leaves_the_bounds():
    assert choose_leverage(stats(0.0, 1.0, 9), 0.2, RISK) == 3
    assert choose_leverage(stats(2.0, 2.0), 0.0, RiskSettings(max_leverage=5)) == 5


def test_statistics_are_net_of_fees_and_funding_on_notional():
    found = trade_statistics([closed("-1"), closed("-2", "1"), closed("6", "1", "1"), closed("0", "1")])
    assert found.trades == 4
    assert found.loss_streak == 2
    assert found.win_fraction == pytest.approx(0.25)
    assert found.expectancy_pct == pytest.approx((-1 - 3 + 6 - 1) / 4)
    assert found.profit_factor == pytest.approx(6 / 5)


def test_no_trades_are_no_statistics():
    assert trade_statistics([]).trades == 0


def test_a_position_whose_result_is_not_known_and_a_foreign_one_count_for_nothing():
    vanished = msgspec.structs.replace(closed("0", "1"), exit_price=Decimal(0))
    foreign = msgspec.structs.replace(closed("-50"), signal_id="foreign:adopt:X:1")
    assert trade_statistics([vanished, foreign, closed("6")]) == trade_statistics([closed("6")])
