"""The venue's trading requests, answered by the matching core.

Pure: no I/O, no clock, no randomness; the same calls give the same answers. Every request takes
the account's key, the parameters as in the query string, and the venue's time. It returns the
venue's JSON value or raises VenueFault, and leaves its events for `take_events`.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Protocol, TypeVar

import msgspec

from service.exchange.simulated import views
from service.exchange.simulated.account import Account
from service.exchange.simulated.faults import VenueFault, fault
from service.exchange.simulated.filters import (
    check_limit_percent,
    check_market_percent,
    check_notional,
    checked_price,
    checked_quantity,
    notional_cap,
)
from service.exchange.simulated.margin import liquidation_price
from service.exchange.simulated.matching import Assumptions, Market, Matching
from service.exchange.simulated.orders import (
    ALGO_TYPES,
    JSON,
    ORDER_TYPES,
    STOP_TYPES,
    TARGET_TYPES,
    TRAILING,
    AlgoOrder,
    Order,
    algo_ack,
    algo_event,
    algo_view,
    income_view,
    number,
    order_ack,
    order_view,
    trade_view,
)
from service.exchange.simulated.parameters import Parameters

__all__ = ["Assumptions", "Engine", "VenueFault"]

ZERO = Decimal(0)
MAX_ALGO_ORDERS = 200
MAX_OPEN_ORDERS = 200
"""Per symbol, the venue's MAX_NUM_ORDERS."""
SIDES = ("BUY", "SELL")
ORDER_TIMES = ("GTC", "IOC", "FOK", "GTX")
ALGO_TIMES = (*ORDER_TIMES, "GTE_GTC")
WORKING_TYPES = ("CONTRACT_PRICE", "MARK_PRICE")
Query = Mapping[str, object]
DONE: JSON = {"code": 200, "msg": "success"}


class Dated(Protocol):
    @property
    def at_ms(self) -> int: ...


Row = TypeVar("Row", bound=Dated)


class Engine(Matching):
    """A venue for any number of accounts. See `Matching` for the assumptions."""

    # Accounts

    def open_account(self, key: str, deposit: Decimal) -> None:
        """Open an account with a deposit; an account that exists is left as it is."""
        if key in self._accounts:
            return
        account = self._accounts[key] = Account(key=key, updated_ms=self._now_ms)
        account.wallet = account.deposits = deposit
        self._add_income(account, "TRANSFER", "", deposit)

    def _account(self, key: str) -> Account:
        account = self._accounts.get(key)
        if account is None:
            raise fault(-2015)
        return account

    def _market(self, symbol: str) -> Market:
        market = self._markets.get(symbol)
        if market is None:
            raise fault(-1121)
        return market

    def _asked(self, key: str, params: Query, now_ms: int) -> tuple[Account, Parameters]:
        self._advance(now_ms)
        return self._account(key), Parameters(params)

    # Orders

    def new_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /order."""
        account, asked = self._asked(key, params, now_ms)
        order, market = self._decoded_order(account, asked)
        self._admit(account, market, order)
        self._accept(order)
        as_new = asked.text("newOrderRespType", "ACK") == "ACK"
        answer = order_ack(order, as_new=True)
        self._match(account, market, order)
        return answer if as_new else order_ack(order)

    def order_test(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /order/test: every check, nothing placed."""
        account, asked = self._asked(key, params, now_ms)
        order, market = self._decoded_order(account, asked)
        self._admit(account, market, order)
        return {}

    def batch_orders(self, key: str, orders: Sequence[Query], now_ms: int) -> list[JSON]:
        """POST /batchOrders, already decoded: each element is an order or `{code, msg}`."""
        if not 1 <= len(orders) <= 5:
            raise fault(-4082)
        return [self._or_fault(key, params, now_ms) for params in orders]

    def _or_fault(self, key: str, params: Query, now_ms: int) -> JSON:
        try:
            return self.new_order(key, params, now_ms)
        except VenueFault as refusal:
            return {"code": refusal.code, "msg": refusal.message}

    def query_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /order."""
        account, asked = self._asked(key, params, now_ms)
        order = self._find_order(account, asked)
        if order is None:
            raise fault(-2013)
        return order_view(order)

    def open_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /openOrder."""
        account, asked = self._asked(key, params, now_ms)
        order = self._find_order(account, asked)
        if order is None or not order.open:
            raise fault(-2013)
        return order_view(order)

    def cancel_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """DELETE /order."""
        account, asked = self._asked(key, params, now_ms)
        order = self._find_order(account, asked)
        if order is None or not order.open:
            raise fault(-2011)
        self._end_order(account, self._markets[order.symbol], order, "CANCELED")
        return order_ack(order)

    def cancel_batch(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """DELETE /batchOrders: orderIdList or origClientOrderIdList, JSON arrays of at most 10."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        name = "orderIdList" if asked.text("orderIdList") else "origClientOrderIdList"
        single = "orderId" if name == "orderIdList" else "origClientOrderId"
        try:
            ids = msgspec.json.decode(asked.needed(name), type=list[int | str])
        except msgspec.DecodeError:
            raise fault(-1130, name=name) from None
        if not 1 <= len(ids) <= 10:
            raise fault(-1130, name=name)
        answers: list[JSON] = []
        for identity in ids:
            try:
                answers.append(self.cancel_order(account.key, {"symbol": symbol, single: identity}, now_ms))
            except VenueFault as refusal:
                answers.append({"code": refusal.code, "msg": refusal.message})
        return answers

    def open_orders(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /openOrders."""
        account, asked = self._asked(key, params, now_ms)
        symbol = self._optional_symbol(asked)
        return [order_view(o) for o in account.orders.values() if symbol in ("", o.symbol)]

    def all_orders(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /allOrders, oldest first; the symbol is optional since 2026-08."""
        account, asked = self._asked(key, params, now_ms)
        symbol = self._optional_symbol(asked)
        first = asked.integer("orderId") or 0
        start, end = asked.integer("startTime") or 0, asked.integer("endTime") or now_ms
        orders = _finished(account.finished_orders, symbol)
        orders += [o for o in account.orders.values() if symbol in ("", o.symbol)]
        rows = [o for o in orders if o.order_id >= first and start <= o.created_ms <= end]
        rows.sort(key=lambda o: o.order_id)
        limit = asked.limit(500, 1000)
        return [order_view(o) for o in (rows[:limit] if first else rows[-limit:])]

    def cancel_all(self, key: str, params: Query, now_ms: int) -> JSON:
        """DELETE /allOpenOrders; conditional orders stay."""
        account, asked = self._asked(key, params, now_ms)
        self._cancel_orders(account, self._market(asked.needed("symbol")))
        return {"code": 200, "msg": "The operation of cancel all open order is done."}

    def countdown_cancel_all(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /countdownCancelAll; 0 disarms. Conditional orders are not touched."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        self._market(symbol)
        countdown = asked.needed_integer("countdownTime")
        if countdown < 0:
            raise fault(-1130, name="countdownTime")
        account.cancel_due_ms.pop(symbol, None)
        if countdown:
            account.cancel_due_ms[symbol] = now_ms + countdown
        return {"symbol": symbol, "countdownTime": str(countdown)}

    def user_trades(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /userTrades, oldest first."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        self._market(symbol)
        order_id, first = asked.integer("orderId"), asked.integer("fromId")
        trades = [t for t in account.trades.get(symbol, []) if order_id in (None, t.order_id)]
        if first is not None:
            trades = [t for t in trades if t.trade_id >= first]
            return [trade_view(t, account.asset) for t in trades[: asked.limit(500, 1000)]]
        return [trade_view(t, account.asset) for t in _window(trades, asked, now_ms, 500)]

    def _decoded_order(self, account: Account, asked: Parameters) -> tuple[Order, Market]:
        """The order as asked for, checked against everything but the book and the margin."""
        market = self._tradable(asked)
        side = asked.choice("side", SIDES, -1117)
        kind = asked.needed("type")
        if kind in ALGO_TYPES:
            raise fault(-4120)
        if kind not in ORDER_TYPES:
            raise fault(-1116)
        is_market = kind == "MARKET"
        position_side, reduce_only = self._sides(account, asked)
        if asked.flag("closePosition"):
            raise fault(-4136, type=kind, close_position="true")
        _refuse_price_match(asked)
        client_id = asked.client_id("newClientOrderId")
        if any(o.client_order_id == client_id for o in account.orders.values()):
            raise fault(-4116)
        quantity = checked_quantity(market.instrument, asked.needed_decimal("quantity"), market=is_market)
        if is_market and asked.text("price"):
            raise fault(-1106, name="price")
        if is_market and asked.text("timeInForce"):
            raise fault(-1106, name="timeInForce")
        price = ZERO
        if not is_market:
            price = checked_price(market.instrument, asked.needed_decimal("price"))
        order = Order(
            order_id=0,
            client_order_id=client_id,
            symbol=market.instrument.symbol,
            side=side,
            position_side=position_side,
            type=kind,
            original_type=kind,
            time_in_force="GTC" if is_market else asked.choice("timeInForce", ORDER_TIMES, -1115),
            price=price,
            quantity=quantity,
            reduce_only=reduce_only,
            working_type=asked.choice("workingType", WORKING_TYPES, -1130, "CONTRACT_PRICE"),
        )
        self._check_order_filters(account, market, order)
        return order, market

    def _check_order_filters(self, account: Account, market: Market, order: Order) -> None:
        mark = market.mark_price
        if order.type == "MARKET":
            price = self._taker_price(market, order.buy, order.quantity)
            check_market_percent(market.instrument, order.buy, price, mark)
        else:
            check_limit_percent(market.instrument, order.buy, order.price, mark)
        if not order.reduce_only and not self._hedge_exit(order):
            check_notional(market.instrument, (order.price or mark) * order.quantity)
        if sum(o.symbol == order.symbol for o in account.orders.values()) >= MAX_OPEN_ORDERS:
            raise fault(-2025)

    def _tradable(self, asked: Parameters) -> Market:
        market = self._market(asked.needed("symbol"))
        if market.instrument.status != "TRADING":
            raise fault(-4108)
        if not market.last:
            raise fault(-1001)  # no price yet
        return market

    def _sides(self, account: Account, asked: Parameters) -> tuple[str, bool]:
        """(position side, reduce-only), as the account's position mode allows them."""
        position_side = asked.text("positionSide", "BOTH")
        if position_side not in ("BOTH", "LONG", "SHORT"):
            raise fault(-1130, name="positionSide")
        if (position_side == "BOTH") == account.dual:
            raise fault(-4061)
        if account.dual and asked.text("reduceOnly"):
            raise fault(-1106, name="reduceonly")
        return position_side, asked.flag("reduceOnly")

    def _find_order(self, account: Account, asked: Parameters) -> Order | None:
        symbol = asked.needed("symbol")
        self._market(symbol)
        order_id, client_id = asked.integer("orderId"), asked.text("origClientOrderId")
        if order_id is None and not client_id:
            raise fault(-1102, name="orderId")
        newest_first: Iterable[Order] = [
            *reversed(account.orders.values()),
            *reversed(account.finished_orders.get(symbol, [])),
        ]
        for order in newest_first:
            named = order.order_id == order_id if order_id is not None else order.client_order_id == client_id
            if named and order.symbol == symbol:
                return order
        return None

    def _optional_symbol(self, asked: Parameters) -> str:
        symbol = asked.text("symbol")
        if symbol:
            self._market(symbol)
        return symbol

    # Conditional orders

    def new_algo_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /algoOrder. No margin is checked before the trigger."""
        account, asked = self._asked(key, params, now_ms)
        if asked.needed("algoType") != "CONDITIONAL":
            raise fault(-1130, name="algoType")
        algo, market = self._decoded_algo(account, asked)
        self._algo_id += 1
        algo.algo_id = self._algo_id
        algo.client_algo_id = algo.client_algo_id or f"simalgo{algo.algo_id}"
        algo.created_ms = algo.updated_ms = self._now_ms
        account.algos[algo.algo_id] = algo
        market.algos[algo.algo_id] = (account, algo)
        self._emit(account, algo_event(algo, self._now_ms))
        return algo_ack(algo)

    def query_algo_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /algoOrder."""
        account, asked = self._asked(key, params, now_ms)
        algo = self._find_algo(account, asked)
        if algo is None:
            raise fault(-2013)
        return algo_view(algo)

    def cancel_algo_order(self, key: str, params: Query, now_ms: int) -> JSON:
        """DELETE /algoOrder."""
        account, asked = self._asked(key, params, now_ms)
        algo = self._find_algo(account, asked)
        if algo is None or algo.algo_id not in account.algos:
            raise fault(-2011)
        self._end_algo(account, self._markets[algo.symbol], algo, "CANCELED")
        return {
            "algoId": algo.algo_id,
            "clientAlgoId": algo.client_algo_id,
            "code": "200",
            "msg": "success",
        }

    def open_algo_orders(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /openAlgoOrders."""
        account, asked = self._asked(key, params, now_ms)
        symbol, wanted = self._optional_symbol(asked), asked.integer("algoId")
        return [
            algo_view(a)
            for a in account.algos.values()
            if symbol in ("", a.symbol) and wanted in (None, a.algo_id)
        ]

    def cancel_all_algo(self, key: str, params: Query, now_ms: int) -> JSON:
        """DELETE /algoOpenOrders."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        market = self._market(symbol)
        for algo in [a for a in account.algos.values() if a.symbol == symbol]:
            self._end_algo(account, market, algo, "CANCELED")
        return {"code": 200, "msg": "The operation of cancel all open order is done."}

    def all_algo_orders(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /allAlgoOrders, oldest first."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        self._market(symbol)
        first = asked.integer("algoId") or 0
        start, end = asked.integer("startTime") or 0, asked.integer("endTime") or now_ms
        algos = _finished(account.finished_algos, symbol)
        algos += [a for a in account.algos.values() if a.symbol == symbol]
        rows = [a for a in algos if a.algo_id >= first and start <= a.created_ms <= end]
        rows.sort(key=lambda a: a.algo_id)
        limit = asked.limit(500, 1000)
        return [algo_view(a) for a in (rows[:limit] if first else rows[-limit:])]

    def _decoded_algo(self, account: Account, asked: Parameters) -> tuple[AlgoOrder, Market]:
        market = self._tradable(asked)
        side = asked.choice("side", SIDES, -1117)
        kind = asked.choice("type", ALGO_TYPES, -1116)
        position_side, reduce_only = self._sides(account, asked)
        _refuse_price_match(asked)
        close_position = asked.flag("closePosition")
        if close_position and kind not in ("STOP_MARKET", "TAKE_PROFIT_MARKET"):
            raise fault(-4136, type=kind, close_position="true")
        if close_position and (asked.text("quantity") or reduce_only):
            raise fault(-1106, name="quantity" if asked.text("quantity") else "reduceOnly")
        client_id = asked.client_id("clientAlgoId")
        if any(a.client_algo_id == client_id for a in account.algos.values()):
            raise fault(-4116)
        if len(account.algos) >= MAX_ALGO_ORDERS:
            raise fault(-4045)
        algo = AlgoOrder(
            algo_id=0,
            client_algo_id=client_id,
            symbol=market.instrument.symbol,
            side=side,
            position_side=position_side,
            type=kind,
            time_in_force=asked.choice("timeInForce", ALGO_TIMES, -1115, "GTC"),
            quantity=ZERO,
            price=ZERO,
            trigger_price=ZERO,
            working_type=asked.choice("workingType", WORKING_TYPES, -1130, "CONTRACT_PRICE"),
            reduce_only=reduce_only,
            close_position=close_position,
            price_protect=asked.flag("priceProtect"),
        )
        self._read_algo_amounts(market, asked, algo)
        if kind == TRAILING:
            self._read_trailing(market, asked, algo)
        else:
            self._read_trigger(market, asked, algo)
        self._check_closing(account, algo)
        return algo, market

    def _read_algo_amounts(self, market: Market, asked: Parameters, algo: AlgoOrder) -> None:
        limit = algo.became == "LIMIT"
        if not algo.close_position:
            algo.quantity = checked_quantity(
                market.instrument, asked.needed_decimal("quantity"), market=not limit
            )
        if limit:
            algo.price = checked_price(market.instrument, asked.needed_decimal("price"))

    def _read_trigger(self, market: Market, asked: Parameters, algo: AlgoOrder) -> None:
        trigger = asked.needed_decimal("triggerPrice")
        if trigger <= 0:
            raise fault(-4006)
        algo.trigger_price = checked_price(market.instrument, trigger)
        if algo.reached(market.working_price(algo.working_type)):
            raise fault(-2021)
        reducing = algo.close_position or algo.reduce_only or algo.position_side != "BOTH"
        if not reducing:
            check_notional(market.instrument, (algo.price or algo.trigger_price) * algo.quantity)

    def _read_trailing(self, market: Market, asked: Parameters, algo: AlgoOrder) -> None:
        algo.callback_rate = asked.needed_decimal("callbackRate")
        if not Decimal("0.1") <= algo.callback_rate <= 20 or algo.callback_rate % Decimal("0.1"):
            raise fault(-2007)
        price = market.working_price(algo.working_type)
        activate = asked.decimal("activatePrice")
        if activate is None:
            algo.activate_price = algo.extreme = price
            algo.activated = True
            return
        algo.activate_price = checked_price(market.instrument, activate)
        if algo.activate_price > price if algo.buy else algo.activate_price < price:
            raise fault(-2021)

    def _check_closing(self, account: Account, algo: AlgoOrder) -> None:
        """GTE needs a position; one closePosition stop and one target a direction."""
        if algo.time_in_force == "GTE_GTC" and not account.quantity(algo.symbol, algo.position_side):
            raise fault(-4509)
        family = STOP_TYPES if algo.type in STOP_TYPES else TARGET_TYPES
        for other in account.algos.values():
            same = (other.symbol, other.side, other.position_side) == (
                algo.symbol,
                algo.side,
                algo.position_side,
            )
            if algo.close_position and other.close_position and same and other.type in family:
                raise fault(-4130)

    def _find_algo(self, account: Account, asked: Parameters) -> AlgoOrder | None:
        """By id or client id alone: the endpoint takes no symbol."""
        algo_id, client_id = asked.integer("algoId"), asked.text("clientAlgoId")
        if algo_id is None and not client_id:
            raise fault(-1102, name="algoId")
        finished = sorted(_finished(account.finished_algos, ""), key=lambda a: -a.algo_id)
        for algo in [*reversed(account.algos.values()), *finished]:
            if algo.algo_id == algo_id if algo_id is not None else algo.client_algo_id == client_id:
                return algo
        return None

    # The account

    def account_v2(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /v2/account: every symbol of the venue in `positions`."""
        account, _ = self._asked(key, params, now_ms)
        figures = self._figures(account)
        held = {(row.symbol, row.side): row for row in figures.positions}
        rows = [
            held.get((symbol, side)) or self._position_figures(account, market, side)
            for symbol, market in self._markets.items()
            for side in self._shown_sides(account)
        ]
        return {
            "feeTier": 0,
            "canTrade": True,
            "canDeposit": True,
            "canWithdraw": True,
            "updateTime": 0,
            "multiAssetsMargin": account.multi_assets,
            "tradeGroupId": -1,
            **views.totals(figures),
            "assets": [views.asset_row(figures)],
            "positions": [views.account_position_v2(row) for row in rows],
        }

    def account_v3(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /v3/account: only symbols with a position or open orders."""
        account, _ = self._asked(key, params, now_ms)
        figures = self._figures(account)
        return {
            **views.totals(figures),
            "assets": [views.asset_row(figures)],
            "positions": [views.account_position_v3(row) for row in figures.positions],
        }

    def balance_v2(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /v2/balance."""
        account, _ = self._asked(key, params, now_ms)
        return [views.balance_row(self._figures(account))]

    def balance_v3(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /v3/balance."""
        return self.balance_v2(key, params, now_ms)

    def position_risk_v2(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /v2/positionRisk: every symbol, or the one asked for."""
        account, asked = self._asked(key, params, now_ms)
        symbol = self._optional_symbol(asked)
        markets = [self._markets[symbol]] if symbol else list(self._markets.values())
        return [
            views.risk_v2(self._position_figures(account, market, side))
            for market in markets
            for side in self._shown_sides(account)
        ]

    def position_risk_v3(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /v3/positionRisk: only symbols with a position or open orders."""
        account, asked = self._asked(key, params, now_ms)
        symbol = self._optional_symbol(asked)
        rows = [
            self._position_figures(account, market, side)
            for market, side in self._active(account)
            if symbol in ("", market.instrument.symbol)
        ]
        return [views.risk_v3(row, account.asset) for row in rows]

    @staticmethod
    def _shown_sides(account: Account) -> tuple[str, ...]:
        return ("BOTH", "LONG", "SHORT") if account.dual else ("BOTH",)

    def _figures(self, account: Account) -> views.Figures:
        return views.Figures(
            account=account,
            available=self._available(account),
            cross_profit=self._cross_profit(account),
            positions=[self._position_figures(account, m, side) for m, side in self._active(account)],
        )

    def _position_figures(self, account: Account, market: Market, side: str) -> views.PositionFigures:
        symbol, mark = market.instrument.symbol, market.mark_price
        setting = self._setting(account, market)
        position = account.position(symbol, side)
        position_margin, order_margin = self._initial_margins(account, market, side)
        bids, asks = self._open_notionals(account, symbol, side)
        notional = position.notional(mark) if position else ZERO
        liquidated_at = ZERO
        if position:
            liquidated_at = liquidation_price(
                market.brackets,
                position.quantity,
                position.cost,
                self._backing(account, symbol, side),
                abs(notional),
            )
        return views.PositionFigures(
            symbol=symbol,
            side=side,
            setting=setting,
            position=position,
            mark=mark,
            unrealised=position.unrealised(mark) if position else ZERO,
            notional=notional,
            position_margin=position_margin,
            order_margin=order_margin,
            maintenance=self._maintenance(position) if position else ZERO,
            bids=bids,
            asks=asks,
            cap=notional_cap(market.brackets, setting.leverage),
            liquidation_price=liquidated_at.quantize(Decimal("1e-8")),
        )

    def _backing(self, account: Account, symbol: str, side: str) -> Decimal:
        """Balance behind a position: its isolated wallet, or the cross balance others leave."""
        position = account.position(symbol, side)
        if position is None or position.isolated:
            return position.isolated_wallet if position else ZERO
        others = [p for p in account.positions.values() if not p.isolated and p is not position]
        profit = sum((p.unrealised(self._markets[p.symbol].mark_price) for p in others), ZERO)
        return account.cross_wallet + profit - sum((self._maintenance(p) for p in others), ZERO)

    def income(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /income, oldest first."""
        account, asked = self._asked(key, params, now_ms)
        symbol, kind = self._optional_symbol(asked), asked.text("incomeType")
        rows = _finished(account.incomes, symbol)
        rows = sorted((r for r in rows if kind in ("", r.kind)), key=lambda r: (r.at_ms, r.tran_id))
        return [income_view(r, account.asset) for r in _window(rows, asked, now_ms, 100)]

    def commission_rate(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /commissionRate."""
        _, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        self._market(symbol)
        return {
            "symbol": symbol,
            "makerCommissionRate": number(self._assumptions.maker_fee_fraction),
            "takerCommissionRate": number(self._assumptions.taker_fee_fraction),
            "rpiCommissionRate": "0",
        }

    def symbol_config(self, key: str, params: Query, now_ms: int) -> list[JSON]:
        """GET /symbolConfig."""
        account, asked = self._asked(key, params, now_ms)
        symbol = self._optional_symbol(asked)
        markets = [self._markets[symbol]] if symbol else list(self._markets.values())
        return [self._symbol_row(account, market) for market in markets]

    def _symbol_row(self, account: Account, market: Market) -> JSON:
        setting = self._setting(account, market)
        return {
            "symbol": market.instrument.symbol,
            "marginType": "ISOLATED" if setting.isolated else "CROSSED",
            "isAutoAddMargin": False,
            "leverage": setting.leverage,
            "maxNotionalValue": number(notional_cap(market.brackets, setting.leverage)),
        }

    def account_config(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /accountConfig."""
        account, _ = self._asked(key, params, now_ms)
        return {
            "feeTier": 0,
            "canTrade": True,
            "canDeposit": True,
            "canWithdraw": True,
            "dualSidePosition": account.dual,
            "updateTime": 0,
            "multiAssetsMargin": account.multi_assets,
            "tradeGroupId": -1,
        }

    # The account's choices

    def set_leverage(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /leverage."""
        account, asked = self._asked(key, params, now_ms)
        symbol = asked.needed("symbol")
        market = self._market(symbol)
        leverage = asked.needed_integer("leverage")
        most = market.brackets[0].max_leverage if market.brackets else 125
        if not 1 <= leverage <= most:
            raise fault(-4028, leverage=leverage)
        self._check_leverage(account, market, leverage)
        setting = self._setting(account, market)
        if setting.leverage != leverage:
            setting.leverage = leverage
            event = {"e": "ACCOUNT_CONFIG_UPDATE", "E": self._now_ms, "T": self._now_ms}
            self._emit(account, {**event, "ac": {"s": symbol, "l": leverage}})
        cap = number(notional_cap(market.brackets, leverage))
        return {"leverage": leverage, "maxNotionalValue": cap, "symbol": symbol}

    def _check_leverage(self, account: Account, market: Market, leverage: int) -> None:
        setting, symbol = self._setting(account, market), market.instrument.symbol
        exposure = sum((self._exposure(account, market, side) for side in ("BOTH", "LONG", "SHORT")), ZERO)
        if market.brackets and exposure > notional_cap(market.brackets, leverage):
            raise fault(-2027)
        if leverage >= setting.leverage:
            return
        if setting.isolated and self._positions_of(account, symbol):
            raise fault(-4161)
        if exposure / leverage - exposure / setting.leverage > self._available(account):
            raise fault(-2028)

    def set_margin_type(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /marginType: ISOLATED or CROSSED."""
        account, asked = self._asked(key, params, now_ms)
        market = self._market(asked.needed("symbol"))
        isolated = asked.choice("marginType", ("ISOLATED", "CROSSED"), -1130) == "ISOLATED"
        setting, symbol = self._setting(account, market), market.instrument.symbol
        if setting.isolated == isolated:
            raise fault(-4046)
        if isolated and account.multi_assets:
            raise fault(-4168)
        if any(o.symbol == symbol for o in account.orders.values()):
            raise fault(-4047)
        if self._positions_of(account, symbol):
            raise fault(-4048)
        setting.isolated = isolated
        return dict(DONE)

    def position_mode(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /positionSide/dual."""
        account, _ = self._asked(key, params, now_ms)
        return {"dualSidePosition": account.dual}

    def set_position_mode(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /positionSide/dual."""
        account, asked = self._asked(key, params, now_ms)
        asked.needed("dualSidePosition")
        dual = asked.flag("dualSidePosition")
        if dual == account.dual:
            raise fault(-4059)
        if account.orders or account.algos:
            raise fault(-4067)
        if account.positions:
            raise fault(-4068)
        account.dual = dual
        return dict(DONE)

    def multi_assets(self, key: str, params: Query, now_ms: int) -> JSON:
        """GET /multiAssetsMargin."""
        account, _ = self._asked(key, params, now_ms)
        return {"multiAssetsMargin": account.multi_assets}

    def set_multi_assets(self, key: str, params: Query, now_ms: int) -> JSON:
        """POST /multiAssetsMargin; remembered, but there is one asset only."""
        account, asked = self._asked(key, params, now_ms)
        asked.needed("multiAssetsMargin")
        chosen = asked.flag("multiAssetsMargin")
        if chosen == account.multi_assets:
            raise fault(-4171)
        if chosen and any(s.isolated for s in account.settings.values()):
            raise fault(-4167)
        if account.orders or account.algos:
            raise fault(-4170)
        account.multi_assets = chosen
        return dict(DONE)


def _refuse_price_match(asked: Parameters) -> None:
    if asked.text("priceMatch", "NONE") != "NONE":
        raise fault(-1130, name="priceMatch")


History = TypeVar("History")


def _finished(histories: Mapping[str, list[History]], symbol: str) -> list[History]:
    """One symbol's history, or all of them; a new list."""
    if symbol:
        return list(histories.get(symbol, []))
    return [item for history in histories.values() for item in history]


def _window(rows: list[Row], asked: Parameters, now_ms: int, default: int) -> list[Row]:
    """Rows within startTime and endTime: the first of them from a start, else the latest."""
    start, end = asked.integer("startTime"), asked.integer("endTime")
    limit = asked.limit(default, 1000)
    kept = [r for r in rows if (start or 0) <= r.at_ms <= (now_ms if end is None else end)]
    return kept[:limit] if start is not None else kept[-limit:]
