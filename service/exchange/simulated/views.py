"""The account as the venue's endpoints show it. Pure renderings of what `Figures` holds."""

from decimal import Decimal

import msgspec

from service.exchange.simulated.account import Account, Position, SymbolSetting
from service.exchange.simulated.margin import booked
from service.exchange.simulated.orders import JSON, number

ZERO = Decimal(0)


class PositionFigures(msgspec.Struct, kw_only=True):
    """What is derived for one symbol and position side at the present mark price."""

    symbol: str
    side: str
    setting: SymbolSetting
    position: Position | None
    mark: Decimal
    unrealised: Decimal
    notional: Decimal
    position_margin: Decimal
    order_margin: Decimal
    maintenance: Decimal
    bids: Decimal
    asks: Decimal
    cap: Decimal
    liquidation_price: Decimal

    @property
    def quantity(self) -> Decimal:
        return self.position.quantity if self.position else ZERO

    @property
    def entry_price(self) -> Decimal:
        return self.position.entry_price if self.position else ZERO

    @property
    def break_even_price(self) -> Decimal:
        return self.position.break_even_price if self.position else ZERO

    @property
    def isolated_wallet(self) -> Decimal:
        return self.position.isolated_wallet if self.position else ZERO

    @property
    def isolated_margin(self) -> Decimal:
        return self.isolated_wallet + self.unrealised if self.setting.isolated else ZERO

    @property
    def updated_ms(self) -> int:
        return self.position.updated_ms if self.position else 0


class Figures(msgspec.Struct, kw_only=True):
    """What is derived for an account at the present mark prices."""

    account: Account
    available: Decimal
    cross_profit: Decimal
    positions: list[PositionFigures]

    def total(self, name: str) -> str:
        return money(sum((getattr(p, name) for p in self.positions), ZERO))

    @property
    def unrealised(self) -> Decimal:
        return sum((p.unrealised for p in self.positions), ZERO)

    @property
    def initial_margin(self) -> Decimal:
        return sum((p.position_margin + p.order_margin for p in self.positions), ZERO)


def money(amount: Decimal) -> str:
    return number(booked(amount))


def totals(figures: Figures) -> JSON:
    account = figures.account
    return {
        "totalInitialMargin": money(figures.initial_margin),
        "totalMaintMargin": figures.total("maintenance"),
        "totalWalletBalance": money(account.wallet),
        "totalUnrealizedProfit": money(figures.unrealised),
        "totalMarginBalance": money(account.wallet + figures.unrealised),
        "totalPositionInitialMargin": figures.total("position_margin"),
        "totalOpenOrderInitialMargin": figures.total("order_margin"),
        "totalCrossWalletBalance": money(account.cross_wallet),
        "totalCrossUnPnl": money(figures.cross_profit),
        "availableBalance": money(figures.available),
        "maxWithdrawAmount": money(min(figures.available, max(ZERO, account.cross_wallet))),
    }


def asset_row(figures: Figures) -> JSON:
    """An element of `assets` in /account."""
    account = figures.account
    return {
        "asset": account.asset,
        "walletBalance": money(account.wallet),
        "unrealizedProfit": money(figures.unrealised),
        "marginBalance": money(account.wallet + figures.unrealised),
        "maintMargin": figures.total("maintenance"),
        "initialMargin": money(figures.initial_margin),
        "positionInitialMargin": figures.total("position_margin"),
        "openOrderInitialMargin": figures.total("order_margin"),
        "crossWalletBalance": money(account.cross_wallet),
        "crossUnPnl": money(figures.cross_profit),
        "availableBalance": money(figures.available),
        "maxWithdrawAmount": money(min(figures.available, max(ZERO, account.cross_wallet))),
        "marginAvailable": True,
        "updateTime": account.updated_ms,
    }


def balance_row(figures: Figures) -> JSON:
    """The one element of /balance."""
    account = figures.account
    return {
        "accountAlias": account.alias,
        "asset": account.asset,
        "balance": money(account.wallet),
        "crossWalletBalance": money(account.cross_wallet),
        "crossUnPnl": money(figures.cross_profit),
        "availableBalance": money(figures.available),
        "maxWithdrawAmount": money(min(figures.available, max(ZERO, account.cross_wallet))),
        "marginAvailable": True,
        "updateTime": account.updated_ms,
    }


def account_position_v2(row: PositionFigures) -> JSON:
    return {
        "symbol": row.symbol,
        "initialMargin": money(row.position_margin + row.order_margin),
        "maintMargin": money(row.maintenance),
        "unrealizedProfit": money(row.unrealised),
        "positionInitialMargin": money(row.position_margin),
        "openOrderInitialMargin": money(row.order_margin),
        "leverage": str(row.setting.leverage),
        "isolated": row.setting.isolated,
        "entryPrice": number(row.entry_price),
        "breakEvenPrice": number(row.break_even_price),
        "maxNotional": number(row.cap),
        "bidNotional": number(row.bids),
        "askNotional": number(row.asks),
        "positionSide": row.side,
        "positionAmt": number(row.quantity),
        "notional": number(row.notional),
        "isolatedWallet": number(row.isolated_wallet),
        "updateTime": row.updated_ms,
    }


def account_position_v3(row: PositionFigures) -> JSON:
    return {
        "symbol": row.symbol,
        "positionSide": row.side,
        "positionAmt": number(row.quantity),
        "unrealizedProfit": money(row.unrealised),
        "isolatedMargin": money(row.isolated_margin),
        "notional": number(row.notional),
        "isolatedWallet": number(row.isolated_wallet),
        "initialMargin": money(row.position_margin + row.order_margin),
        "maintMargin": money(row.maintenance),
        "updateTime": row.updated_ms,
    }


def risk_v2(row: PositionFigures) -> JSON:
    return {
        "symbol": row.symbol,
        "positionAmt": number(row.quantity),
        "entryPrice": number(row.entry_price),
        "breakEvenPrice": number(row.break_even_price),
        "markPrice": number(row.mark),
        "unRealizedProfit": money(row.unrealised),
        "liquidationPrice": number(row.liquidation_price),
        "leverage": str(row.setting.leverage),
        "maxNotionalValue": number(row.cap),
        "marginType": "isolated" if row.setting.isolated else "cross",
        "isolatedMargin": money(row.isolated_margin),
        "isAutoAddMargin": "false",
        "positionSide": row.side,
        "notional": number(row.notional),
        "isolatedWallet": number(row.isolated_wallet),
        "updateTime": row.updated_ms,
        "isolated": row.setting.isolated,
        "adlQuantile": 0,
    }


def risk_v3(row: PositionFigures, asset: str) -> JSON:
    return {
        "symbol": row.symbol,
        "positionSide": row.side,
        "positionAmt": number(row.quantity),
        "entryPrice": number(row.entry_price),
        "breakEvenPrice": number(row.break_even_price),
        "markPrice": number(row.mark),
        "unRealizedProfit": money(row.unrealised),
        "liquidationPrice": number(row.liquidation_price),
        "isolatedMargin": money(row.isolated_margin),
        "notional": number(row.notional),
        "marginAsset": asset,
        "isolatedWallet": number(row.isolated_wallet),
        "initialMargin": money(row.position_margin + row.order_margin),
        "maintMargin": money(row.maintenance),
        "positionInitialMargin": money(row.position_margin),
        "openOrderInitialMargin": money(row.order_margin),
        "adl": 0,
        "bidNotional": number(row.bids),
        "askNotional": number(row.asks),
        "updateTime": row.updated_ms,
    }
