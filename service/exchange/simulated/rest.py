"""The venue's REST interface: one table of addresses, one way every request goes.

Order of the checks, as on the venue: the address's weight, the key, the timestamp, the signature, then
the parameters. Market data is answered here, everything about an account by the engine.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from service.exchange.simulated.auth import UNSIGNED, Keys, ListenKeys, parse_parameters
from service.exchange.simulated.engine import Engine
from service.exchange.simulated.faults import VenueFault, fault
from service.exchange.simulated.parameters import Parameters
from service.exchange.simulated.quotes import Quotes, exchange_symbol
from service.exchange.simulated.tape import STEP_MS
from service.exchange.simulated.weights import (
    FUNDING_PATHS,
    ORDER_COUNTS,
    ORDERS_PER_10_S,
    ORDERS_PER_MINUTE,
    WEIGHT_PER_MINUTE,
    RateLimits,
    Throttled,
    request_weight,
)
from service.records import TIMEFRAME_MS

HOUR_MS = 3_600_000
DEFAULT_FUNDING_INTERVAL_MS = 8 * HOUR_MS
MAX_CANDLES = 1_500
DEPTHS = (5, 10, 20, 50, 100, 500, 1_000)

RATE_LIMITS = [
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": WEIGHT_PER_MINUTE},
    {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": ORDERS_PER_MINUTE},
    {"rateLimitType": "ORDERS", "interval": "SECOND", "intervalNum": 10, "limit": ORDERS_PER_10_S},
]


class Request(NamedTuple):
    """One HTTP request as it came: `query` and `body` are still percent-encoded."""

    method: str
    path: str
    query: str
    body: str
    api_key: str | None
    address: str
    now_ms: int  # market time
    now_s: float  # wall, monotonic


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]
    changed: bool  # an account may have changed


class Call(NamedTuple):
    """An admitted request."""

    account: str
    params: dict[str, str]
    now_ms: int
    now_s: float

    @property
    def read(self) -> Parameters:
        return Parameters(self.params)


class Security(Enum):
    """What a request must carry."""

    NONE = "nothing"
    KEY = "an API key"
    SIGNED = "an API key, a timestamp and a signature"


Handler = Callable[[Call], object]


class Route(NamedTuple):
    security: Security
    handler: Handler


class PublicData:
    """Market data of the REST interface, as of the last finished step."""

    def __init__(self, quotes: Quotes) -> None:
        self._quotes = quotes
        self._tape = quotes.tape
        self._info: tuple[int, bytes] = (-1, b"")

    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("GET", "/fapi/v1/ping"): lambda call: {},
            ("GET", "/fapi/v1/exchangeInfo"): self.exchange_info,
            ("GET", "/fapi/v1/klines"): self.klines,
            ("GET", "/fapi/v1/continuousKlines"): self.continuous_klines,
            ("GET", "/fapi/v1/ticker/24hr"): self.ticker_24hr,
            ("GET", "/fapi/v1/ticker/price"): self.ticker_price,
            ("GET", "/fapi/v2/ticker/price"): self.ticker_price,
            ("GET", "/fapi/v1/ticker/bookTicker"): self.book_ticker,
            ("GET", "/fapi/v1/depth"): self.depth,
            ("GET", "/fapi/v1/premiumIndex"): self.premium_index,
            ("GET", "/fapi/v1/fundingRate"): self.funding_rate,
            ("GET", "/fapi/v1/fundingInfo"): self.funding_info,
        }

    def exchange_info(self, call: Call) -> msgspec.Raw:
        listed = set(self._quotes.listed(call.now_ms))
        if self._info[0] != len(listed):  # symbols are only ever added
            rows = [exchange_symbol(n.instrument, i in listed) for i, n in enumerate(self._quotes.grids)]
            self._info = (len(listed), msgspec.json.encode(rows))
        head = {
            "timezone": "UTC",
            "serverTime": call.now_ms,
            "futuresType": "U_MARGINED",
            "rateLimits": RATE_LIMITS,
            "exchangeFilters": [],
            "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
            "symbols": msgspec.Raw(self._info[1]),
        }
        return msgspec.Raw(msgspec.json.encode(head))

    def klines(self, call: Call) -> list[list[Any]]:
        return self._candles(call, self._index(call, "symbol"))

    def continuous_klines(self, call: Call) -> list[list[Any]]:
        if call.read.needed("contractType") != "PERPETUAL":
            raise VenueFault(-1130, "Data sent for parameter 'contractType' is not valid.")
        return self._candles(call, self._index(call, "pair"))

    def _candles(self, call: Call, index: int) -> list[list[Any]]:
        """The newest `limit` up to endTime, or the first `limit` from startTime on."""
        asked = call.read
        timeframe = asked.needed("interval")
        if timeframe not in TIMEFRAME_MS:
            raise VenueFault(-1120, "Invalid interval.")
        span_ms = TIMEFRAME_MS[timeframe]
        limit = asked.integer("limit")
        limit = 500 if limit is None else limit
        if not 1 <= limit <= MAX_CANDLES:
            raise VenueFault(-1130, "Data sent for parameter 'limit' is not valid.")
        start_ms, end_ms = asked.integer("startTime"), asked.integer("endTime")
        end_ms = call.now_ms if end_ms is None else min(end_ms, call.now_ms)
        if start_ms is None:
            start_ms = (end_ms // span_ms - limit + 1) * span_ms
        else:
            first = -(-start_ms // span_ms) * span_ms
            end_ms = min(end_ms, first + (limit - 1) * span_ms)
        return self._quotes.candles(index, timeframe, start_ms, end_ms, call.now_ms)[:limit]

    def ticker_24hr(self, call: Call) -> object:
        rows = self._quotes.day_rows(call.now_ms)
        return self._one_or_all(call, lambda i: self._quotes.ticker(i, rows[i], call.now_ms))

    def ticker_price(self, call: Call) -> object:
        last = self._tape.last_prices(call.now_ms).tolist()

        def row(i: int) -> dict[str, Any]:
            notation = self._quotes.grids[i]
            return {"symbol": notation.symbol, "price": notation.price(last[i]), "time": call.now_ms}

        return self._one_or_all(call, row)

    def book_ticker(self, call: Call) -> object:
        last = self._tape.last_prices(call.now_ms).tolist()
        return self._one_or_all(call, lambda i: self._quotes.book_ticker(i, last[i], call.now_ms))

    def depth(self, call: Call) -> dict[str, Any]:
        index = self._index(call, "symbol")
        levels = call.read.integer("limit") or 500
        if levels not in DEPTHS:
            raise VenueFault(-4021, f"{levels} is not valid depth limit.")
        last = float(self._tape.last_prices(call.now_ms)[index])
        bids, asks = self._quotes.depth(index, last, levels) if last == last else ([], [])
        step = call.now_ms // STEP_MS
        return {"lastUpdateId": step, "E": call.now_ms, "T": call.now_ms, "bids": bids, "asks": asks}

    def premium_index(self, call: Call) -> object:
        mark = self._tape.mark_prices(call.now_ms).tolist()
        return self._one_or_all(call, lambda i: self._quotes.premium(i, mark[i], call.now_ms))

    def funding_rate(self, call: Call) -> list[dict[str, Any]]:
        """Settled rates, oldest first: from startTime on, or the newest. Without a symbol, those of all."""
        asked = call.read
        limit = asked.limit(100, 1_000)
        end_ms = min(asked.integer("endTime") or call.now_ms, call.now_ms)
        start_ms = asked.integer("startTime")
        if call.params.get("symbol"):
            return self._quotes.settled(self._index(call, "symbol"), start_ms, end_ms, limit)
        rows: list[dict[str, Any]] = []
        for index in self._quotes.listed(call.now_ms):
            rows += self._quotes.settled(index, start_ms, end_ms, limit)
        rows.sort(key=lambda row: row["fundingTime"])
        return rows[-limit:] if start_ms is None else rows[:limit]

    def funding_info(self, call: Call) -> list[dict[str, Any]]:
        """Only symbols whose interval is not the usual eight hours, as on the venue."""
        rows: list[dict[str, Any]] = []
        for index, notation in enumerate(self._quotes.grids):
            interval_ms = self._tape.funding_interval_ms(index)
            if interval_ms != DEFAULT_FUNDING_INTERVAL_MS:
                rows.append(
                    {
                        "symbol": notation.symbol,
                        "adjustedFundingRateCap": "0.02000000",
                        "adjustedFundingRateFloor": "-0.02000000",
                        "fundingIntervalHours": interval_ms // HOUR_MS,
                        "disclaimer": False,
                    }
                )
        return rows

    def brackets(self, call: Call) -> object:
        def row(symbol: str) -> dict[str, Any]:
            brackets = [
                {
                    "bracket": number,
                    "initialLeverage": bracket.max_leverage,
                    "notionalCap": float(bracket.notional_cap),
                    "notionalFloor": float(bracket.notional_floor),
                    "maintMarginRatio": float(bracket.maintenance_margin_fraction),
                    "cum": float(bracket.maintenance_amount),
                }
                for number, bracket in enumerate(self._tape.brackets.get(symbol, ()), 1)
            ]
            return {"symbol": symbol, "brackets": brackets}

        if call.params.get("symbol"):
            return row(self._quotes.grids[self._index(call, "symbol")].symbol)
        return [row(symbol) for symbol in self._tape.symbols]

    def _index(self, call: Call, name: str) -> int:
        index = self._quotes.index.get(call.read.needed(name))
        if index is None:
            raise fault(-1121)
        return index

    def _one_or_all(self, call: Call, row: Callable[[int], dict[str, Any]]) -> object:
        listed = self._quotes.listed(call.now_ms)
        if not call.params.get("symbol"):
            return [row(i) for i in listed]
        index = self._index(call, "symbol")
        if index not in listed:
            raise fault(-1121)
        return row(index)


KEY_PERMISSIONS = {
    "ipRestrict": True,
    "createTime": 1_767_225_600_000,
    "enableReading": True,
    "enableWithdrawals": False,
    "enableInternalTransfer": False,
    "permitsUniversalTransfer": False,
    "enableFutures": True,
}
"""What every key of the simulated exchange may do, as the venue's wallet interface tells it."""

EngineMethod = Callable[[Engine, str, Mapping[str, object], int], object]

ENGINE_ROUTES: dict[tuple[str, str], EngineMethod] = {
    ("POST", "/fapi/v1/order"): Engine.new_order,
    ("GET", "/fapi/v1/order"): Engine.query_order,
    ("DELETE", "/fapi/v1/order"): Engine.cancel_order,
    ("POST", "/fapi/v1/order/test"): Engine.order_test,
    ("DELETE", "/fapi/v1/batchOrders"): Engine.cancel_batch,
    ("GET", "/fapi/v1/openOrder"): Engine.open_order,
    ("GET", "/fapi/v1/openOrders"): Engine.open_orders,
    ("GET", "/fapi/v1/allOrders"): Engine.all_orders,
    ("DELETE", "/fapi/v1/allOpenOrders"): Engine.cancel_all,
    ("POST", "/fapi/v1/countdownCancelAll"): Engine.countdown_cancel_all,
    ("GET", "/fapi/v1/userTrades"): Engine.user_trades,
    ("POST", "/fapi/v1/algoOrder"): Engine.new_algo_order,
    ("GET", "/fapi/v1/algoOrder"): Engine.query_algo_order,
    ("DELETE", "/fapi/v1/algoOrder"): Engine.cancel_algo_order,
    ("GET", "/fapi/v1/openAlgoOrders"): Engine.open_algo_orders,
    ("DELETE", "/fapi/v1/algoOpenOrders"): Engine.cancel_all_algo,
    ("GET", "/fapi/v1/allAlgoOrders"): Engine.all_algo_orders,
    ("GET", "/fapi/v2/account"): Engine.account_v2,
    ("GET", "/fapi/v3/account"): Engine.account_v3,
    ("GET", "/fapi/v2/balance"): Engine.balance_v2,
    ("GET", "/fapi/v3/balance"): Engine.balance_v3,
    ("GET", "/fapi/v2/positionRisk"): Engine.position_risk_v2,
    ("GET", "/fapi/v3/positionRisk"): Engine.position_risk_v3,
    ("POST", "/fapi/v1/leverage"): Engine.set_leverage,
    ("POST", "/fapi/v1/marginType"): Engine.set_margin_type,
    ("GET", "/fapi/v1/positionSide/dual"): Engine.position_mode,
    ("POST", "/fapi/v1/positionSide/dual"): Engine.set_position_mode,
    ("GET", "/fapi/v1/multiAssetsMargin"): Engine.multi_assets,
    ("POST", "/fapi/v1/multiAssetsMargin"): Engine.set_multi_assets,
    ("GET", "/fapi/v1/symbolConfig"): Engine.symbol_config,
    ("GET", "/fapi/v1/accountConfig"): Engine.account_config,
    ("GET", "/fapi/v1/income"): Engine.income,
    ("GET", "/fapi/v1/commissionRate"): Engine.commission_rate,
}


class Rest:
    """The REST interface over one market, one engine and one set of keys.

    `show_prices(symbols, now_ms)` is called before the engine is asked: it gives the engine the
    newest prices of what it watches and of `symbols`.
    """

    def __init__(
        self,
        engine: Engine,
        quotes: Quotes,
        keys: Keys,
        listen_keys: ListenKeys,
        show_prices: Callable[[Iterable[str], int], None],
        drop_listen_key: Callable[[str], None],
    ) -> None:
        self.limits = RateLimits()
        self.skew_ms = 0  # how far the clock that timestamps are judged by is ahead of the market's
        self._engine = engine
        self._keys = keys
        self._listen_keys = listen_keys
        self._show_prices = show_prices
        self._drop_listen_key = drop_listen_key
        self._routes = self._table(PublicData(quotes))

    def _table(self, public: PublicData) -> dict[tuple[str, str], Route]:
        table = {key: Route(Security.NONE, handler) for key, handler in public.routes().items()}
        for key, method in ENGINE_ROUTES.items():
            table[key] = Route(Security.SIGNED, self._asking(method))
        table["GET", "/fapi/v1/time"] = Route(
            Security.NONE, lambda call: {"serverTime": call.now_ms + self.skew_ms}
        )
        table["POST", "/fapi/v1/batchOrders"] = Route(Security.SIGNED, self._batch_orders)
        table["GET", "/fapi/v1/leverageBracket"] = Route(Security.SIGNED, public.brackets)
        table["GET", "/sapi/v1/account/apiRestrictions"] = Route(
            Security.SIGNED, lambda call: KEY_PERMISSIONS
        )
        table["GET", "/fapi/v1/rateLimit/order"] = Route(Security.SIGNED, lambda call: RATE_LIMITS[1:])
        table["POST", "/fapi/v1/listenKey"] = Route(Security.KEY, self._create_listen_key)
        table["PUT", "/fapi/v1/listenKey"] = Route(Security.KEY, self._renew_listen_key)
        table["DELETE", "/fapi/v1/listenKey"] = Route(Security.KEY, self._delete_listen_key)
        return table

    def answer(self, request: Request) -> Answer:
        """Admit, dispatch and encode. Venue faults become `{code, msg}` with their HTTP status."""
        account = ""
        headers = {"Content-Type": "application/json"}
        status = 200
        changed = False
        try:
            route = self._routes.get((request.method, request.path))
            if route is None:
                text = f"Path {request.path}, Method {request.method} is invalid"
                raise VenueFault(-5000, text, 404)
            params = self._admit_address(request)
            account = self._identify(route, request, params)
            self._count_orders(account, request)
            for name in UNSIGNED:
                params.pop(name, None)
            changed = route.security is Security.SIGNED and request.method != "GET"
            body = msgspec.json.encode(route.handler(Call(account, params, request.now_ms, request.now_s)))
        except VenueFault as refusal:
            status = refusal.http_status
            body = msgspec.json.encode({"code": refusal.code, "msg": refusal.message})
            if isinstance(refusal, Throttled):
                headers["Retry-After"] = str(-((request.now_ms - refusal.retry_ms) // 1_000))
        headers["X-MBX-USED-WEIGHT-1M"] = str(self.limits.used_weight(request.address, request.now_ms))
        if account and (request.method, request.path) in ORDER_COUNTS:
            in_10_s, in_minute = self.limits.order_counts(account, request.now_ms)
            headers["X-MBX-ORDER-COUNT-10S"] = str(in_10_s)
            headers["X-MBX-ORDER-COUNT-1M"] = str(in_minute)
        return Answer(status, body, headers, changed)

    def _admit_address(self, request: Request) -> dict[str, str]:
        """The parameters, once the address may ask at all."""
        try:
            params = parse_parameters(request.query, request.body)
        except VenueFault:
            self.limits.charge_weight(request.address, 1, request.now_ms)
            raise
        if request.path in FUNDING_PATHS:
            self.limits.charge_funding(request.address, request.now_ms)
        else:
            weight = request_weight(request.method, request.path, params)
            self.limits.charge_weight(request.address, weight, request.now_ms)
        return params

    def _identify(self, route: Route, request: Request, params: Mapping[str, str]) -> str:
        if route.security is Security.SIGNED:
            return self._keys.check_signed(
                request.api_key, request.query, request.body, params, request.now_ms + self.skew_ms
            )
        return self._keys.known(request.api_key) if route.security is Security.KEY else ""

    def _count_orders(self, account: str, request: Request) -> None:
        counts = ORDER_COUNTS.get((request.method, request.path))
        if counts is not None:
            self.limits.charge_orders(account, *counts, request.now_ms)

    # Accounts

    def _asking(self, method: EngineMethod) -> Handler:
        def handler(call: Call) -> object:
            symbol = call.params.get("symbol")
            self._show_prices((symbol,) if symbol else (), call.now_ms)
            return method(self._engine, call.account, call.params, call.now_ms)

        return handler

    def _batch_orders(self, call: Call) -> object:
        """POST /batchOrders: a JSON array of orders in one parameter."""
        try:
            orders = msgspec.json.decode(call.read.needed("batchOrders"), type=list[dict[str, Any]])
        except msgspec.DecodeError:
            raise VenueFault(-1130, "Data sent for parameter 'batchOrders' is not valid.") from None
        self._show_prices((str(order.get("symbol", "")) for order in orders), call.now_ms)
        return self._engine.batch_orders(call.account, orders, call.now_ms)

    def _create_listen_key(self, call: Call) -> dict[str, str]:
        return {"listenKey": self._listen_keys.create(call.account, call.now_s)}

    def _renew_listen_key(self, call: Call) -> dict[str, str]:
        return {"listenKey": self._listen_keys.renew(call.account, call.now_s)}

    def _delete_listen_key(self, call: Call) -> dict[str, str]:
        listen_key = self._listen_keys.delete(call.account)
        if listen_key is not None:
            self._drop_listen_key(listen_key)
        return {}
