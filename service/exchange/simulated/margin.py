"""Margin arithmetic of one position: maintenance, liquidation and bankruptcy price. Pure functions.

Signs: quantity and cost are positive for a long and negative for a short; cost is the sum of price
times quantity over the fills that are still open, in the quote currency.
"""

from decimal import ROUND_HALF_EVEN, Decimal

from service.records import Bracket

ZERO = Decimal(0)
EIGHT_DECIMALS = Decimal("0.00000001")
LIQUIDATION_FEE_FRACTION = Decimal("0.0125")
"""Of the liquidated notional, to the insurance fund; the venue's usual `liquidationFee`."""
MARGIN_CALL_FRACTION = Decimal("0.8")
"""Maintenance margin over margin balance at which MARGIN_CALL is sent; the venue states no figure."""


def booked(amount: Decimal) -> Decimal:
    """The amount as it is booked: 8 decimals, half to even, as the venue keeps its wallets."""
    return amount.quantize(EIGHT_DECIMALS, ROUND_HALF_EVEN)


def bracket_of(brackets: tuple[Bracket, ...], notional: Decimal) -> Bracket | None:
    """The bracket a notional falls into; the last one beyond the table, None without a table."""
    for row in brackets:
        if notional <= row.notional_cap:
            return row
    return brackets[-1] if brackets else None


def maintenance_margin(brackets: tuple[Bracket, ...], notional: Decimal) -> Decimal:
    """Margin balance below which a position of this notional (>= 0) is liquidated."""
    row = bracket_of(brackets, notional)
    if row is None:
        return ZERO
    return max(ZERO, booked(notional * row.maintenance_margin_fraction - row.maintenance_amount))


def liquidation_price(
    brackets: tuple[Bracket, ...], quantity: Decimal, cost: Decimal, balance: Decimal, notional: Decimal
) -> Decimal:
    """The mark price at which `balance` plus this position's profit equals its maintenance margin.

    Args: balance: what stands behind the position, its own profit excluded; notional: at mark, which
    picks the bracket. Returns: 0 where no positive price liquidates it.
    """
    row = bracket_of(brackets, notional)
    fraction = row.maintenance_margin_fraction if row else ZERO
    amount = row.maintenance_amount if row else ZERO
    divisor = abs(quantity) * fraction - quantity
    if not divisor:
        return ZERO
    return max(ZERO, (balance + amount - cost) / divisor)


def bankruptcy_price(quantity: Decimal, cost: Decimal, balance: Decimal, fee_fraction: Decimal) -> Decimal:
    """The exit price that leaves exactly nothing of `balance` after the fee; may be <= 0."""
    if quantity > 0:
        return (cost - balance) / (quantity * (1 - fee_fraction))
    return (balance - cost) / (-quantity * (1 + fee_fraction))
