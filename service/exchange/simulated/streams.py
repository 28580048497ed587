"""WebSocket streams: who subscribed to what, which event is due, one encoding for all who hear it.

Cadences are wall time, as on the venue; what they tell is market time. An event is sent only after the
market moved (every STEP_MS of market time). Updates of forming candles are thinned, in turn, when
they would exceed the configured messages per wall second; the close of a candle never is.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from service.exchange.simulated.auth import ListenKeys
from service.exchange.simulated.quotes import AVERAGE_TRADE_QUOTE, Book, Quotes
from service.exchange.simulated.tape import STEP_MS
from service.records import TIMEFRAME_MS

log = structlog.get_logger("sim.streams")

STREAMS_PER_CONNECTION = 1_024
MESSAGES_PER_S_FROM_CLIENT = 10
PING_EVERY_S = 180.0
PONG_LIMIT_S = 600.0
CONNECTION_LIFE_S = 86_400.0
BACKLOG_LIMIT_BYTES = 16 * 1_048_576  # a reader this far behind is dropped, as the venue does
FORMING_EVERY_S = 0.23  # not 0.25: at speed 60 a step lasts that long, and none should be missed by a hair
THINNING_WINDOW_S = 2.0  # a burst of closes thins for a moment; only what lasts is worth a line
THINNING_WORTH_SAYING = 1.05

# kind of stream -> seconds of wall time between two of its events
CADENCE_S = {
    "bookTicker": 0.25,
    "aggTrade": 0.25,
    "miniTicker": 0.5,
    "ticker": 2.0,
    "markPrice": 3.0,
    "markPrice@1s": 1.0,
    "!miniTicker@arr": 1.0,
    "!ticker@arr": 1.0,
    "!bookTicker": 5.0,
    "!markPrice@arr": 3.0,
    "!markPrice@arr@1s": 1.0,
}
PUBLIC_KINDS = frozenset(("bookTicker", "!bookTicker"))


class Topic(NamedTuple):
    """What a stream name means.

    `place` is the symbol's in the tape, -1 for all-market streams; `timeframe` is "" but for candles.
    """

    kind: str
    place: int
    timeframe: str

    @property
    def route(self) -> str:
        return "public" if self.kind in PUBLIC_KINDS else "market"


def parse_stream(name: str, index: dict[str, int]) -> Topic | None:
    """The topic of a stream name; None for what this venue does not serve.

    Args: index: symbol in lower case -> its place in the tape.
    """
    if name.startswith("!"):
        return Topic(name, -1, "") if name in CADENCE_S else None
    symbol, _, rest = name.partition("@")
    place = index.get(symbol, -1)
    if place < 0:
        return None
    if rest.startswith("kline_"):
        timeframe = rest.removeprefix("kline_")
        return Topic("kline", place, timeframe) if timeframe in TIMEFRAME_MS else None
    kind = {"markPrice@3s": "markPrice"}.get(rest, rest)
    return Topic(kind, place, "") if kind in CADENCE_S and not kind.startswith("!") else None


def text_frame(payload: bytes, opcode: int = 0x81) -> bytes:
    """One unmasked, unfragmented WebSocket frame from a server (RFC 6455, section 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((opcode, length)) + payload
    if length < 65_536:
        return bytes((opcode, 126)) + length.to_bytes(2, "big") + payload
    return bytes((opcode, 127)) + length.to_bytes(8, "big") + payload


PING_OPCODE = 0x89


class Connection:
    """One client. Frames gather in `send` and leave in one write with `flush`."""

    def __init__(
        self,
        route: str,
        combined: bool,
        transport: asyncio.Transport,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic_s = monotonic_s
        self.route = route  # public, market, private, or "" for the retired un-routed addresses
        self.combined = combined
        self.names: dict[str, None] = {}  # insertion order, as LIST_SUBSCRIPTIONS answers
        self.accounts: dict[str, str] = {}  # listen key -> account, on the private route
        self.events: frozenset[str] = frozenset()  # user events wanted; empty is all
        self.opened_s = self.pong_s = monotonic_s()
        self.mute_until_s = 0.0  # a fault: until then it stays open and tells nothing
        self._transport = transport
        self._pending: list[bytes] = []
        self._received: deque[float] = deque(maxlen=MESSAGES_PER_S_FROM_CLIENT + 1)

    def send(self, frame: bytes) -> None:
        self._pending.append(frame)

    def flush(self) -> None:
        if not self._pending:
            return
        frames, self._pending = self._pending, []
        if self._transport.is_closing() or self._monotonic_s() < self.mute_until_s:
            return
        if self._transport.get_write_buffer_size() > BACKLOG_LIMIT_BYTES:
            log.warning("a stream's reader is too slow and is dropped", route=self.route)
            self._transport.abort()
            return
        self._transport.write(b"".join(frames))

    def too_fast(self, now_s: float) -> bool:
        """Note one message from the client; True when it sent more than ten within a second."""
        self._received.append(now_s)
        full = len(self._received) == self._received.maxlen
        return full and now_s - self._received[0] < 1.0

    def abort(self) -> None:
        self._transport.abort()


class Event:
    """One event, encoded at most once for each of the two forms."""

    __slots__ = ("_combined", "_name", "_payload", "_single")

    def __init__(self, name: str, payload: bytes) -> None:
        self._name = name
        self._payload = payload
        self._single: bytes | None = None
        self._combined: bytes | None = None

    def frame(self, combined: bool) -> bytes:
        if not combined:
            if self._single is None:
                self._single = text_frame(self._payload)
            return self._single
        if self._combined is None:
            name = msgspec.json.encode(self._name)
            self._combined = text_frame(b'{"stream":' + name + b',"data":' + self._payload + b"}")
        return self._combined


class Budget:
    """Messages the machine carries: tokens that refill with wall time, at most a second's worth.

    Closes always pass and may borrow a second's worth; updates of forming candles get what is left.
    """

    def __init__(self, messages_per_s: int, now_s: float) -> None:
        self._per_s = messages_per_s
        self._tokens = float(messages_per_s)
        self._refilled_s = now_s
        self._window_s = now_s
        self._wanted = self._allowed = 0.0
        self._reported = 1.0

    def refill(self, now_s: float) -> None:
        elapsed_s = max(now_s - self._refilled_s, 0.0)
        self._refilled_s = now_s
        self._tokens = min(self._tokens + elapsed_s * self._per_s, float(self._per_s))

    def spend(self, messages: int) -> None:
        self._tokens = max(self._tokens - messages, -float(self._per_s))

    def share(self, wanted: int, now_s: float) -> float:
        """The fraction of `wanted` messages that may go now, 0 to 1."""
        share = min(1.0, max(self._tokens, 0.0) / wanted) if wanted else 1.0
        self._wanted += wanted
        self._allowed += wanted * share
        if now_s - self._window_s >= THINNING_WINDOW_S:
            self._report()
            self._window_s = now_s
            self._wanted = self._allowed = 0.0
        return share

    def _report(self) -> None:
        """Say so once, and again only when it got half as bad again."""
        factor = self._wanted / max(self._allowed, 1.0)
        if factor < self._reported * 1.5 and not (self._reported == 1.0 and factor > THINNING_WORTH_SAYING):
            return
        self._reported = factor
        log.warning(
            "updates of forming candles are thinned, closes are all sent",
            one_in=round(factor, 1),
            stream_messages_per_s=self._per_s,
        )


class Streams:
    """All connections and what they listen to. Calls are made on the loop, none of them awaits."""

    def __init__(self, quotes: Quotes, listen_keys: ListenKeys, messages_per_s: int, now_s: float) -> None:
        self._quotes = quotes
        self._keys = listen_keys
        self._budget = Budget(messages_per_s, now_s)
        self._lower = {symbol.lower(): i for symbol, i in quotes.index.items()}
        self._connections: dict[int, Connection] = {}
        self._listeners: dict[str, dict[int, Connection]] = {}
        self._topics: dict[str, Topic] = {}
        self._candles: dict[str, dict[str, int]] = {}  # timeframe -> stream name -> index
        self._due_s: dict[str, float] = {}
        self._forming_due_s = 0.0
        self._told_ms: dict[str, int] = {}  # kind of stream -> step it last told of
        self._sent_ms: dict[str, int] = {}  # candle stream -> step its forming candle last told of
        self.sent = 0
        self.down_until_s = 0.0  # a fault: until then no connection is accepted

    # Connections and subscriptions

    def open(self, connection: Connection) -> None:
        self._connections[id(connection)] = connection

    def close(self, connection: Connection) -> None:
        self._connections.pop(id(connection), None)
        self.unsubscribe(connection, list(connection.names))

    def subscribe(self, connection: Connection, names: Iterable[str]) -> None:
        """Unknown names and names of another route are remembered and stay silent, as on the venue."""
        for name in names:
            connection.names[name] = None
            if connection.route == "private":
                account = self._keys.account(name)
                if account is None:
                    log.warning("a user stream was opened with an unknown listen key and stays silent")
                else:
                    connection.accounts[name] = account
                continue
            topic = parse_stream(name, self._lower)
            if topic is None or topic.route != connection.route:
                continue
            self._topics[name] = topic
            self._listeners.setdefault(name, {})[id(connection)] = connection
            if topic.timeframe:
                self._candles.setdefault(topic.timeframe, {})[name] = topic.place

    def unsubscribe(self, connection: Connection, names: Iterable[str]) -> None:
        for name in names:
            connection.names.pop(name, None)
            connection.accounts.pop(name, None)
            listeners = self._listeners.get(name)
            if listeners is None:
                continue
            listeners.pop(id(connection), None)
            if not listeners:
                self._forget(name)

    def _forget(self, name: str) -> None:
        del self._listeners[name]
        topic = self._topics.pop(name)
        self._sent_ms.pop(name, None)
        if topic.timeframe:
            del self._candles[topic.timeframe][name]

    def connections(self) -> list[Connection]:
        """Those open now, oldest first."""
        return list(self._connections.values())

    # What the market tells

    def close_candles(self, at_ms: int) -> None:
        """Send x=true for every candle that ends at `at_ms`. Call once for every step."""
        for timeframe, streams in self._candles.items():
            length_ms = TIMEFRAME_MS[timeframe]
            if not streams or at_ms % length_ms:
                continue
            open_ms = at_ms - length_ms
            for name, index in streams.items():
                rows = self._quotes.tape.candles(index, timeframe, open_ms, open_ms, at_ms)
                if len(rows):
                    event = self._quotes.kline_event(index, timeframe, rows[0].tolist(), at_ms, closed=True)
                    self._budget.spend(self._publish(name, event.encode()))

    def push(self, at_ms: int, now_s: float) -> None:
        """Send what is due at this wall time, given the market as of step `at_ms`."""
        if now_s >= self._forming_due_s:
            self._push_forming(at_ms, now_s)
        self._push_others(at_ms, now_s)
        self.flush()

    def _push_forming(self, at_ms: int, now_s: float) -> None:
        self._forming_due_s = now_s + FORMING_EVERY_S
        self._budget.refill(now_s)
        due = [
            (name, index, timeframe)
            for timeframe, streams in self._candles.items()
            for name, index in streams.items()
            if self._sent_ms.get(name) != at_ms
        ]
        if not due:
            return
        wanted = sum(len(self._listeners[name]) for name, _, _ in due)
        share = self._budget.share(wanted, now_s)
        if share < 1.0:
            due.sort(key=lambda stream: self._sent_ms.get(stream[0], 0))  # who waited longest is first
            del due[math.ceil(len(due) * share) :]
        rows: dict[str, list[list[float]]] = {}
        for name, index, timeframe in due:
            if timeframe not in rows:
                rows[timeframe] = self._quotes.tape.forming(timeframe, at_ms).tolist()
            row = rows[timeframe][index]
            if row[4] != row[4]:  # not listed yet
                continue
            event = self._quotes.kline_event(index, timeframe, row, at_ms, closed=False)
            self._sent_ms[name] = at_ms
            self._budget.spend(self._publish(name, event.encode()))

    def _push_others(self, at_ms: int, now_s: float) -> None:
        kinds = {topic.kind for topic in self._topics.values() if not topic.timeframe}
        due = {
            kind for kind in kinds if now_s >= self._due_s.get(kind, 0.0) and self._told_ms.get(kind) != at_ms
        }
        if not due:
            return
        for kind in due:
            self._due_s[kind] = now_s + CADENCE_S[kind]
            self._told_ms[kind] = at_ms
        view = MarketView(self._quotes, at_ms)
        for name, topic in list(self._topics.items()):
            if topic.kind not in due:
                continue
            for data in view.events(topic):
                self._publish(name, msgspec.json.encode(data))

    def _publish(self, name: str, payload: bytes) -> int:
        """Queue one event for all who listen; returns how many."""
        event = Event(name, payload)
        listeners = self._listeners.get(name, {})
        for connection in listeners.values():
            connection.send(event.frame(connection.combined))
        self.sent += len(listeners)
        return len(listeners)

    # What accounts hear

    def user_event(self, account: str, data: dict[str, Any]) -> None:
        payload = msgspec.json.encode(data)
        kind = data.get("e", "")
        for connection in list(self._connections.values()):
            for listen_key, owner in connection.accounts.items():
                if owner == account and (not connection.events or kind in connection.events):
                    connection.send(Event(listen_key, payload).frame(connection.combined))
                    self.sent += 1

    def expire_listen_key(self, listen_key: str, at_ms: int) -> None:
        """Tell whoever hears the key, then never again."""
        data = {"e": "listenKeyExpired", "E": at_ms, "listenKey": listen_key}
        for connection in list(self._connections.values()):
            if connection.accounts.pop(listen_key, None) is not None:
                connection.send(Event(listen_key, msgspec.json.encode(data)).frame(connection.combined))
                connection.flush()

    def drop_listen_key(self, listen_key: str) -> None:
        """The key was closed by its account: silence."""
        for connection in self._connections.values():
            connection.accounts.pop(listen_key, None)

    def flush(self) -> None:
        for connection in list(self._connections.values()):
            connection.flush()

    # Housekeeping

    def maintain(self, now_s: float) -> None:
        """Ping all; drop who does not answer and who is a day old. Call every PING_EVERY_S."""
        ping = text_frame(str(int(now_s * 1000)).encode(), PING_OPCODE)
        for connection in list(self._connections.values()):
            if now_s - connection.pong_s > PONG_LIMIT_S or now_s - connection.opened_s > CONNECTION_LIFE_S:
                connection.abort()
            else:
                connection.send(ping)
                connection.flush()

    def abort_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.abort()

    def statistics(self) -> dict[str, int]:
        return {
            "connections": len(self._connections),
            "streams": sum(len(listeners) for listeners in self._listeners.values()),
            "sent": self.sent,
        }


class MarketView:
    """Ticker, book, mark price and trade events of one step; arrays are read once, and only if needed."""

    def __init__(self, quotes: Quotes, at_ms: int) -> None:
        self._quotes = quotes
        self._at_ms = at_ms
        self._day: list[list[float]] | None = None
        self._last: list[float] = quotes.tape.last_prices(at_ms).tolist()
        self._mark: list[float] | None = None

    def events(self, topic: Topic) -> list[Any]:
        """The events of one stream: one object, one array, or for !bookTicker one object a symbol."""
        everything = [i for i, price in enumerate(self._last) if price == price]
        match topic.kind:
            case "!miniTicker@arr":
                return [[self._mini(i) for i in everything]]
            case "!ticker@arr":
                return [[self._ticker(i) for i in everything]]
            case "!markPrice@arr" | "!markPrice@arr@1s":
                return [[self._mark_price(i) for i in everything]]
            case "!bookTicker":
                return [self._book(i) for i in everything]
        if self._last[topic.place] != self._last[topic.place]:
            return []
        build: dict[str, Callable[[int], dict[str, Any]]] = {
            "miniTicker": self._mini,
            "ticker": self._ticker,
            "markPrice": self._mark_price,
            "markPrice@1s": self._mark_price,
            "bookTicker": self._book,
            "aggTrade": self._trade,
        }
        return [build[topic.kind](topic.place)]

    def _row(self, index: int) -> list[float]:
        if self._day is None:
            self._day = self._quotes.day_rows(self._at_ms)
        return self._day[index]

    def _mini(self, index: int) -> dict[str, Any]:
        grid = self._quotes.grids[index]
        opened, high, low, last, base, quote = self._row(index)
        return {
            "e": "24hrMiniTicker",
            "E": self._at_ms,
            "s": grid.symbol,
            "c": grid.price(last),
            "o": grid.price(opened),
            "h": grid.price(high),
            "l": grid.price(low),
            "v": grid.quantity(base),
            "q": f"{quote:.4f}",
            "st": 1,
            "ps": grid.symbol,
        }

    def _ticker(self, index: int) -> dict[str, Any]:
        row = self._quotes.ticker(index, self._row(index), self._at_ms)
        return {
            "e": "24hrTicker",
            "E": self._at_ms,
            "s": row["symbol"],
            "p": row["priceChange"],
            "P": row["priceChangePercent"],
            "w": row["weightedAvgPrice"],
            "c": row["lastPrice"],
            "Q": row["lastQty"],
            "o": row["openPrice"],
            "h": row["highPrice"],
            "l": row["lowPrice"],
            "v": row["volume"],
            "q": row["quoteVolume"],
            "O": row["openTime"],
            "C": row["closeTime"],
            "F": row["firstId"],
            "L": row["lastId"],
            "n": row["count"],
            "st": 1,
            "ps": row["symbol"],
        }

    def _mark_price(self, index: int) -> dict[str, Any]:
        if self._mark is None:
            self._mark = self._quotes.tape.mark_prices(self._at_ms).tolist()
        row = self._quotes.premium(index, self._mark[index], self._at_ms)
        return {
            "e": "markPriceUpdate",
            "E": self._at_ms,
            "s": row["symbol"],
            "p": row["markPrice"],
            "i": row["indexPrice"],
            "P": row["estimatedSettlePrice"],
            "r": row["lastFundingRate"],
            "T": row["nextFundingTime"],
            "st": 1,
            "ps": row["symbol"],
        }

    def _book(self, index: int) -> dict[str, Any]:
        grid = self._quotes.grids[index]
        book = Book(grid, self._last[index], self._quotes.spread_bps)
        return {
            "e": "bookTicker",
            "u": self._at_ms,
            "E": self._at_ms,
            "T": self._at_ms,
            "s": grid.symbol,
            "b": grid.price(book.bid),
            "B": grid.level_quantity(book.bid),
            "a": grid.price(book.ask),
            "A": grid.level_quantity(book.ask),
            "st": 1,
            "ps": grid.symbol,
        }

    def _trade(self, index: int) -> dict[str, Any]:
        grid, last = self._quotes.grids[index], self._last[index]
        number = self._at_ms // STEP_MS
        return {
            "e": "aggTrade",
            "E": self._at_ms,
            "a": number,
            "s": grid.symbol,
            "p": grid.price(last),
            "q": grid.level_quantity(last, AVERAGE_TRADE_QUOTE),
            "f": number,
            "l": number,
            "T": self._at_ms,
            "m": number % 2 == 0,
            "st": 1,
        }


class Sockets:
    """The WebSocket addresses: ws and stream under /public, /market and /private, and the retired ones."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def routes(self) -> list[web.RouteDef]:
        routes = []
        for prefix in ("/public", "/market", "/private", ""):
            for path in (f"{prefix}/ws", f"{prefix}/ws/{{names:.+}}", f"{prefix}/stream"):
                routes.append(web.get(path, self.handle))
        return routes

    async def handle(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False, autoping=False, max_msg_size=1_048_576)
        if time.monotonic() < self._streams.down_until_s:
            return web.Response(status=503, text="Service Unavailable.")
        if not socket.can_prepare(request).ok:
            return web.Response(status=400, text="a WebSocket upgrade is expected here")
        await socket.prepare(request)
        transport = request.transport
        if transport is None:  # gone during the handshake
            return socket
        parts = request.path.split("/")
        route = parts[1] if parts[1] in ("public", "market", "private") else ""
        connection = Connection(route, request.path.endswith("/stream"), transport)
        connection.events = frozenset(filter(None, request.query.get("events", "").split("/")))
        self._streams.open(connection)
        try:
            names = _names_of(request)
            if len(names) > STREAMS_PER_CONNECTION:
                await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"too many streams")
            else:
                self._streams.subscribe(connection, names)
                await self._serve(socket, connection)
        finally:
            self._streams.close(connection)
        return socket

    async def _serve(self, socket: web.WebSocketResponse, connection: Connection) -> None:
        async for message in socket:
            if message.type is WSMsgType.PONG:
                connection.pong_s = time.monotonic()
            elif message.type is WSMsgType.PING:
                await socket.pong(message.data)
            elif connection.too_fast(time.monotonic()):
                await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"Too many requests")
            elif message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                connection.send(text_frame(msgspec.json.encode(self.answer(connection, message.data))))
                if len(connection.names) > STREAMS_PER_CONNECTION:
                    await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"too many streams")
                connection.flush()

    def answer(self, connection: Connection, text: str | bytes) -> dict[str, Any]:
        """The venue's answer to one request of a client."""
        try:
            call = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return _refusal(None, 3, f"Invalid JSON: {error}")
        if not isinstance(call, dict):
            return _refusal(None, 2, "Invalid request: an object is expected")
        number = call.get("id")
        params = call.get("params", [])
        match call.get("method"):
            case "LIST_SUBSCRIPTIONS":
                return {"result": list(connection.names), "id": number}
            case "SUBSCRIBE" | "UNSUBSCRIBE" as method:
                if not (isinstance(params, list) and all(isinstance(name, str) for name in params)):
                    return _refusal(number, 2, "Invalid request: params must be an array of strings")
                change = self._streams.subscribe if method == "SUBSCRIBE" else self._streams.unsubscribe
                change(connection, params)
                return {"result": None, "id": number}
            case str() as method:
                return _refusal(number, 2, f"Invalid request: unknown method {method}")
            case _:
                return _refusal(number, 2, "Invalid request: method must be provided as string")


def _refusal(number: object, code: int, text: str) -> dict[str, Any]:
    return {"error": {"code": code, "msg": text}, "id": number}


def _names_of(request: web.Request) -> list[str]:
    """Streams, or listen keys, that the address itself names."""
    raw_path, _, raw_query = request.raw_path.partition("?")
    names: list[str] = []
    if "/ws/" in raw_path:
        names += raw_path.split("/ws/", 1)[1].split("/")
    for part in raw_query.split("&"):
        key, _, value = part.partition("=")
        if key in ("streams", "listenKey"):
            names += unquote(value).split("/")
    # ccxt numbers its connections (/market/ws/0); such a name means nothing and is skipped.
    return [name for name in map(unquote, names) if name and not name.isdecimal()]
