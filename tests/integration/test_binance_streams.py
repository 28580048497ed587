"""The streams against a WebSocket server on loopback that misbehaves as told."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import count

import pytest
from aiohttp import WSMsgType, web

from service.clock import ManualClock, WallClock
from service.errors import VenueCredentials
from service.exchange.binance import streams
from service.exchange.binance.adapter import BinanceExchange, open_binance
from service.ports import UserEvent
from service.records import CandleUpdate, Order
from service.settings import ExchangeSettings

LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(streams, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(streams, "REQUEST_GAP_S", 0.0)


class FakeStreams:
    """Acknowledges what it is asked, remembers it, and sends what the test sends."""

    def __init__(self) -> None:
        self.sockets: list[web.WebSocketResponse] = []
        self.paths: list[str] = []
        self.subscribed: list[list[str]] = []
        self.acknowledge = True
        self.refuse_with = 0
        self.keys = count(1)
        self.kept: list[str] = []
        self.keep_status = 200
        self.changed = asyncio.Event()
        self.url = ""

    async def reached(self, sockets: int) -> web.WebSocketResponse:
        """Wait until this many connections have been made and, on /market, subscribed."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.sockets) < sockets or (
                self.paths[-1].startswith("/market") and len(self.subscribed) < sockets
            ):
                self.changed.clear()
                await self.changed.wait()
        return self.sockets[sockets - 1]

    async def socket(self, request: web.Request) -> web.StreamResponse:
        if self.refuse_with:
            return web.Response(status=self.refuse_with)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.paths.append(request.path_qs)
        self.sockets.append(socket)
        self.changed.set()
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                call = json.loads(message.data)
                self.subscribed.append(call["params"])
                if self.acknowledge:
                    await socket.send_json({"result": None, "id": call["id"]})
                self.changed.set()
        return socket

    async def key(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            return web.json_response({"listenKey": f"key-{next(self.keys)}"})
        self.kept.append(request.method)
        self.changed.set()
        if self.keep_status != 200:
            return web.json_response({"code": -1125, "msg": "no such key"}, status=self.keep_status)
        return web.json_response({})


@pytest.fixture
async def venue() -> AsyncIterator[FakeStreams]:
    fake = FakeStreams()
    app = web.Application()
    app.router.add_get("/market/stream", fake.socket)
    app.router.add_get("/private/ws", fake.socket)
    app.router.add_route("*", "/fapi/v1/listenKey", fake.key)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


@pytest.fixture
async def exchange(venue: FakeStreams) -> AsyncIterator[BinanceExchange]:
    async with opened(venue) as found:
        yield found


def opened(venue: FakeStreams, **settings: float):  # type: ignore[no-untyped-def]
    return open_binance(
        ExchangeSettings(rest_url=f"http://{venue.url}", stream_url=f"ws://{venue.url}", **settings),  # type: ignore[arg-type]
        WallClock(),
        api_key="k",
        api_secret="s",
    )


def kline(symbol: str = "BTCUSDT", close: str = "11", *, closed: bool = False) -> dict[str, object]:
    candle = {"t": 300_000, "i": "5m", "o": "10", "h": "12", "l": "9", "c": close, "v": "5", "x": closed}
    return {"stream": "x", "data": {"e": "kline", "E": 300_001, "s": symbol, "k": candle}}


class Candles:
    """Collects updates and gaps, and lets a test await them."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[CandleUpdate] = asyncio.Queue(100)
        self.gaps: asyncio.Queue[Sequence[str]] = asyncio.Queue(100)

    async def update(self) -> CandleUpdate:
        async with asyncio.timeout(LIMIT_S):
            return await self.updates.get()

    async def gap(self) -> Sequence[str]:
        async with asyncio.timeout(LIMIT_S):
            return await self.gaps.get()

    def stream(self, exchange: BinanceExchange, symbols: Sequence[str] = ("BTCUSDT",)):  # type: ignore[no-untyped-def]
        return exchange.candle_stream(symbols, "5m", self.updates.put_nowait, self.gaps.put_nowait)


async def test_updates_are_delivered_once_the_block_is_entered(venue: FakeStreams, exchange: BinanceExchange):
    candles = Candles()
    async with candles.stream(exchange):
        await venue.sockets[0].send_json(kline(closed=True))
        update = await candles.update()
    assert venue.subscribed == [["btcusdt@kline_5m"]]
    assert (update.symbol, update.close, update.closed, update.open_ms) == ("BTCUSDT", 11.0, True, 300_000)
    assert candles.gaps.empty()


async def test_symbols_are_split_over_connections_and_requests(venue: FakeStreams):
    symbols = [f"S{n}USDT" for n in range(250)]
    candles = Candles()
    async with opened(venue, streams_per_connection=120) as exchange, candles.stream(exchange, symbols):
        pass
    assert len(venue.sockets) == 3
    assert sorted(map(len, venue.subscribed)) == [10, 20, 20, 100, 100]
    assert {name for names in venue.subscribed for name in names} == {
        f"{s.lower()}@kline_5m" for s in symbols
    }


async def test_a_lost_connection_is_made_again_and_reported_as_a_gap(
    venue: FakeStreams, exchange: BinanceExchange
):
    candles = Candles()
    async with candles.stream(exchange):
        await venue.sockets[0].close()
        assert list(await candles.gap()) == ["BTCUSDT"]
        await (await venue.reached(2)).send_json(kline(close="10.5"))
        assert (await candles.update()).close == 10.5


async def test_a_silent_connection_is_made_again(venue: FakeStreams):
    candles = Candles()
    async with opened(venue, silence_limit_s=0.05) as exchange, candles.stream(exchange):
        await candles.gap()
        assert len(venue.sockets) >= 2


async def test_a_renewal_overlaps_and_is_no_gap(venue: FakeStreams):
    candles = Candles()
    async with opened(venue, renew_after_s=0.2) as exchange, candles.stream(exchange):
        second = await venue.reached(2)
        await second.send_json(kline(close="10.5"))
        assert (await candles.update()).close == 10.5
        assert candles.gaps.empty()


async def test_messages_that_cannot_be_decoded_do_not_stop_the_stream(
    venue: FakeStreams, exchange: BinanceExchange
):
    candles = Candles()
    async with candles.stream(exchange):
        socket = venue.sockets[0]
        for body in ("{", "[]", '{"data":{"e":"kline","k":{"t":"x"}}}', '{"data":5}', "\x00"):
            await socket.send_str(body)
        await socket.send_json(kline(close="99"))  # above its own high
        await socket.send_bytes(b"\x00\x01")
        await socket.send_json({"stream": "!contractInfo", "data": {"e": "contractInfo", "s": "A"}})
        await socket.send_json(kline(close="10.5"))
        assert (await candles.update()).close == 10.5
        assert len(venue.sockets) == 1


async def test_an_unacknowledged_subscription_is_tried_again(
    venue: FakeStreams, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "ANSWER_LIMIT_S", 0.05)
    venue.acknowledge = False
    candles = Candles()
    async with opened(venue, request_limit_s=0.3) as exchange, candles.stream(exchange):
        venue.acknowledge = True
        assert list(await candles.gap()) == ["BTCUSDT"]  # it began without a subscription


async def test_a_stream_that_opens_late_reports_a_gap(venue: FakeStreams):
    venue.refuse_with = 503
    candles = Candles()
    async with opened(venue, request_limit_s=0.1) as exchange, candles.stream(exchange):
        venue.refuse_with = 0
        await candles.gap()


async def test_a_fault_of_the_callback_ends_the_block_by_its_own_name(
    venue: FakeStreams, exchange: BinanceExchange
):
    def broken(update: CandleUpdate) -> None:
        raise LookupError("no such row")

    async def follow() -> None:
        async with exchange.candle_stream(["BTCUSDT"], "5m", broken, lambda symbols: None):
            await venue.sockets[0].send_json(kline())
            await asyncio.Event().wait()

    with pytest.raises(LookupError, match="no such row"):
        await follow()


async def test_an_error_of_the_block_itself_keeps_its_name(exchange: BinanceExchange):
    with pytest.raises(LookupError):
        async with Candles().stream(exchange):
            raise LookupError


async def test_pings_are_answered(venue: FakeStreams, exchange: BinanceExchange):
    candles = Candles()
    async with candles.stream(exchange):
        await venue.sockets[0].ping(b"are you there")
        await venue.sockets[0].send_json(kline())
        await candles.update()
        assert not venue.sockets[0].closed


ORDER_EVENT = {
    "e": "ORDER_TRADE_UPDATE",
    "T": 5,
    "E": 5,
    "o": {
        "s": "BTCUSDT", "c": "entry-1", "S": "BUY", "o": "MARKET", "q": "1", "x": "NEW", "X": "NEW", "i": 5,
        "l": "0", "z": "0", "L": "0", "T": 5,
    },
}  # fmt: skip


async def test_the_private_stream_delivers_events_under_its_key(
    venue: FakeStreams, exchange: BinanceExchange
):
    events: asyncio.Queue[UserEvent] = asyncio.Queue(10)
    async with exchange.user_stream(events.put_nowait, lambda: pytest.fail("a gap")):
        await venue.sockets[0].send_json(ORDER_EVENT)
        async with asyncio.timeout(LIMIT_S):
            order = await events.get()
    assert isinstance(order, Order)
    assert order.client_order_id == "entry-1"
    assert venue.paths == ["/private/ws?listenKey=key-1"]
    assert venue.kept == []  # and above all no DELETE on the way out


async def test_a_private_stream_without_keys_is_refused_at_once(venue: FakeStreams):
    settings = ExchangeSettings(rest_url=f"http://{venue.url}", stream_url=f"ws://{venue.url}")
    async with open_binance(settings, WallClock()) as exchange:
        with pytest.raises(VenueCredentials, match="listenKey"):
            async with exchange.user_stream(lambda event: None, lambda: None):
                pytest.fail("entered")


async def test_an_expired_key_is_replaced_and_reported_as_a_gap(
    venue: FakeStreams, exchange: BinanceExchange
):
    gap = asyncio.Event()
    async with exchange.user_stream(lambda event: None, gap.set):
        await venue.sockets[0].send_json({"e": "listenKeyExpired", "E": 1, "listenKey": "key-1"})
        async with asyncio.timeout(LIMIT_S):
            await gap.wait()
        await venue.reached(2)
    assert venue.paths[1] == "/private/ws?listenKey=key-2"


async def test_the_key_is_kept_alive_and_replaced_when_the_venue_forgot_it(venue: FakeStreams):
    clock = ManualClock(0)
    gap = asyncio.Event()
    settings = ExchangeSettings(rest_url=f"http://{venue.url}", stream_url=f"ws://{venue.url}")
    async with open_binance(settings, clock, api_key="k", api_secret="s") as exchange:
        async with exchange.user_stream(lambda event: None, gap.set):
            venue.keep_status = 400
            clock.advance_to(int(streams.KEEP_ALIVE_S * 1000))
            async with asyncio.timeout(LIMIT_S):
                await gap.wait()
            await venue.reached(2)
    assert venue.kept == ["PUT"]
    assert venue.paths[1] == "/private/ws?listenKey=key-2"


async def test_a_lost_private_stream_is_a_gap_before_the_next_one_is_open(
    venue: FakeStreams, exchange: BinanceExchange
):
    gaps: asyncio.Queue[int] = asyncio.Queue()
    async with (
        opened(venue) as exchange,
        exchange.user_stream(lambda event: None, lambda: gaps.put_nowait(1)),
    ):
        venue.refuse_with = 503
        await venue.sockets[0].close()
        async with asyncio.timeout(LIMIT_S):
            await gaps.get()
        assert len(venue.sockets) == 1


async def test_a_private_stream_that_delivers_nothing_is_a_fault_and_made_again(venue: FakeStreams):
    """The venue takes the key and an order, and says nothing of it."""
    gap = asyncio.Event()
    async with opened(venue, request_limit_s=0.05) as exchange:
        async with exchange.user_stream(lambda event: None, gap.set):
            assert exchange._private is not None
            exchange._private.expect(exchange._clock.monotonic_s())
            async with asyncio.timeout(LIMIT_S):
                await gap.wait()
            await venue.reached(2)


async def test_a_private_stream_that_told_of_the_order_is_left_alone(venue: FakeStreams):
    events: asyncio.Queue[UserEvent] = asyncio.Queue(10)
    async with opened(venue, request_limit_s=0.05) as exchange:
        async with exchange.user_stream(events.put_nowait, lambda: pytest.fail("a gap")):
            began_s = exchange._clock.monotonic_s()
            await venue.sockets[0].send_json(ORDER_EVENT)
            async with asyncio.timeout(LIMIT_S):
                await events.get()
            assert exchange._private is not None
            exchange._private.expect(began_s)
            await asyncio.sleep(0.1)
            assert len(venue.sockets) == 1


async def test_the_private_stream_is_renewed_with_an_overlap_and_without_a_gap(venue: FakeStreams):
    events: asyncio.Queue[UserEvent] = asyncio.Queue(10)
    async with opened(venue, renew_after_s=0.4) as exchange:
        async with exchange.user_stream(events.put_nowait, lambda: pytest.fail("a gap")):
            second = await venue.reached(2)
            await second.send_json(ORDER_EVENT)
            async with asyncio.timeout(LIMIT_S):
                assert isinstance(await events.get(), Order)
