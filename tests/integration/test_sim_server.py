"""The simulated exchange over real sockets: REST as signed clients use it, streams as they listen to it."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from yarl import URL

from service.errors import PortInUse
from service.exchange.simulated import streams as streams_module
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, Venue, listen, serving

KEY, SECRET = "sim-key", "sim-secret"
DEPOSIT = Decimal(10_000)
WAIT_S = 20.0


@dataclass
class Client:
    """A signed client of one running exchange."""

    venue: Venue
    http: aiohttp.ClientSession
    last_headers: dict[str, str]

    @property
    def rest(self) -> str:
        return f"http://127.0.0.1:{self.venue.port}"

    @property
    def stream(self) -> str:
        return f"ws://127.0.0.1:{self.venue.port}"

    async def get(self, path: str, **params: object) -> Any:
        async with self.http.get(f"{self.rest}{path}", params=urlencode(params) or None) as response:
            self.last_headers = dict(response.headers)
            return await response.json()

    async def signed(self, method: str, path: str, **params: object) -> tuple[int, Any]:
        query = urlencode({**params, "timestamp": self.venue.clock.now_ms()})
        signature = hmac.new(SECRET.encode(), query.encode(), hashlib.sha256).hexdigest()
        url = URL(f"{self.rest}{path}?{query}&signature={signature}", encoded=True)  # sent as signed
        async with self.http.request(method, url, headers={"X-MBX-APIKEY": KEY}) as response:
            self.last_headers = dict(response.headers)
            return response.status, await response.json()

    async def keyed(self, method: str, path: str) -> Any:
        headers = {"X-MBX-APIKEY": KEY}
        async with self.http.request(method, f"{self.rest}{path}", headers=headers) as response:
            return await response.json()


@asynccontextmanager
async def exchange(
    speed: float = 600.0, symbols: int = 5, seed: int = 7, **options: Any
) -> AsyncIterator[Client]:
    zero = Decimal(0)
    settings = ServerOptions(
        speed=speed,
        keys={KEY: SECRET, "other-key": "other-secret"},
        deposit=DEPOSIT,
        assumptions=Assumptions(
            maker_fee_fraction=Decimal("0.0002"),
            taker_fee_fraction=Decimal("0.0005"),
            spread_bps=Decimal(2),
            slippage_bps_per_million=zero,
        ),
        **options,
    )
    tape = generate(seed, symbols)
    with listen("127.0.0.1", 0) as listener:
        async with serving(tape, settings, listener) as venue, aiohttp.ClientSession() as http:
            yield Client(venue, http, {})


async def next_json(socket: aiohttp.ClientWebSocketResponse) -> Any:
    async with asyncio.timeout(WAIT_S):
        return json.loads((await socket.receive()).data)


async def read_until(socket: aiohttp.ClientWebSocketResponse, wanted: Any) -> Any:
    """The first message for which `wanted` is true."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message = json.loads((await socket.receive()).data)
            if wanted(message):
                return message


async def market_order(client: Client, symbol: str, side: str, notional: float = 500.0) -> Any:
    price = float((await client.get("/fapi/v1/ticker/price", symbol=symbol))["price"])
    grid = client.venue.quotes.grids[client.venue.quotes.index[symbol]]
    status, order = await client.signed(
        "POST",
        "/fapi/v1/order",
        symbol=symbol,
        side=side,
        type="MARKET",
        quantity=grid.quantity(notional / price),
    )
    assert status == 200, order
    return order


# Market data


async def test_one_seed_serves_the_same_candles_at_any_speed() -> None:
    async def candles(speed: float) -> Any:
        async with exchange(speed) as client:
            start_ms = client.venue.tape.start_ms
            answers = []
            for symbol in client.venue.tape.symbols:
                for timeframe in ("5m", "15m", "1h"):
                    answers.append(
                        await client.get(
                            "/fapi/v1/klines",
                            symbol=symbol,
                            interval=timeframe,
                            endTime=start_ms - 3_600_000,
                            limit=100,
                        )
                    )
            # a candle of the market's own time, once it has closed at this speed
            open_ms = start_ms // 300_000 * 300_000
            async with asyncio.timeout(WAIT_S):
                while (await client.get("/fapi/v1/time"))["serverTime"] < open_ms + 300_000:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            answers.append(
                await client.get(
                    "/fapi/v1/klines", symbol="BTCUSDT", interval="5m", startTime=open_ms, limit=1
                )
            )
            return answers

    slow, fast = await candles(600.0), await candles(5_000.0)
    assert slow == fast
    assert all(len(rows) == 100 for rows in slow[:-1])


async def test_klines_have_the_venues_shape_and_end_with_the_forming_candle() -> None:
    async with exchange(speed=1.0) as client:
        rows = await client.get("/fapi/v1/klines", symbol="BTCUSDT", interval="15m", limit=3)
        now_ms = client.venue.clock.now_ms()
    assert [len(row) for row in rows] == [12, 12, 12]
    assert [row[6] - row[0] for row in rows] == [899_999] * 3
    assert rows[1][0] - rows[0][0] == 900_000
    assert rows[-1][0] <= now_ms <= rows[-1][6]
    assert all(isinstance(row[i], str) for row in rows for i in (1, 2, 3, 4, 5, 7, 9, 10, 11))
    assert all(float(row[3]) <= float(row[4]) <= float(row[2]) for row in rows)


async def test_klines_without_limit_are_500_and_from_a_start_run_forwards() -> None:
    async with exchange(speed=1.0) as client:
        rows = await client.get("/fapi/v1/klines", symbol="BTCUSDT", interval="5m")
        assert len(rows) == 500
        assert client.last_headers["X-MBX-USED-WEIGHT-1M"] == "5"
        ahead = await client.get(
            "/fapi/v1/klines", symbol="BTCUSDT", interval="5m", startTime=rows[10][0] - 1, limit=5
        )
        between = await client.get(
            "/fapi/v1/klines", symbol="BTCUSDT", interval="5m", startTime=rows[3][0], endTime=rows[6][0]
        )
    assert ahead == rows[10:15]
    assert between == rows[3:7]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"symbol": "NOPE", "interval": "5m"}, -1121),
        ({"symbol": "BTCUSDT", "interval": "7m"}, -1120),
        ({"symbol": "BTCUSDT"}, -1102),
        ({"symbol": "BTCUSDT", "interval": "5m", "limit": "1501"}, -1130),
        ({"symbol": "BTCUSDT", "interval": "5m", "startTime": "x"}, -1100),
    ],
)
async def test_a_bad_request_for_candles_gets_the_venues_code(params: dict[str, str], code: int) -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        assert (await client.get("/fapi/v1/klines", **params))["code"] == code


async def test_exchange_info_states_rules_and_limits() -> None:
    async with exchange(speed=1.0) as client:
        info = await client.get("/fapi/v1/exchangeInfo")
    assert [(row["rateLimitType"], row["limit"]) for row in info["rateLimits"]] == [
        ("REQUEST_WEIGHT", 2400),
        ("ORDERS", 1200),
        ("ORDERS", 300),
    ]
    assert len(info["symbols"]) == 5
    filters = {row["filterType"] for row in info["symbols"][0]["filters"]}
    assert {"PRICE_FILTER", "LOT_SIZE", "MARKET_LOT_SIZE", "MIN_NOTIONAL", "PERCENT_PRICE"} <= filters


async def test_every_public_view_of_a_price_agrees() -> None:
    async with exchange(speed=1.0) as client:
        price = await client.get("/fapi/v2/ticker/price", symbol="ETHUSDT")
        day = await client.get("/fapi/v1/ticker/24hr", symbol="ETHUSDT")
        book = await client.get("/fapi/v1/ticker/bookTicker", symbol="ETHUSDT")
        depth = await client.get("/fapi/v1/depth", symbol="ETHUSDT", limit=5)
        everything = await client.get("/fapi/v1/ticker/24hr")
        premium = await client.get("/fapi/v1/premiumIndex")
    assert price["price"] == day["lastPrice"]
    assert float(book["bidPrice"]) < float(price["price"]) < float(book["askPrice"])
    assert [depth["bids"][0][0], depth["asks"][0][0]] == [book["bidPrice"], book["askPrice"]]
    assert len(depth["bids"]) == len(depth["asks"]) == 5
    assert len(everything) == len(premium) == 5


async def test_settled_funding_rates_are_oldest_first_on_the_symbols_interval() -> None:
    async with exchange(speed=1.0) as client:
        rows = await client.get("/fapi/v1/fundingRate", symbol="BTCUSDT", limit=3)
        clock = await client.get("/sim/v1/clock")
    times = [row["fundingTime"] for row in rows]
    assert times == sorted(times)
    assert times[1] - times[0] == 8 * 3_600_000
    assert times[-1] <= clock["serverTime"] < times[-1] + 8 * 3_600_000


async def test_the_clock_can_be_shared_and_stops_at_the_markets_end() -> None:
    end_ms = generate(7, 1).start_ms + 30_000
    async with exchange(speed=5_000.0, symbols=1, end_ms=end_ms) as client:
        async with asyncio.timeout(WAIT_S):
            while not (clock := await client.get("/sim/v1/clock"))["ended"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert clock["serverTime"] == clock["endTime"] == end_ms
    assert {"originTime", "originMonotonic", "speed", "startTime", "symbols"} <= set(clock)


async def test_an_unknown_address_is_not_found() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        assert (await client.get("/fapi/v1/nothing"))["code"] == -5000


async def test_weight_beyond_the_minutes_limit_is_refused_then_banned() -> None:
    async with exchange(speed=0.001, symbols=1) as client:
        statuses = []
        for _ in range(60 + 21):
            async with client.http.get(f"{client.rest}/fapi/v1/ticker/24hr") as response:
                statuses.append(response.status)
                body = await response.json()
    assert statuses == [200] * 60 + [429] * 20 + [418]
    assert "IP banned until" in body["msg"]


# Accounts


@pytest.mark.parametrize(
    ("key", "secret", "age_ms", "status", "code"),
    [
        (KEY, "wrong", 0, 400, -1022),
        ("stranger", SECRET, 0, 401, -2015),
        (KEY, SECRET, 5_001_000, 400, -1021),
    ],
)
async def test_who_signs_wrongly_is_refused(
    key: str, secret: str, age_ms: int, status: int, code: int
) -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        query = f"timestamp={client.venue.clock.now_ms() - age_ms}"
        signature = hmac.new(secret.encode(), query.encode(), hashlib.sha256).hexdigest()
        url = f"{client.rest}/fapi/v3/account?{query}&signature={signature}"
        async with client.http.get(url, headers={"X-MBX-APIKEY": key}) as response:
            assert response.status == status
            assert (await response.json())["code"] == code


async def test_a_market_order_fills_and_shows_in_every_view_of_the_account() -> None:
    async with exchange(speed=1.0) as client:
        order = await market_order(client, "BTCUSDT", "BUY")
        assert client.last_headers["X-MBX-ORDER-COUNT-10S"] == "1"
        assert client.last_headers["X-MBX-ORDER-COUNT-1M"] == "1"
        _, found = await client.signed("GET", "/fapi/v1/order", symbol="BTCUSDT", orderId=order["orderId"])
        _, trades = await client.signed("GET", "/fapi/v1/userTrades", symbol="BTCUSDT")
        _, positions = await client.signed("GET", "/fapi/v3/positionRisk")
        _, account = await client.signed("GET", "/fapi/v3/account")
        _, income = await client.signed("GET", "/fapi/v1/income", incomeType="COMMISSION")
    assert found["status"] == "FILLED"
    assert [trade["orderId"] for trade in trades] == [order["orderId"]]
    assert [position["positionAmt"] for position in positions] == [found["executedQty"]]
    fee = sum(Decimal(trade["commission"]) for trade in trades)
    assert Decimal(account["totalWalletBalance"]) == DEPOSIT - fee
    assert Decimal(income[0]["income"]) == -fee


async def test_an_order_may_come_as_a_form_or_in_the_query() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        body = urlencode({"symbol": "BTCUSDT", "leverage": 7, "timestamp": client.venue.clock.now_ms()})
        signature = hmac.new(SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()
        headers = {"X-MBX-APIKEY": KEY, "Content-Type": "application/x-www-form-urlencoded"}
        url = f"{client.rest}/fapi/v1/leverage"
        async with client.http.post(url, data=f"{body}&signature={signature}", headers=headers) as response:
            assert (await response.json())["leverage"] == 7
        _, config = await client.signed("GET", "/fapi/v1/symbolConfig", symbol="BTCUSDT")
    assert config[0]["leverage"] == 7


async def test_a_conditional_type_on_the_order_address_is_sent_elsewhere() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        status, refusal = await client.signed(
            "POST",
            "/fapi/v1/order",
            symbol="BTCUSDT",
            side="SELL",
            type="STOP_MARKET",
            quantity="0.01",
            stopPrice="1",
        )
    assert (status, refusal["code"]) == (400, -4120)


async def test_a_batch_answers_each_order_by_itself() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        bid = float((await client.get("/fapi/v1/ticker/bookTicker", symbol="BTCUSDT"))["bidPrice"])
        good = {
            "symbol": "BTCUSDT",
            "side": "BUY",
            "type": "LIMIT",
            "timeInForce": "GTC",
            "quantity": "0.010",
            "price": f"{bid * 0.98:.1f}",
        }
        orders = json.dumps([good, {**good, "quantity": "0.0001"}])
        status, answers = await client.signed("POST", "/fapi/v1/batchOrders", batchOrders=orders)
        _, resting = await client.signed("GET", "/fapi/v1/openOrders", symbol="BTCUSDT")
    assert status == 200
    assert answers[0]["status"] == "NEW"
    assert answers[1]["code"] < 0
    assert [order["orderId"] for order in resting] == [answers[0]["orderId"]]


async def test_accounts_of_two_keys_know_nothing_of_each_other() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        await market_order(client, "BTCUSDT", "BUY")
        query = f"timestamp={client.venue.clock.now_ms()}"
        signature = hmac.new(b"other-secret", query.encode(), hashlib.sha256).hexdigest()
        url = f"{client.rest}/fapi/v3/account?{query}&signature={signature}"
        async with client.http.get(url, headers={"X-MBX-APIKEY": "other-key"}) as response:
            account = await response.json()
    assert Decimal(account["totalWalletBalance"]) == DEPOSIT
    assert account["positions"] == []


# Streams


async def test_the_kline_stream_closes_each_candle_once_as_the_rest_interface_has_it() -> None:
    async with exchange(speed=2_000.0, symbols=2) as client:
        async with client.http.ws_connect(f"{client.stream}/market/ws/btcusdt@kline_5m") as socket:
            closed: dict[int, Any] = {}
            async with asyncio.timeout(WAIT_S):
                while len(closed) < 4:
                    candle = json.loads((await socket.receive()).data)["k"]
                    if candle["x"]:
                        assert candle["t"] not in closed
                        closed[candle["t"]] = candle
                    else:
                        assert candle["t"] not in closed
        rows = await client.get(
            "/fapi/v1/klines", symbol="BTCUSDT", interval="5m", startTime=min(closed), limit=4
        )
    assert sorted(closed) == [row[0] for row in rows]
    told = [[k["o"], k["h"], k["l"], k["c"], k["v"], k["q"]] for k in (closed[row[0]] for row in rows)]
    assert told == [[*row[1:6], row[7]] for row in rows]


async def test_every_timeframe_closes_when_it_ends() -> None:
    async with exchange(speed=5_000.0, symbols=1) as client:
        names = "/".join(f"btcusdt@kline_{timeframe}" for timeframe in ("1m", "5m", "15m", "1h"))
        async with client.http.ws_connect(f"{client.stream}/market/stream?streams={names}") as socket:
            seen: set[str] = set()
            async with asyncio.timeout(WAIT_S):
                while len(seen) < 4:
                    message = json.loads((await socket.receive()).data)
                    candle = message["data"]["k"]
                    assert message["stream"] == f"btcusdt@kline_{candle['i']}"
                    if candle["x"]:
                        assert message["data"]["E"] == candle["T"] + 1
                        seen.add(candle["i"])


async def test_subscriptions_can_be_changed_and_listed_while_connected() -> None:
    async with exchange(symbols=2) as client:
        async with client.http.ws_connect(f"{client.stream}/market/ws") as socket:
            await socket.send_json(
                {"method": "SUBSCRIBE", "params": ["btcusdt@kline_5m", "nope@kline_5m"], "id": 1}
            )
            assert await next_json(socket) == {"result": None, "id": 1}
            await read_until(socket, lambda message: message.get("e") == "kline")
            await socket.send_json({"method": "LIST_SUBSCRIPTIONS", "id": 2})
            listed = await read_until(socket, lambda message: message.get("id") == 2)
            assert listed["result"] == ["btcusdt@kline_5m", "nope@kline_5m"]
            await socket.send_json({"method": "UNSUBSCRIBE", "params": ["btcusdt@kline_5m"], "id": 3})
            await read_until(socket, lambda message: message.get("id") == 3)
            await socket.send_json({"method": "SUBSCRIBE", "params": ["ethusdt@markPrice@1s"], "id": 4})
            await read_until(socket, lambda message: message.get("id") == 4)
            assert (await next_json(socket))["e"] == "markPriceUpdate"
            await socket.send_str("{nonsense")
            refusal = await read_until(socket, lambda message: "error" in message)
    assert refusal["error"]["code"] == 3


@pytest.mark.parametrize(
    ("route", "name", "kind"),
    [
        ("market", "btcusdt@miniTicker", "24hrMiniTicker"),
        ("market", "btcusdt@ticker", "24hrTicker"),
        ("market", "btcusdt@markPrice", "markPriceUpdate"),
        ("market", "btcusdt@aggTrade", "aggTrade"),
        ("public", "btcusdt@bookTicker", "bookTicker"),
        ("public", "!bookTicker", "bookTicker"),
        ("market", "!miniTicker@arr", "24hrMiniTicker"),
        ("market", "!ticker@arr", "24hrTicker"),
        ("market", "!markPrice@arr@1s", "markPriceUpdate"),
    ],
)
async def test_each_kind_of_stream_tells_its_event(route: str, name: str, kind: str) -> None:
    async with exchange(symbols=3) as client:
        async with client.http.ws_connect(f"{client.stream}/{route}/ws/{name}") as socket:
            event = await next_json(socket)
    rows = event if isinstance(event, list) else [event]
    assert len(rows) == (3 if name.endswith(("@arr", "@arr@1s")) else 1)
    assert all(row["e"] == kind and row["st"] == 1 for row in rows)


async def raw_websocket(port: int, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket spoken by hand, so that nothing but the server's own bytes is seen."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    assert b"permessage-deflate" not in head
    return reader, writer


def masked(payload: bytes) -> bytes:
    mask = os.urandom(4)
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    assert len(payload) < 126
    return bytes((0x81, 0x80 | len(payload))) + mask + body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    first, length = await reader.readexactly(2)
    assert first == 0x81
    if length == 126:
        length = int.from_bytes(await reader.readexactly(2), "big")
    return await reader.readexactly(length)


@pytest.mark.parametrize("path", ["/public/ws", "/ws", "/private/ws"])
async def test_a_stream_on_the_wrong_route_is_acknowledged_and_silent(path: str) -> None:
    async with exchange(speed=5_000.0, symbols=1) as client:
        reader, writer = await raw_websocket(client.venue.port, path)
        right, right_writer = await raw_websocket(client.venue.port, "/market/ws")
        call = json.dumps({"method": "SUBSCRIBE", "params": ["btcusdt@kline_1m"], "id": 5}).encode()
        for one in (writer, right_writer):
            one.write(masked(call))
        async with asyncio.timeout(WAIT_S):
            assert json.loads(await read_frame(reader)) == {"result": None, "id": 5}
            assert json.loads(await read_frame(right)) == {"result": None, "id": 5}
            for _ in range(20):  # the market moves on, the right route hears of it
                assert json.loads(await read_frame(right))["e"] == "kline"
            writer.write(masked(b'{"method":"LIST_SUBSCRIPTIONS","id":6}'))
            answer = json.loads(await read_frame(reader))  # the very next bytes
        assert answer == {"result": ["btcusdt@kline_1m"], "id": 6}
        for one in (writer, right_writer):
            one.close()
            await one.wait_closed()


async def test_a_client_that_sends_too_fast_is_disconnected() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        async with client.http.ws_connect(f"{client.stream}/market/ws") as socket:
            for number in range(11):
                await socket.send_json({"method": "LIST_SUBSCRIPTIONS", "id": number})
            async with asyncio.timeout(WAIT_S):
                while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                    pass
    assert message.type is aiohttp.WSMsgType.CLOSE
    assert message.data == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_more_streams_than_a_connection_may_have_are_refused() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        async with client.http.ws_connect(f"{client.stream}/market/ws") as socket:
            names = [f"s{number}usdt@kline_5m" for number in range(1_025)]
            await socket.send_json({"method": "SUBSCRIBE", "params": names, "id": 1})
            async with asyncio.timeout(WAIT_S):
                while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                    pass
    assert message.type is aiohttp.WSMsgType.CLOSE


async def test_the_server_pings_and_drops_who_never_answers() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        async with client.http.ws_connect(f"{client.stream}/market/ws", autoping=False) as socket:
            connection = next(iter(client.venue.streams._connections.values()))
            client.venue.streams.maintain(connection.pong_s + 1)
            async with asyncio.timeout(WAIT_S):
                assert (await socket.receive()).type is aiohttp.WSMsgType.PING
            client.venue.streams.maintain(connection.pong_s + streams_module.PONG_LIMIT_S + 1)
            async with asyncio.timeout(WAIT_S):
                assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)


async def test_forming_candles_are_thinned_to_the_budget_and_closes_are_not() -> None:
    async with exchange(speed=2_000.0, symbols=40, stream_messages_per_s=100) as client:
        names = "/".join(f"{symbol.lower()}@kline_5m" for symbol in client.venue.tape.symbols)
        async with client.http.ws_connect(f"{client.stream}/market/stream?streams={names}") as socket:
            closes: dict[int, set[str]] = {}
            forming = 0
            async with asyncio.timeout(WAIT_S):
                while len(closes) < 6:
                    candle = json.loads((await socket.receive()).data)["data"]["k"]
                    if candle["x"]:
                        closes.setdefault(candle["t"], set()).add(candle["s"])
                    else:
                        forming += 1
    ended = sorted(closes)[:-1]  # the last may still be arriving
    assert all(len(closes[open_ms]) == 40 for open_ms in ended)
    assert forming < 40 * len(ended)


# User data


async def test_an_order_is_told_on_every_listener_of_its_account() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        listen_key = (await client.keyed("POST", "/fapi/v1/listenKey"))["listenKey"]
        assert (await client.keyed("POST", "/fapi/v1/listenKey"))["listenKey"] == listen_key
        addresses = (
            f"/private/ws?listenKey={listen_key}",
            f"/private/ws/{listen_key}",
            f"/private/stream?listenKey={listen_key}",
        )
        a, b, c = [await client.http.ws_connect(f"{client.stream}{path}") for path in addresses]
        await market_order(client, "BTCUSDT", "BUY")
        told = [
            await read_until(socket, lambda m: m["e"] == "ORDER_TRADE_UPDATE" and m["o"]["X"] == "FILLED")
            for socket in (a, b)
        ]
        wrapped = await next_json(c)
        assert told[0] == told[1]
        assert wrapped["stream"] == listen_key
        for socket in (a, b, c):
            await socket.close()


async def test_a_stop_that_the_market_reaches_closes_the_position_between_requests() -> None:
    async with exchange(speed=3_000.0, symbols=1) as client:
        listen_key = (await client.keyed("POST", "/fapi/v1/listenKey"))["listenKey"]
        async with client.http.ws_connect(f"{client.stream}/private/ws?listenKey={listen_key}") as socket:
            await market_order(client, "BTCUSDT", "BUY")
            last = float((await client.get("/fapi/v1/ticker/price", symbol="BTCUSDT"))["price"])
            for side_price, kind in ((0.999, "STOP_MARKET"), (1.001, "TAKE_PROFIT_MARKET")):
                status, answer = await client.signed(
                    "POST",
                    "/fapi/v1/algoOrder",
                    algoType="CONDITIONAL",
                    symbol="BTCUSDT",
                    side="SELL",
                    type=kind,
                    closePosition="true",
                    triggerPrice=f"{last * side_price:.1f}",
                    workingType="CONTRACT_PRICE",
                )
                assert status == 200, answer
            event = await read_until(
                socket,
                lambda m: (
                    m["e"] == "ORDER_TRADE_UPDATE" and m["o"]["S"] == "SELL" and m["o"]["X"] == "FILLED"
                ),
            )
        _, positions = await client.signed("GET", "/fapi/v3/positionRisk")
    assert event["o"]["s"] == "BTCUSDT"
    assert [p for p in positions if Decimal(p["positionAmt"])] == []


async def test_events_can_be_chosen_and_an_expired_key_says_so_and_falls_silent() -> None:
    async with exchange(speed=1.0, symbols=1) as client:
        listen_key = (await client.keyed("POST", "/fapi/v1/listenKey"))["listenKey"]
        address = f"{client.stream}/private/ws?listenKey={listen_key}&events=ACCOUNT_UPDATE"
        async with client.http.ws_connect(address) as socket:
            await market_order(client, "BTCUSDT", "BUY")
            assert (await next_json(socket))["e"] == "ACCOUNT_UPDATE"
            client.venue.listen_keys.expire(float("inf"))
            client.venue.streams.expire_listen_key(listen_key, 1)
            assert (await next_json(socket))["e"] == "listenKeyExpired"
            await market_order(client, "BTCUSDT", "SELL")
            await socket.send_json({"method": "LIST_SUBSCRIPTIONS", "id": 1})
            assert (await next_json(socket))["id"] == 1
        refusal = await client.keyed("PUT", "/fapi/v1/listenKey")
    assert refusal["code"] == -1125


# The listener


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            listen("127.0.0.1", port)
