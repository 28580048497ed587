"""Orders, conditional (algo) orders and trades as the simulated venue keeps and shows them.

The records are mutable because the venue's books are: one record lives from acceptance to its end.
The functions render them in the venue's JSON shapes of November 2026: amounts as strings, ids as
integers.
"""

from decimal import Decimal
from typing import Any

import msgspec

JSON = dict[str, Any]
ZERO = Decimal(0)

ORDER_TYPES = ("LIMIT", "MARKET")
STOP_TYPES = ("STOP", "STOP_MARKET")
TARGET_TYPES = ("TAKE_PROFIT", "TAKE_PROFIT_MARKET")
TRAILING = "TRAILING_STOP_MARKET"
ALGO_TYPES = (*STOP_TYPES, *TARGET_TYPES, TRAILING)
OPEN_STATUSES = ("NEW", "PARTIALLY_FILLED")


class Order(msgspec.Struct, kw_only=True, eq=False):
    """An order in the matching engine. Price is 0 for market orders."""

    order_id: int
    client_order_id: str
    symbol: str
    side: str
    position_side: str
    type: str
    original_type: str
    time_in_force: str
    price: Decimal
    quantity: Decimal
    executed: Decimal = ZERO
    quote: Decimal = ZERO  # sum of price times quantity over its fills
    status: str = "NEW"
    reduce_only: bool = False
    close_position: bool = False
    stop_price: Decimal = ZERO
    working_type: str = "CONTRACT_PRICE"
    algo_id: int = 0  # the conditional order that became this one
    created_ms: int = 0
    updated_ms: int = 0

    @property
    def at_ms(self) -> int:
        """When it became what it is."""
        return self.updated_ms

    @property
    def buy(self) -> bool:
        return self.side == "BUY"

    @property
    def open(self) -> bool:
        return self.status in OPEN_STATUSES

    @property
    def remaining(self) -> Decimal:
        return self.quantity - self.executed

    @property
    def average_price(self) -> Decimal:
        """To 4 decimals beyond the price's grid; exact when all fills have one price."""
        if not self.executed:
            return ZERO
        average = self.quote / self.executed
        short = average.quantize(Decimal("1e-12")).normalize()
        return short if short * self.executed == self.quote else average.quantize(Decimal("1e-12"))


class AlgoOrder(msgspec.Struct, kw_only=True, eq=False):
    """A conditional order. It rests outside the book until its working price reaches the trigger."""

    algo_id: int
    client_algo_id: str
    symbol: str
    side: str
    position_side: str
    type: str
    time_in_force: str
    quantity: Decimal  # 0 with close_position
    price: Decimal
    trigger_price: Decimal  # of a trailing stop: 0 until it triggered
    working_type: str
    reduce_only: bool
    close_position: bool
    price_protect: bool
    activate_price: Decimal = ZERO
    callback_rate: Decimal = ZERO  # percent
    activated: bool = False
    extreme: Decimal = ZERO  # best working price since activation
    status: str = "NEW"
    reject_reason: str = ""
    order_id: int = 0  # of the order it became
    average_price: Decimal = ZERO
    executed: Decimal = ZERO
    created_ms: int = 0
    updated_ms: int = 0
    triggered_ms: int = 0

    @property
    def at_ms(self) -> int:
        """When it became what it is."""
        return self.updated_ms

    @property
    def buy(self) -> bool:
        return self.side == "BUY"

    @property
    def trailing(self) -> bool:
        return self.type == TRAILING

    @property
    def triggers_upwards(self) -> bool:
        """Whether a rising price reaches the trigger."""
        return self.buy != (self.type in TARGET_TYPES)

    @property
    def became(self) -> str:
        """Type of the order that is sent to the book at the trigger."""
        return "LIMIT" if self.type in ("STOP", "TAKE_PROFIT") else "MARKET"

    @property
    def level(self) -> Decimal:
        """The working price at which it triggers now; 0 while a trailing stop is not active."""
        if not self.trailing:
            return self.trigger_price
        if not self.activated:
            return ZERO
        share = self.callback_rate / 100
        return self.extreme * (1 + share if self.buy else 1 - share)

    def reached(self, price: Decimal) -> bool:
        level = self.level
        if self.trailing and not self.activated:
            return False
        return price >= level if self.triggers_upwards else price <= level


class Trade(msgspec.Struct, kw_only=True, frozen=True):
    """One execution. Realised PnL excludes the fee; both in the quote currency."""

    trade_id: int
    order_id: int
    symbol: str
    side: str
    position_side: str
    price: Decimal
    quantity: Decimal
    quote: Decimal
    realised_pnl: Decimal
    fee: Decimal
    maker: bool
    at_ms: int


class Income(msgspec.Struct, kw_only=True, frozen=True):
    """One change of the wallet, as GET /income lists it."""

    tran_id: int
    kind: str
    symbol: str
    amount: Decimal
    trade_id: str
    at_ms: int


def number(value: Decimal) -> str:
    """Plain decimal notation, never an exponent."""
    return format(value, "f")


def order_ack(order: Order, *, as_new: bool = False) -> JSON:
    """Answer to POST and DELETE: without avgPrice and cumQuote, gone since 2026-07.

    `as_new`: the ACK form, sent before the book was asked.
    """
    executed = number(ZERO if as_new else order.executed)
    return {
        "orderId": order.order_id,
        "symbol": order.symbol,
        "status": "NEW" if as_new else order.status,
        "clientOrderId": order.client_order_id,
        "price": number(order.price),
        "origQty": number(order.quantity),
        "executedQty": executed,
        "cumQty": executed,
        "timeInForce": order.time_in_force,
        "type": order.type,
        "reduceOnly": order.reduce_only,
        "closePosition": order.close_position,
        "side": order.side,
        "positionSide": order.position_side,
        "stopPrice": number(order.stop_price),
        "workingType": order.working_type,
        "priceProtect": False,
        "origType": order.original_type,
        "priceMatch": "NONE",
        "selfTradePreventionMode": "EXPIRE_MAKER",
        "goodTillDate": 0,
        "updateTime": order.updated_ms,
    }


def order_view(order: Order) -> JSON:
    """Answer to GET /order, /openOrders and /allOrders."""
    view = order_ack(order)
    del view["cumQty"]
    view["avgPrice"] = number(order.average_price)
    view["cumQuote"] = number(order.quote)
    view["time"] = order.created_ms
    return view


def order_event(
    order: Order, now_ms: int, execution: str, *, trade: Trade | None = None, asset: str = "USDT"
) -> JSON:
    """ORDER_TRADE_UPDATE. `execution`: NEW, TRADE, CANCELED, EXPIRED or CALCULATED."""
    details: JSON = {
        "s": order.symbol,
        "c": order.client_order_id,
        "S": order.side,
        "o": order.type,
        "f": order.time_in_force,
        "q": number(order.quantity),
        "p": number(order.price),
        "ap": number(order.average_price),
        "sp": number(order.stop_price),
        "x": execution,
        "X": order.status,
        "i": order.order_id,
        "l": number(trade.quantity) if trade else "0",
        "z": number(order.executed),
        "L": number(trade.price) if trade else "0",
        "T": now_ms,
        "t": trade.trade_id if trade else 0,
        "b": "0",
        "a": "0",
        "m": trade.maker if trade else False,
        "R": order.reduce_only,
        "wt": order.working_type,
        "ot": order.original_type,
        "ps": order.position_side,
        "cp": order.close_position,
        "rp": number(trade.realised_pnl) if trade else "0",
        "pP": False,
        "si": 0,
        "ss": 0,
        "V": "EXPIRE_MAKER",
        "pm": "NONE",
        "gtd": 0,
    }
    if trade:
        details["N"] = asset
        details["n"] = number(trade.fee)
    return {"e": "ORDER_TRADE_UPDATE", "E": now_ms, "T": now_ms, "o": details}


def trade_view(trade: Trade, asset: str) -> JSON:
    """A row of GET /userTrades."""
    return {
        "symbol": trade.symbol,
        "id": trade.trade_id,
        "orderId": trade.order_id,
        "side": trade.side,
        "price": number(trade.price),
        "qty": number(trade.quantity),
        "realizedPnl": number(trade.realised_pnl),
        "quoteQty": number(trade.quote),
        "commission": number(trade.fee),
        "commissionAsset": asset,
        "time": trade.at_ms,
        "positionSide": trade.position_side,
        "buyer": trade.side == "BUY",
        "maker": trade.maker,
    }


def income_view(income: Income, asset: str) -> JSON:
    """A row of GET /income."""
    return {
        "symbol": income.symbol,
        "incomeType": income.kind,
        "income": number(income.amount),
        "asset": asset,
        "info": income.trade_id or income.kind,
        "time": income.at_ms,
        "tranId": income.tran_id,
        "tradeId": income.trade_id,
    }


def algo_ack(algo: AlgoOrder) -> JSON:
    """Answer to POST /algoOrder."""
    view: JSON = {
        "algoId": algo.algo_id,
        "clientAlgoId": algo.client_algo_id,
        "algoType": "CONDITIONAL",
        "orderType": algo.type,
        "symbol": algo.symbol,
        "side": algo.side,
        "positionSide": algo.position_side,
        "timeInForce": algo.time_in_force,
        "quantity": number(algo.quantity),
        "algoStatus": algo.status,
        "triggerPrice": number(algo.trigger_price),
        "price": number(algo.price),
        "icebergQuantity": None,
        "selfTradePreventionMode": "EXPIRE_MAKER",
        "workingType": algo.working_type,
        "priceMatch": "NONE",
        "closePosition": algo.close_position,
        "priceProtect": algo.price_protect,
        "reduceOnly": algo.reduce_only,
        "createTime": algo.created_ms,
        "updateTime": algo.updated_ms,
        "triggerTime": algo.triggered_ms,
        "goodTillDate": 0,
    }
    if algo.trailing:
        view["activatePrice"] = number(algo.activate_price)
        view["callbackRate"] = number(algo.callback_rate)
    return view


def algo_view(algo: AlgoOrder) -> JSON:
    """Answer to GET /algoOrder, /openAlgoOrders and /allAlgoOrders."""
    view = algo_ack(algo)
    view["actualOrderId"] = str(algo.order_id) if algo.order_id else ""
    view["actualPrice"] = number(algo.average_price)
    view["actualQty"] = number(algo.executed)
    view["actualType"] = algo.became if algo.order_id else ""
    view["tpTriggerPrice"] = "0"
    view["tpPrice"] = "0"
    view["slTriggerPrice"] = "0"
    view["slPrice"] = "0"
    view["tpOrderType"] = ""
    return view


def algo_event(algo: AlgoOrder, now_ms: int) -> JSON:
    """ALGO_UPDATE with the order's present status; `rm` only where the venue refused it."""
    details: JSON = {
        "caid": algo.client_algo_id,
        "aid": algo.algo_id,
        "at": "CONDITIONAL",
        "o": algo.type,
        "s": algo.symbol,
        "S": algo.side,
        "ps": algo.position_side,
        "f": algo.time_in_force,
        "q": number(algo.quantity),
        "X": algo.status,
        "ai": str(algo.order_id) if algo.order_id else "",
        "tp": number(algo.trigger_price),
        "p": number(algo.price),
        "V": "EXPIRE_MAKER",
        "wt": algo.working_type,
        "pm": "NONE",
        "cp": algo.close_position,
        "pP": algo.price_protect,
        "R": algo.reduce_only,
        "tt": algo.triggered_ms,
        "gtd": 0,
    }
    if algo.order_id:
        details["ap"] = number(algo.average_price)
        details["aq"] = number(algo.executed)
        details["act"] = algo.became
    if algo.reject_reason:
        details["rm"] = algo.reject_reason
    if algo.trailing:
        details["AP"] = number(algo.activate_price)
        details["cr"] = number(algo.callback_rate)
        details["ia"] = algo.activated
    return {"e": "ALGO_UPDATE", "E": now_ms, "T": now_ms, "o": details}
