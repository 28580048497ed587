"""The books of one account: wallet, positions and histories, exact to the last digit.

Every amount that changes the wallet is quantised to 8 decimals, half to even, before it is booked.
A position keeps the sum of what was paid for it instead of an average price, so that the realised
PnL of any sequence of fills adds up to what was received minus what was paid, exactly.
"""

from decimal import Decimal
from typing import Protocol, TypeVar

import msgspec

from service.exchange.simulated.margin import booked
from service.exchange.simulated.orders import JSON, AlgoOrder, Income, Order, Trade, number

ZERO = Decimal(0)
HISTORY_LENGTH = 1_000
"""Finished orders, trades or income rows that are kept of one symbol."""
ACCOUNT_HISTORY_LENGTH = 2_000
"""Of one kind and all symbols: a paper account lives in the daemon, and each save writes all of it."""
DEFAULT_LEVERAGE = 20


class _Dated(Protocol):
    @property
    def at_ms(self) -> int: ...


Item = TypeVar("Item", bound=_Dated)


class Position(msgspec.Struct, kw_only=True, eq=False):
    """An open position; a flat one has no record. Quantity and cost are negative for a short."""

    symbol: str
    side: str  # BOTH, LONG or SHORT
    quantity: Decimal = ZERO
    cost: Decimal = ZERO
    isolated: bool = False
    isolated_wallet: Decimal = ZERO
    realised: Decimal = ZERO  # accumulated, the venue's `cr`
    fees: Decimal = ZERO  # paid since it was opened; moves the break-even price
    updated_ms: int = 0

    @property
    def entry_price(self) -> Decimal:
        """Average of what is open, for showing; the books use `cost`."""
        return shown(self.cost / self.quantity) if self.quantity else ZERO

    @property
    def break_even_price(self) -> Decimal:
        return shown((self.cost + self.fees) / self.quantity) if self.quantity else ZERO

    def notional(self, mark: Decimal) -> Decimal:
        """Signed."""
        return self.quantity * mark

    def unrealised(self, mark: Decimal) -> Decimal:
        return booked(self.quantity * mark - self.cost)

    def fill(self, change: Decimal, price: Decimal, leverage: int) -> Decimal:
        """Book a fill of the signed quantity `change`. Returns the PnL it realised.

        Margin of an isolated position enters at the leverage of the fill and leaves in proportion.
        """
        realised = ZERO
        if self.quantity and (change > 0) != (self.quantity > 0):
            realised, change = self._reduce(change, price)
        if change:
            paid = booked(change * price)
            self.quantity += change
            self.cost += paid
            if self.isolated:
                self.isolated_wallet += booked(abs(paid) / leverage)
        self.realised += realised
        return realised

    def _reduce(self, change: Decimal, price: Decimal) -> tuple[Decimal, Decimal]:
        """Returns the realised PnL and what is left of `change` to open the other way."""
        if abs(change) >= abs(self.quantity):
            closed, cost, wallet = self.quantity, self.cost, self.isolated_wallet
            self.fees = ZERO
        else:
            closed = -change
            cost = booked(self.cost * closed / self.quantity)
            wallet = booked(self.isolated_wallet * closed / self.quantity)
            self.fees -= booked(self.fees * closed / self.quantity)
        realised = booked(closed * price) - cost
        self.quantity -= closed
        self.cost -= cost
        self.isolated_wallet -= wallet
        return realised, change + closed


class SymbolSetting(msgspec.Struct, kw_only=True, eq=False):
    """What an account chose for a symbol."""

    leverage: int
    isolated: bool = False


class Account(msgspec.Struct, kw_only=True, eq=False):
    """One account in single-asset terms: everything is paid in `asset`.

    Promise: wallet == deposits + realised - fees + funding, to the last digit. `fees` holds what
    liquidations paid to the insurance fund as well.
    """

    key: str
    asset: str = "USDT"
    alias: str = "SgsR"
    wallet: Decimal = ZERO
    deposits: Decimal = ZERO
    realised: Decimal = ZERO
    fees: Decimal = ZERO
    funding: Decimal = ZERO
    dual: bool = False
    multi_assets: bool = False
    settings: dict[str, SymbolSetting] = {}
    positions: dict[str, Position] = {}  # by `position_key`
    orders: dict[int, Order] = {}  # open ones
    algos: dict[int, AlgoOrder] = {}  # waiting ones
    finished_orders: dict[str, list[Order]] = {}
    finished_algos: dict[str, list[AlgoOrder]] = {}
    trades: dict[str, list[Trade]] = {}
    incomes: dict[str, list[Income]] = {}
    cancel_due_ms: dict[str, int] = {}  # countdownCancelAll, by symbol
    margin_called: bool = False
    updated_ms: int = 0

    def position(self, symbol: str, side: str) -> Position | None:
        return self.positions.get(position_key(symbol, side))

    def quantity(self, symbol: str, side: str) -> Decimal:
        position = self.position(symbol, side)
        return position.quantity if position else ZERO

    @property
    def cross_wallet(self) -> Decimal:
        return self.wallet - sum((p.isolated_wallet for p in self.positions.values()), ZERO)

    def record_income(self, income: Income) -> None:
        keep(self.incomes, income.symbol, income)


def position_key(symbol: str, side: str) -> str:
    return f"{symbol}:{side}"


def keep(histories: dict[str, list[Item]], symbol: str, item: Item) -> None:
    """Append to a symbol's history; forget what is beyond its length, and the oldest beyond the account's."""
    history = histories.setdefault(symbol, [])
    history.append(item)
    if len(history) > HISTORY_LENGTH:
        del history[: len(history) - HISTORY_LENGTH]
    for _ in range(sum(map(len, histories.values())) - ACCOUNT_HISTORY_LENGTH):
        oldest = min(histories, key=lambda name: histories[name][0].at_ms)
        del histories[oldest][0]
        if not histories[oldest]:
            del histories[oldest]


def shown(price: Decimal) -> Decimal:
    """An average price as the venue shows it: 12 decimals at most, no trailing zeros."""
    return price.quantize(Decimal("1e-12")).normalize()


def position_event_row(position: Position, mark: Decimal) -> JSON:
    """An element of ACCOUNT_UPDATE's `P`."""
    return {
        "s": position.symbol,
        "pa": number(position.quantity),
        "ep": number(position.entry_price),
        "bep": number(position.break_even_price),
        "cr": number(position.realised),
        "up": number(position.unrealised(mark)),
        "mt": "isolated" if position.isolated else "cross",
        "iw": number(position.isolated_wallet),
        "ps": position.side,
    }


def account_event(
    account: Account,
    now_ms: int,
    reason: str,
    rows: list[JSON],
    *,
    change: Decimal = ZERO,
    symbol: str = "",
) -> JSON:
    """ACCOUNT_UPDATE. `change` is the venue's `bc`: the wallet's change except PnL and commission."""
    details: JSON = {
        "m": reason,
        "B": [
            {
                "a": account.asset,
                "wb": number(account.wallet),
                "cw": number(account.cross_wallet),
                "bc": number(change),
            }
        ],
        "P": rows,
    }
    if symbol:
        details["S"] = symbol
    return {"e": "ACCOUNT_UPDATE", "E": now_ms, "T": now_ms, "a": details}
