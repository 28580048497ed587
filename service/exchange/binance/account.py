"""One account in the venue's terms: orders, positions, leverage and history over any transport.

The live venue and the simulated matching engine in this process are two transports of the same calls.
"""

from collections.abc import Sequence
from decimal import Decimal

import msgspec
import structlog

from service.errors import OrderOutcomeUnknown, OrderRejected, RequestRejected, VenueMalformed
from service.exchange.binance import codec
from service.exchange.binance.errors import Kind
from service.exchange.binance.rest import Call, Transport, read
from service.ports import Clock
from service.reactions import Reaction
from service.records import (
    Account,
    Adjustment,
    Bracket,
    Fill,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
)

log = structlog.get_logger("exchange.binance")

INCOME_PAGE_ROWS = 1_000
INCOME_PAGES = 100
TRADE_PAGE_ROWS = 1_000
TRADE_WINDOW_MS = 7 * 86_400_000 - 1  # the longest the venue answers for
TRADES_KEPT_MS = 90 * 86_400_000

ACCOUNT = Call("GET", "/fapi/v3/account", weight=5, signed=True, priority=True)
POSITION_RISK = Call("GET", "/fapi/v3/positionRisk", weight=5, signed=True, priority=True)
BRACKETS = Call("GET", "/fapi/v1/leverageBracket", weight=1, signed=True)
POSITION_MODE = Call("GET", "/fapi/v1/positionSide/dual", weight=30, signed=True)
ASSETS_MODE = Call("GET", "/fapi/v1/multiAssetsMargin", weight=30, signed=True)
SYMBOL_CONFIG = Call("GET", "/fapi/v1/symbolConfig", weight=5, signed=True)
SET_MARGIN_TYPE = Call("POST", "/fapi/v1/marginType", kind=Kind.WRITE, signed=True, priority=True)
SET_LEVERAGE = Call("POST", "/fapi/v1/leverage", kind=Kind.WRITE, signed=True, priority=True)
PLACE = Call("POST", "/fapi/v1/order", weight=0, kind=Kind.ORDER, signed=True)
PLACE_ALGO = Call("POST", "/fapi/v1/algoOrder", weight=0, kind=Kind.ORDER, signed=True)
PLACE_URGENT = msgspec.structs.replace(PLACE, priority=True)  # takes risk away: may use the reserve
PLACE_ALGO_URGENT = msgspec.structs.replace(PLACE_ALGO, priority=True)
CANCEL = Call("DELETE", "/fapi/v1/order", kind=Kind.WRITE, signed=True, priority=True)
CANCEL_ALGO = Call("DELETE", "/fapi/v1/algoOrder", kind=Kind.WRITE, signed=True, priority=True)
QUERY = Call("GET", "/fapi/v1/order", signed=True, priority=True)
QUERY_ALGO = Call("GET", "/fapi/v1/algoOrder", signed=True, priority=True)
TRADES = Call("GET", "/fapi/v1/userTrades", weight=5, signed=True, priority=True)
OPEN_ORDERS = Call("GET", "/fapi/v1/openOrders", weight=40, signed=True, priority=True)
OPEN_ALGO_ORDERS = Call("GET", "/fapi/v1/openAlgoOrders", weight=40, signed=True, priority=True)
INCOME = Call("GET", "/fapi/v1/income", weight=30, signed=True)


class AccountCalls:
    """The private half of an exchange."""

    def __init__(self, transport: Transport, clock: Clock, stop_working_type: str) -> None:
        self._transport = transport
        self._clock = clock
        self._stop_working_type = stop_working_type
        self._leverage: dict[str, tuple[int, str]] = {}  # what we know is set, by symbol

    async def account(self) -> Account:
        """Balances, PnL and positions from one answer; entry and liquidation prices from a second."""
        view = await read(self._transport, ACCOUNT, {}, codec.account_view.decode)
        at_ms = self._clock.now_ms()
        risks = []
        if view.held:
            risks = await read(self._transport, POSITION_RISK, {}, codec.position_risks.decode)
        return codec.account(view, risks, at_ms)

    async def brackets(self) -> dict[str, tuple[Bracket, ...]]:
        return await read(self._transport, BRACKETS, {}, codec.brackets)

    async def prepare(self, symbols: Sequence[str], margin_type: str) -> None:
        """Check the account's modes; see the port."""
        if (await read(self._transport, POSITION_MODE, {}, codec.account_flag.decode)).dual_side_position:
            raise RequestRejected(
                "the account is in hedge mode and perpd trades in one-way mode: close all positions and "
                "orders, then choose One-way Mode in the venue's futures preferences"
            )
        if (await read(self._transport, ASSETS_MODE, {}, codec.account_flag.decode)).multi_assets_margin:
            raise RequestRejected(
                "the account is in multi-assets mode and perpd keeps its books in one asset: choose "
                "Single-Asset Mode in the venue's futures preferences"
            )
        await self._learn_settings(frozenset(symbols))

    async def _learn_settings(self, symbols: frozenset[str]) -> None:
        """What is set already need not be set on the way of an order. Not told, it is set once more."""
        try:
            rows = await read(self._transport, SYMBOL_CONFIG, {}, codec.symbol_configs.decode)
        except RequestRejected:
            return
        self._leverage = {
            row.symbol: (row.leverage, row.margin_type.upper()) for row in rows if row.symbol in symbols
        }

    def setting_changed(self, symbol: str, leverage: int) -> None:
        """The private stream says so; a person may have done it. Args: leverage: 0 where it is not told."""
        if symbol in self._leverage and self._leverage[symbol][0] != leverage:
            del self._leverage[symbol]

    def settings_unknown(self) -> None:
        """Changes may have been missed."""
        self._leverage.clear()

    async def set_leverage(self, symbol: str, leverage: int, margin_type: str) -> None:
        """Set what differs from what we last set. Raises RequestRejected, VenueUnavailable."""
        known_leverage, known_margin = self._leverage.pop(symbol, (0, ""))
        if known_margin != margin_type and not await self._set_margin_type(symbol, margin_type):
            margin_type = known_margin  # asked for again with the next order
        if known_leverage != leverage:
            await self._transport.send(SET_LEVERAGE, {"symbol": symbol, "leverage": str(leverage)})
        self._leverage[symbol] = (leverage, margin_type)

    async def _set_margin_type(self, symbol: str, margin_type: str) -> bool:
        """False where the venue changes nothing while an order or a position is open there."""
        try:
            await self._transport.send(SET_MARGIN_TYPE, {"symbol": symbol, "marginType": margin_type})
        except RequestRejected as error:
            if error.reaction is Reaction.CANNOT_CHANGE:
                log.warning("margin type stays as it is", symbol=symbol, wanted=margin_type, error=str(error))
                return False
            if error.reaction is not Reaction.DONE:
                raise
        return True

    async def place(self, request: OrderRequest) -> Order:
        """Send one order; see the port. The answer to a plain order never says what was filled."""
        urgent = request.purpose is not OrderPurpose.ENTRY
        if request.type.conditional:
            body = await self._transport.send(
                PLACE_ALGO_URGENT if urgent else PLACE_ALGO,
                conditional_parameters(request, self._stop_working_type),
            )
        else:
            body = await self._transport.send(PLACE_URGENT if urgent else PLACE, plain_parameters(request))
        try:
            view: codec.AlgoView | codec.OrderView = (
                codec.algo_view.decode(body) if request.type.conditional else codec.order_view.decode(body)
            )
        except VenueMalformed as error:
            raise OrderOutcomeUnknown(str(error)) from None
        return _placed(request, view.record(), self._clock.now_ms())

    async def cancel(self, order: Order) -> bool:
        """Cancel; see the port. Raises VenueUnavailable when no usable answer came: repeat it."""
        try:
            if order.type.conditional:
                await self._transport.send(CANCEL_ALGO, {"clientAlgoId": order.client_order_id})
            else:
                await self._transport.send(
                    CANCEL, {"symbol": order.symbol, "origClientOrderId": order.client_order_id}
                )
        except RequestRejected as error:
            if error.reaction is not Reaction.LOOK_FOR_ORDER:
                raise
            return False
        return True

    async def order(self, order: Order) -> tuple[Order, list[Fill]] | None:
        """See the port. Right after a lost answer None proves nothing: ask again."""
        try:
            if order.type.conditional:
                found, venue_id = await self._conditional(order)
            else:
                view = await self._plain(order.symbol, origClientOrderId=order.client_order_id)
                found, venue_id = view.record(), str(view.order_id)
        except RequestRejected as error:
            if error.reaction is Reaction.LOOK_FOR_ORDER:
                return None
            raise
        fills: list[Fill] = []
        if found.filled_quantity > 0:
            fills = await self._fills(order, venue_id)
        return _named(found, order), fills

    async def _conditional(self, order: Order) -> tuple[Order, str]:
        """The conditional order with what became of it, and the venue id of the order it became."""
        view = await read(
            self._transport, QUERY_ALGO, {"clientAlgoId": order.client_order_id}, codec.algo_view.decode
        )
        if not view.became:
            return view.record(), ""
        actual = (await self._plain(order.symbol, orderId=view.became)).record()
        status = OrderStatus.TRIGGERED if actual.status is OrderStatus.OPEN else actual.status
        return msgspec.structs.replace(
            view.record(),
            status=status,
            quantity=actual.quantity,
            filled_quantity=actual.filled_quantity,
            average_price=actual.average_price,
            reason=actual.reason,
            updated_ms=actual.updated_ms,
        ), view.became

    async def _plain(self, symbol: str, **by: str) -> codec.OrderView:
        return await read(self._transport, QUERY, {"symbol": symbol, **by}, codec.order_view.decode)

    async def _fills(self, order: Order, venue_id: str) -> list[Fill]:
        params = {"symbol": order.symbol, "orderId": venue_id, "limit": "1000"}
        return await read(
            self._transport, TRADES, params, lambda body: codec.fills(body, order.client_order_id)
        )

    async def executions(self, symbol: str, since_ms: int) -> list[Fill]:
        """See the port."""
        rows: dict[str, Fill] = {}
        now_ms = self._clock.now_ms()
        start_ms = max(since_ms, now_ms - TRADES_KEPT_MS)
        while start_ms <= now_ms:
            end_ms = start_ms + TRADE_WINDOW_MS
            page = await self._executions(symbol, start_ms, end_ms)
            rows.update((fill.trade_id, fill) for fill in page)
            # Rows of one millisecond may be split over two pages: a full page's last one begins the next.
            full = len(page) >= TRADE_PAGE_ROWS
            start_ms = max(page[-1].filled_ms, start_ms + 1) if full else end_ms + 1
        names = {
            venue_id: await self._client_id(symbol, venue_id)
            for venue_id in dict.fromkeys(fill.venue_order_id for fill in rows.values())
        }
        return [
            msgspec.structs.replace(fill, client_order_id=names[fill.venue_order_id])
            for fill in sorted(rows.values(), key=lambda fill: (fill.filled_ms, fill.trade_id))
        ]

    async def _executions(self, symbol: str, start_ms: int, end_ms: int) -> list[Fill]:
        params = {
            "symbol": symbol,
            "startTime": str(start_ms),
            "endTime": str(end_ms),
            "limit": str(TRADE_PAGE_ROWS),
        }
        return await read(self._transport, TRADES, params, lambda body: codec.fills(body, ""))

    async def _client_id(self, symbol: str, venue_id: str) -> str:
        try:
            return (await self._plain(symbol, orderId=venue_id)).client_order_id
        except RequestRejected as error:
            if error.reaction is not Reaction.LOOK_FOR_ORDER:
                raise
            return ""  # what was not filled is forgotten after 3 days, everything after 90

    async def open_orders(self) -> list[Order]:
        """All resting orders, conditional ones included."""
        plain = await read(self._transport, OPEN_ORDERS, {}, codec.order_views.decode)
        conditional = await read(self._transport, OPEN_ALGO_ORDERS, {}, codec.algo_views.decode)
        return [view.record() for view in plain] + [view.record() for view in conditional]

    async def adjustments(self, since_ms: int) -> list[Adjustment]:
        """Funding, transfers and corrections since then, oldest first; never trades or commissions."""
        found: dict[str, Adjustment] = {}
        start_ms = since_ms
        for _ in range(INCOME_PAGES):
            params = {"startTime": str(start_ms), "limit": str(INCOME_PAGE_ROWS)}
            page = await read(self._transport, INCOME, params, codec.income_page)
            found.update((each.adjustment_id, each) for each in page.adjustments)
            if page.rows < INCOME_PAGE_ROWS:
                break
            # Rows of one millisecond may be split over two pages: begin with it again.
            start_ms = page.last_ms if page.last_ms > start_ms else start_ms + 1
        return sorted(found.values(), key=lambda each: each.at_ms)


def plain_parameters(request: OrderRequest) -> dict[str, str]:
    """POST /fapi/v1/order for a market or limit order."""
    params = {
        "symbol": request.symbol,
        "side": request.side.value,
        "type": request.type.value,
        "newClientOrderId": request.client_order_id,
        "newOrderRespType": "ACK",  # what was filled comes by stream or by a query, with its price
    }
    _add_quantity(params, request)
    if request.type is OrderType.LIMIT:
        if request.price is None:
            raise OrderRejected(f"order {request.client_order_id}: a limit order needs a price")
        params["price"] = f"{request.price:f}"
        params["timeInForce"] = request.time_in_force or "GTC"
    if request.reduce_only:
        params["reduceOnly"] = "true"
    return params


def conditional_parameters(request: OrderRequest, working_type: str) -> dict[str, str]:
    """POST /fapi/v1/algoOrder for a stop or take-profit order."""
    if request.trigger_price is None:
        raise OrderRejected(f"order {request.client_order_id}: a conditional order needs a trigger price")
    params = {
        "algoType": "CONDITIONAL",
        "symbol": request.symbol,
        "side": request.side.value,
        "type": request.type.value,
        "clientAlgoId": request.client_order_id,
        "triggerPrice": f"{request.trigger_price:f}",
        "workingType": request.working_type or working_type,
        "priceProtect": "false",
    }
    if request.time_in_force:
        params["timeInForce"] = request.time_in_force
    if request.close_position:
        params["closePosition"] = "true"
        return params
    _add_quantity(params, request)
    if request.reduce_only:
        params["reduceOnly"] = "true"
    return params


def _add_quantity(params: dict[str, str], request: OrderRequest) -> None:
    if request.quantity is None or request.quantity <= 0:
        raise OrderRejected(f"order {request.client_order_id}: a quantity above zero is needed")
    params["quantity"] = f"{request.quantity:f}"


def _placed(request: OrderRequest, answered: Order, now_ms: int) -> Order:
    """The order as asked for, with the ids and times of the answer."""
    return msgspec.structs.replace(
        answered,
        client_order_id=request.client_order_id,
        position_id=request.position_id,
        type=request.type,
        purpose=request.purpose,
        quantity=answered.quantity or request.quantity or Decimal(0),
        trigger_price=request.trigger_price or Decimal(0),
        created_ms=answered.created_ms or now_ms,
        updated_ms=answered.updated_ms or now_ms,
    )


def _named(found: Order, ours: Order) -> Order:
    """The venue's view under our name: what the venue does not know is kept from ours."""
    return msgspec.structs.replace(
        found,
        client_order_id=ours.client_order_id,
        position_id=ours.position_id,
        type=ours.type,
        purpose=ours.purpose,
        quantity=found.quantity or ours.quantity,
        trigger_price=found.trigger_price or ours.trigger_price,
        created_ms=found.created_ms or ours.created_ms,
    )
