"""What the simulated venue demands of an order: price and quantity grids, limits, leverage brackets.

The figures have the venue's shape, not its exact values: they follow a contract's price and turnover.
"""

import math
from dataclasses import dataclass
from decimal import Decimal

from service.records import Bracket, Instrument

PERPETUAL_DELIVERY_MS = 4_133_404_800_000  # the venue's far-away date of contracts without one
MARKET_ORDER_SECONDS = 300  # the largest market order is worth this long of average turnover

_MINIMUM_NOTIONAL = {"BTCUSDT": 50, "ETHUSDT": 20}

# (notional cap, maximum leverage, maintenance fraction) by tier of daily turnover, largest first
_TIERS: tuple[tuple[float, tuple[tuple[int, int, str], ...]], ...] = (
    (
        5e9,
        (
            (300_000, 125, "0.004"),
            (800_000, 100, "0.005"),
            (3_000_000, 75, "0.0065"),
            (12_000_000, 50, "0.01"),
            (70_000_000, 25, "0.02"),
            (100_000_000, 20, "0.025"),
            (230_000_000, 10, "0.05"),
            (480_000_000, 5, "0.1"),
            (600_000_000, 4, "0.125"),
            (1_200_000_000, 2, "0.25"),
            (1_800_000_000, 1, "0.5"),
        ),
    ),
    (
        5e8,
        (
            (50_000, 100, "0.005"),
            (400_000, 75, "0.0065"),
            (1_000_000, 50, "0.01"),
            (4_000_000, 25, "0.02"),
            (8_000_000, 20, "0.025"),
            (40_000_000, 10, "0.05"),
            (80_000_000, 5, "0.1"),
            (100_000_000, 4, "0.125"),
            (200_000_000, 2, "0.25"),
            (400_000_000, 1, "0.5"),
        ),
    ),
    (
        5e7,
        (
            (10_000, 75, "0.01"),
            (50_000, 50, "0.015"),
            (250_000, 25, "0.02"),
            (500_000, 20, "0.025"),
            (2_500_000, 10, "0.05"),
            (5_000_000, 5, "0.1"),
            (6_250_000, 4, "0.125"),
            (12_500_000, 2, "0.25"),
            (25_000_000, 1, "0.5"),
        ),
    ),
    (
        0.0,
        (
            (10_000, 25, "0.02"),
            (50_000, 20, "0.025"),
            (250_000, 10, "0.05"),
            (500_000, 5, "0.1"),
            (1_000_000, 4, "0.125"),
            (2_500_000, 2, "0.25"),
            (5_000_000, 1, "0.5"),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Decimals of a symbol's prices and quantities: a tick is 10^-price_decimals quote."""

    price_decimals: int
    quantity_decimals: int


def grid_for_price(symbol: str, price: float) -> Grid:
    """The grid of a contract at this price: about five significant digits, a lot of a few units of quote."""
    if symbol == "BTCUSDT":
        return Grid(1, 3)
    if symbol == "ETHUSDT":
        return Grid(2, 3)
    magnitude = math.floor(math.log10(price))
    return Grid(min(max(4 - magnitude, 1), 8), min(max(magnitude, 0), 3))


def instrument(
    symbol: str, grid: Grid, price: float, daily_quote_volume: float, onboard_ms: int
) -> Instrument:
    """The rules of one perpetual, from its grid, its usual price and its daily turnover in quote."""
    tick = Decimal(1).scaleb(-grid.price_decimals)
    step = Decimal(1).scaleb(-grid.quantity_decimals)
    market_notional = max(daily_quote_volume * MARKET_ORDER_SECONDS / 86_400, 50_000.0)
    market_max = max(Decimal(_two_digits(market_notional / price)), step * 10)
    major = symbol in _MINIMUM_NOTIONAL
    return Instrument(
        symbol=symbol,
        base_asset=symbol.removesuffix("USDT") or symbol,
        quote_asset="USDT",
        contract_type="PERPETUAL",
        status="TRADING",
        onboard_ms=onboard_ms,
        delivery_ms=PERPETUAL_DELIVERY_MS,
        tick_size=tick,
        step_size=step,
        market_step_size=step,
        min_price=tick,
        max_price=Decimal(10) ** (math.ceil(math.log10(price)) + 3) if price > 1 else Decimal(10_000),
        min_quantity=step,
        max_quantity=market_max * 10,
        market_min_quantity=step,
        market_max_quantity=market_max,
        min_notional=Decimal(_MINIMUM_NOTIONAL.get(symbol, 5)),
        multiplier_up=Decimal("1.05") if major else Decimal("1.15"),
        multiplier_down=Decimal("0.95") if major else Decimal("0.85"),
    )


def _two_digits(quantity: float) -> int:
    """A round number of about this size, at least 1."""
    unit: int = 10 ** max(math.floor(math.log10(max(quantity, 1.0))) - 1, 0)
    return max(int(quantity // unit) * unit, 1)


def brackets(daily_quote_volume: float) -> tuple[Bracket, ...]:
    """Leverage brackets for a daily turnover in quote; the maintenance margin is continuous at each floor."""
    table = next(rows for least, rows in _TIERS if daily_quote_volume >= least)
    result: list[Bracket] = []
    floor = amount = fraction = Decimal(0)
    for cap, leverage, next_fraction in table:
        amount += floor * (Decimal(next_fraction) - fraction)
        fraction = Decimal(next_fraction)
        result.append(
            Bracket(
                notional_floor=floor,
                notional_cap=Decimal(cap),
                max_leverage=leverage,
                maintenance_margin_fraction=fraction,
                maintenance_amount=amount.normalize() + 0,
            )
        )
        floor = Decimal(cap)
    return tuple(result)
