"""The REST client against a small server on loopback that answers as it is told."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from urllib.parse import parse_qsl

import msgspec
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from service.clock import ManualClock, WallClock
from service.errors import (
    OrderOutcomeUnknown,
    OrderRejected,
    RequestRejected,
    VenueCredentials,
    VenueMalformed,
    VenueRestricted,
    VenueThrottled,
    VenueUnavailable,
)
from service.exchange.binance import rest
from service.exchange.binance.adapter import BinanceExchange, open_binance
from service.exchange.gate import OPEN, Gate
from service.records import Order, OrderPurpose, OrderRequest, OrderStatus, OrderType, Side
from service.settings import ExchangeSettings

KEY, SECRET = "the-key", "the-secret"
Answer = web.Response | Callable[[web.Request], web.Response]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "FIRST_PAUSE_S", 0.001)


class FakeVenue:
    """Answers each endpoint with the next of its prepared answers; the last one stays."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []
        self.clock_ahead_ms = 0
        self._answers: dict[str, list[Answer]] = {}
        self.url = ""

    def prepare(self, endpoint: str, *answers: Answer) -> None:
        self._answers[endpoint] = list(answers)

    def asked(self, endpoint: str) -> list[dict[str, str]]:
        """The parameters of each request of an endpoint."""
        return [
            dict(parse_qsl(request.query_string))
            for request in self.requests
            if f"{request.method} {request.path}" == endpoint
        ]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        answers = self._answers.get(f"{request.method} {request.path}")
        if answers is None and request.path == "/fapi/v1/time":
            return web.json_response({"serverTime": WallClock().now_ms() + self.clock_ahead_ms})
        if answers is None:
            return web.json_response({"code": -1, "msg": "not prepared"}, status=400)
        prepared = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(prepared, web.Response):
            return web.Response(body=prepared.body, status=prepared.status, headers=prepared.headers)
        return prepared(request)  # type: ignore[arg-type]


@pytest.fixture
async def venue() -> AsyncIterator[FakeVenue]:
    fake = FakeVenue()
    runner = web.ServerRunner(web.Server(fake.answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


@asynccontextmanager
async def opened(
    venue: FakeVenue, *, keys: bool = True, limit_s: float = 5.0, gate: Gate = OPEN
) -> AsyncIterator[BinanceExchange]:
    settings = ExchangeSettings(rest_url=venue.url, request_limit_s=limit_s)
    key, secret = (KEY, SECRET) if keys else ("", "")
    async with open_binance(settings, WallClock(), api_key=key, api_secret=secret, gate=gate) as exchange:
        yield exchange


def refusal(code: int, text: str = "no", status: int = 400) -> web.Response:
    return web.json_response({"code": code, "msg": text}, status=status)


def hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def order_answer(status: str = "NEW") -> web.Response:
    return web.json_response(
        {
            "orderId": 5,
            "symbol": "BTCUSDT",
            "clientOrderId": "entry-1",
            "status": status,
            "side": "BUY",
            "type": "MARKET",
            "origQty": "1",
            "executedQty": "0",
            "updateTime": 9,
        }
    )


ENTRY = OrderRequest(
    client_order_id="entry-1",
    symbol="BTCUSDT",
    side=Side.BUY,
    type=OrderType.MARKET,
    purpose=OrderPurpose.ENTRY,
    position_id="p-1",
    quantity=Decimal("1.50"),
)
STOP = OrderRequest(
    client_order_id="stop-1",
    symbol="BTCUSDT",
    side=Side.SELL,
    type=OrderType.STOP_MARKET,
    purpose=OrderPurpose.STOP,
    position_id="p-1",
    trigger_price=Decimal("99.5"),
    close_position=True,
)
PLACE = "POST /fapi/v1/order"


def known(kind: OrderType = OrderType.MARKET) -> Order:
    return Order(
        client_order_id="entry-1",
        venue_order_id="5",
        position_id="p-1",
        symbol="BTCUSDT",
        side=Side.BUY,
        type=kind,
        purpose=OrderPurpose.ENTRY,
        status=OrderStatus.OPEN,
        quantity=Decimal(1),
        filled_quantity=Decimal(0),
        average_price=Decimal(0),
        trigger_price=Decimal(0),
        reason="",
        created_ms=0,
        updated_ms=0,
    )


async def test_an_order_is_signed_over_the_very_text_that_is_sent(venue: FakeVenue):
    venue.prepare(PLACE, order_answer())
    request = OrderRequest(
        client_order_id="entry-1",
        symbol="币安人生USDT",
        side=Side.BUY,
        type=OrderType.MARKET,
        purpose=OrderPurpose.ENTRY,
        position_id="p",
        quantity=Decimal("1E+2"),
    )
    async with opened(venue) as exchange:
        order = await exchange.place(request)
    sent = venue.requests[-1]
    text, _, given = sent.rel_url.raw_query_string.rpartition("&signature=")
    assert hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest() == given
    (asked,) = venue.asked(PLACE)
    assert (asked["symbol"], asked["quantity"]) == ("币安人生USDT", "100")
    assert sent.headers["X-MBX-APIKEY"] == KEY
    assert (order.status, order.venue_order_id, order.position_id) == (OrderStatus.OPEN, "5", "p")


async def test_a_stop_goes_to_the_algo_endpoint_with_a_trigger_price(venue: FakeVenue):
    answer = {"algoId": 8, "clientAlgoId": "stop-1", "symbol": "BTCUSDT", "side": "SELL", "createTime": 4}
    venue.prepare("POST /fapi/v1/algoOrder", web.json_response(answer | {"orderType": "STOP_MARKET"}))
    async with opened(venue) as exchange:
        order = await exchange.place(STOP)
    (asked,) = venue.asked("POST /fapi/v1/algoOrder")
    assert asked["triggerPrice"] == "99.5"
    assert asked["closePosition"] == "true"
    assert asked["workingType"] == "MARK_PRICE"
    assert not asked.keys() & {"quantity", "reduceOnly", "stopPrice"}
    assert (order.venue_order_id, order.trigger_price, order.status) == (
        "8",
        Decimal("99.5"),
        OrderStatus.OPEN,
    )


@pytest.mark.parametrize(
    "answer",
    [
        hang_up,
        refusal(-1007, status=408),
        refusal(-1006),
        refusal(-4116),
        web.Response(status=502, text="<html>bad gateway</html>"),
        web.Response(status=503, text="Unknown error, please check your request or try again later."),
        web.Response(status=200, text="<html>"),
        web.Response(status=200, text='{"orderId":5}'),
    ],
)
async def test_an_order_without_a_usable_answer_is_unknown_and_sent_once(venue: FakeVenue, answer: Answer):
    venue.prepare(PLACE, answer)
    async with opened(venue) as exchange:
        with pytest.raises(OrderOutcomeUnknown) as raised:
            await exchange.place(ENTRY)
    assert len(venue.asked(PLACE)) == 1
    assert SECRET not in str(raised.value)
    assert "signature" not in str(raised.value)


async def test_an_order_that_is_not_answered_in_time_is_unknown(venue: FakeVenue):
    release = asyncio.Event()

    async def silent(request: web.BaseRequest) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async with opened(venue, limit_s=0.1) as exchange:
        venue.answer = silent  # type: ignore[method-assign]
        runner = web.ServerRunner(web.Server(silent))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        exchange._rest._base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        with pytest.raises(OrderOutcomeUnknown):
            await exchange.place(ENTRY)
        release.set()
        await runner.cleanup()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refusal(-2019, "Margin is insufficient."), OrderRejected),
        (refusal(-2021), OrderRejected),
        (refusal(-1008, status=503), VenueUnavailable),
        (web.Response(status=503, text="Service Unavailable."), VenueUnavailable),
        (web.Response(status=200, text='{"code":-2019,"msg":"no"}'), OrderRejected),
        (refusal(-2015, status=401), VenueCredentials),
        (web.Response(status=451, text="restricted location"), VenueRestricted),
        (refusal(-1015, status=429), VenueThrottled),
    ],
)
async def test_a_refused_order_says_so_and_is_sent_once(
    venue: FakeVenue, answer: Answer, error: type[Exception]
):
    venue.prepare(PLACE, answer)
    async with opened(venue) as exchange:
        with pytest.raises(error) as raised:
            await exchange.place(ENTRY)
    assert type(raised.value) is error
    assert len(venue.asked(PLACE)) == 1


async def test_an_order_that_cannot_be_sent_is_unavailable_not_unknown(venue: FakeVenue):
    async with opened(venue) as exchange:
        exchange._rest._base = "http://127.0.0.1:1"
        with pytest.raises(VenueUnavailable, match="the venue was not reached"):
            await exchange.place(ENTRY)


@pytest.mark.parametrize("code", [-1021, -5028])
async def test_a_refused_timestamp_is_corrected_and_signed_again_once(venue: FakeVenue, code: int):
    venue.prepare(PLACE, refusal(code), order_answer())
    async with opened(venue) as exchange:
        venue.clock_ahead_ms = 90_000
        await exchange.place(ENTRY)
    first, second = venue.asked(PLACE)
    assert int(second["timestamp"]) - int(first["timestamp"]) > 80_000


async def test_a_timestamp_refused_twice_is_an_error(venue: FakeVenue):
    venue.prepare(PLACE, refusal(-1021))
    async with opened(venue) as exchange:
        with pytest.raises(Exception, match="-1021"):
            await exchange.place(ENTRY)
    assert len(venue.asked(PLACE)) == 2


async def test_the_venues_clock_is_adopted_at_the_start(venue: FakeVenue):
    venue.clock_ahead_ms = -3_600_000
    clock = WallClock()
    async with open_binance(ExchangeSettings(rest_url=venue.url), clock):
        assert clock.offset_ms == pytest.approx(-3_600_000, abs=5_000)


async def test_a_failed_read_is_repeated(venue: FakeVenue):
    venue.prepare("GET /fapi/v1/ticker/24hr", web.Response(status=502), hang_up, web.json_response([]))
    async with opened(venue) as exchange:
        assert await exchange.tickers() == []
    assert len(venue.asked("GET /fapi/v1/ticker/24hr")) == 3


async def test_a_read_that_keeps_failing_is_unavailable(venue: FakeVenue):
    venue.prepare("GET /fapi/v1/ticker/24hr", web.Response(status=502))
    async with opened(venue) as exchange:
        with pytest.raises(VenueUnavailable, match="/fapi/v1/ticker/24hr"):
            await exchange.tickers()
    assert len(venue.asked("GET /fapi/v1/ticker/24hr")) == rest.READ_ATTEMPTS


async def test_a_malformed_read_is_asked_once_more_and_then_malformed(venue: FakeVenue):
    venue.prepare("GET /fapi/v1/klines", web.Response(text="<html>"))
    async with opened(venue) as exchange:
        with pytest.raises(VenueMalformed, match="klines"):
            await exchange.candles("BTCUSDT", "5m", limit=5)
    assert len(venue.asked("GET /fapi/v1/klines")) == 2


async def test_no_exchange_at_the_address_is_unavailable():
    async with open_binance(ExchangeSettings(rest_url="http://127.0.0.1:1"), WallClock()) as exchange:
        with pytest.raises(VenueUnavailable, match="exchangeInfo"):
            await exchange.instruments()


async def test_a_place_that_is_not_served_ends_the_opening(venue: FakeVenue):
    venue.prepare("GET /fapi/v1/time", web.Response(status=451, text="restricted"))
    with pytest.raises(VenueRestricted, match="451"):
        async with opened(venue):
            pytest.fail("opened")


async def test_without_keys_private_calls_say_what_is_missing_and_send_nothing(venue: FakeVenue):
    async with opened(venue, keys=False) as exchange:
        with pytest.raises(VenueCredentials, match="key and secret"):
            await exchange.account()
        with pytest.raises(VenueCredentials):
            await exchange.place(ENTRY)
    assert venue.asked(PLACE) == []


async def test_after_a_ban_nothing_is_sent(venue: FakeVenue):
    until_ms = WallClock().now_ms() + 3_600_000
    venue.prepare(PLACE, refusal(-1003, f"IP banned until {until_ms}.", 418))
    async with opened(venue) as exchange:
        with pytest.raises(VenueThrottled):
            await exchange.place(ENTRY)
        sent = len(venue.requests)
        with pytest.raises(VenueThrottled) as raised:
            await exchange.tickers()
        with pytest.raises(VenueThrottled):
            await exchange.place(ENTRY)
    assert raised.value.retry_at_ms == until_ms
    assert len(venue.requests) == sent


async def test_the_used_weight_is_read_from_the_headers(venue: FakeVenue):
    headers = {"X-MBX-USED-WEIGHT-1M": "1234"}
    venue.prepare("GET /fapi/v1/premiumIndex", web.json_response([], headers=headers))
    async with opened(venue) as exchange:
        await exchange.mark_prices()
        assert exchange.used_weight >= 1234 or exchange.used_weight < 20  # a minute may have begun


@pytest.mark.parametrize("kind", [OrderType.MARKET, OrderType.STOP_MARKET])
@pytest.mark.parametrize("code", [-2011, -2013])
async def test_cancelling_or_asking_for_an_order_the_venue_forgot_is_no_error(
    venue: FakeVenue, kind: OrderType, code: int
):
    path = "/fapi/v1/algoOrder" if kind.conditional else "/fapi/v1/order"
    venue.prepare(f"DELETE {path}", refusal(code))
    venue.prepare(f"GET {path}", refusal(code))
    async with opened(venue) as exchange:
        await exchange.cancel(known(kind))
        assert await exchange.order(known(kind)) is None
    assert len(venue.asked(f"DELETE {path}")) == 1


async def test_the_margin_type_that_is_set_already_is_no_error_and_nothing_is_set_twice(venue: FakeVenue):
    venue.prepare("POST /fapi/v1/marginType", refusal(-4046))
    venue.prepare("POST /fapi/v1/leverage", web.json_response({"leverage": 5, "symbol": "BTCUSDT"}))
    async with opened(venue) as exchange:
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        await exchange.set_leverage("BTCUSDT", 7, "ISOLATED")
    assert [asked["leverage"] for asked in venue.asked("POST /fapi/v1/leverage")] == ["5", "7"]
    assert len(venue.asked("POST /fapi/v1/marginType")) == 1


@pytest.mark.parametrize("code", [-4047, -4048])
async def test_a_margin_type_that_cannot_change_now_is_told_and_the_leverage_set(venue: FakeVenue, code: int):
    venue.prepare("POST /fapi/v1/marginType", refusal(code), refusal(-4046))
    venue.prepare("POST /fapi/v1/leverage", web.json_response({"leverage": 5}))
    async with opened(venue) as exchange:
        with capture_logs() as told:
            await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        assert [(line["log_level"], line["event"]) for line in told] == [
            ("warning", "margin type stays as it is")
        ]
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
    assert len(venue.asked("POST /fapi/v1/marginType")) == 2  # not known to be set
    assert len(venue.asked("POST /fapi/v1/leverage")) == 1


async def test_a_refused_leverage_is_not_remembered_as_set(venue: FakeVenue):
    venue.prepare("POST /fapi/v1/marginType", web.json_response({"code": 200, "msg": "success"}))
    venue.prepare("POST /fapi/v1/leverage", refusal(-4028), web.json_response({"leverage": 5}))
    async with opened(venue) as exchange:
        with pytest.raises(RequestRejected):
            await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
    assert len(venue.asked("POST /fapi/v1/leverage")) == 2


@pytest.mark.parametrize(
    ("dual", "multi", "words"), [("true", "false", "hedge mode"), (False, True, "multi-assets mode")]
)
async def test_an_account_in_another_mode_is_refused_with_what_to_do(
    venue: FakeVenue, dual: object, multi: object, words: str
):
    venue.prepare("GET /fapi/v1/positionSide/dual", web.json_response({"dualSidePosition": dual}))
    venue.prepare("GET /fapi/v1/multiAssetsMargin", web.json_response({"multiAssetsMargin": multi}))
    async with opened(venue) as exchange:
        with pytest.raises(RequestRejected, match=words):
            await exchange.prepare(["BTCUSDT"], "ISOLATED")


async def test_the_order_counts_are_read_from_the_headers(venue: FakeVenue):
    headers = {"X-MBX-ORDER-COUNT-10S": "9999", "X-MBX-ORDER-COUNT-1M": "9999"}
    answered = order_answer()
    answered.headers.update(headers)
    venue.prepare(PLACE, answered)
    settings, clock = ExchangeSettings(rest_url=venue.url), ManualClock(65_000)
    async with open_binance(settings, clock, api_key=KEY, api_secret=SECRET) as exchange:
        await exchange.place(ENTRY)
        with pytest.raises(VenueThrottled, match="kept for exits"):
            await exchange.place(ENTRY)
    assert len(venue.asked(PLACE)) == 1


async def test_a_stop_is_still_sent_when_reads_are_throttled_and_nothing_when_banned(venue: FakeVenue):
    answer = {"algoId": 8, "clientAlgoId": "stop-1", "symbol": "BTCUSDT", "side": "SELL", "createTime": 4}
    venue.prepare("POST /fapi/v1/algoOrder", web.json_response(answer))
    venue.prepare(PLACE, refusal(-1003, "Too many requests", 429))
    async with opened(venue) as exchange:
        with pytest.raises(VenueThrottled):
            await exchange.place(ENTRY)
        with pytest.raises(VenueThrottled):
            await exchange.place(ENTRY)
        await exchange.place(STOP)
        venue.prepare("POST /fapi/v1/algoOrder", refusal(-1003, "banned", 418))
        for _ in range(2):
            with pytest.raises(VenueThrottled):
                await exchange.place(STOP)
    assert len(venue.asked(PLACE)) == 1
    assert len(venue.asked("POST /fapi/v1/algoOrder")) == 2


async def test_nothing_that_changes_the_account_is_sent_without_the_lease(venue: FakeVenue):
    lease = "b took the lease over"
    resting = Order(
        client_order_id="stop-1",
        venue_order_id="5",
        position_id="p-1",
        symbol="BTCUSDT",
        side=Side.SELL,
        type=OrderType.STOP_MARKET,
        purpose=OrderPurpose.STOP,
        status=OrderStatus.OPEN,
        quantity=Decimal(1),
        filled_quantity=Decimal(0),
        average_price=Decimal(0),
        trigger_price=Decimal(1),
        reason="",
        created_ms=1,
        updated_ms=1,
    )
    venue.prepare("GET /fapi/v1/openOrders", web.json_response([]))
    venue.prepare("GET /fapi/v1/openAlgoOrders", web.json_response([]))
    async with opened(venue, gate=Gate(may_send=lambda: lease)) as exchange:
        for attempt in (
            exchange.place(ENTRY),
            exchange.cancel(resting),
            exchange.set_leverage("BTCUSDT", 3, "ISOLATED"),
        ):
            with pytest.raises(VenueUnavailable, match="nothing was sent: b took the lease over"):
                await attempt
        assert await exchange.open_orders() == [], "reading is free to all"
        assert {request.method for request in venue.requests} == {"GET"}
        lease = ""
        venue.prepare("POST /fapi/v1/order", order_answer())
        assert (await exchange.place(ENTRY)).client_order_id == "entry-1"


async def test_an_entry_that_waits_to_leave_stays_when_the_kill_switch_trips(venue: FakeVenue):
    halted = ""
    gate = Gate()
    gate.may_open = lambda: halted
    venue.prepare(PLACE, refusal(-1021), order_answer())
    async with opened(venue, gate=gate) as exchange:
        budget = exchange._rest.budget
        take = budget.take

        async def tripped_meanwhile(*words: object, **more: object) -> None:
            nonlocal halted
            await take(*words, **more)
            halted = "kill switch flatten" if venue.asked(PLACE) else ""

        budget.take = tripped_meanwhile  # type: ignore[method-assign]
        with pytest.raises(VenueUnavailable, match="nothing was sent: kill switch flatten"):
            await exchange.place(ENTRY)
        assert len(venue.asked(PLACE)) == 1, "what was refused for its time is not signed again"
        exit_ = msgspec.structs.replace(ENTRY, client_order_id="exit-1", purpose=OrderPurpose.EXIT)
        await exchange.place(exit_)
        assert len(venue.asked(PLACE)) == 2


async def test_a_ban_is_told_to_who_keeps_it_and_one_of_before_the_restart_is_sat_out(venue: FakeVenue):
    told: list[tuple[str, int]] = []
    banned = web.json_response({"code": -1003, "msg": "banned"}, status=418, headers={"Retry-After": "900"})
    venue.prepare("GET /fapi/v1/premiumIndex", banned)
    gate = Gate(silenced=lambda host, until_ms: told.append((host, until_ms)))
    async with opened(venue, gate=gate) as exchange:
        with pytest.raises(VenueThrottled):
            await exchange.mark_prices()
    ((host, until_ms),) = told
    assert f"http://{host}" == venue.url
    assert until_ms > WallClock().now_ms() + 800_000

    venue.requests.clear()
    clock = ManualClock(until_ms - 500_000)
    gate = Gate(silent_until_ms=dict(told).__getitem__)

    async def open_again() -> None:
        async with open_binance(ExchangeSettings(rest_url=venue.url), clock, gate=gate):
            pass

    opening = asyncio.create_task(open_again())
    for _ in range(20):
        await asyncio.sleep(0)
    assert venue.requests == [], "to ask during a ban makes it longer"
    clock.advance_to(until_ms)
    await opening
    assert [request.path for request in venue.requests] == ["/fapi/v1/time"]


async def test_what_is_set_already_is_learned_at_the_start_and_forgotten_when_somebody_changes_it(
    venue: FakeVenue,
):
    venue.prepare("GET /fapi/v1/positionSide/dual", web.json_response({"dualSidePosition": False}))
    venue.prepare("GET /fapi/v1/multiAssetsMargin", web.json_response({"multiAssetsMargin": False}))
    row = {"symbol": "BTCUSDT", "marginType": "ISOLATED", "leverage": 5, "maxNotionalValue": "1"}
    venue.prepare("GET /fapi/v1/symbolConfig", web.json_response([row]))
    venue.prepare("POST /fapi/v1/marginType", refusal(-4046))
    venue.prepare("POST /fapi/v1/leverage", web.json_response({"leverage": 5, "symbol": "BTCUSDT"}))
    set_leverage = "POST /fapi/v1/leverage"
    async with opened(venue) as exchange:
        await exchange.prepare(["BTCUSDT"], "ISOLATED")
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        assert venue.asked(set_leverage) == []
        exchange.setting_changed("BTCUSDT", 5)
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        assert venue.asked(set_leverage) == []
        exchange.setting_changed("BTCUSDT", 20)
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        assert len(venue.asked(set_leverage)) == 1
        exchange.settings_unknown()
        await exchange.set_leverage("BTCUSDT", 5, "ISOLATED")
        assert len(venue.asked(set_leverage)) == 2


async def test_the_venues_clock_is_measured_at_the_start_and_every_hour(venue: FakeVenue):
    clock = ManualClock(0)
    async with open_binance(ExchangeSettings(rest_url=venue.url), clock):
        assert len(venue.asked("GET /fapi/v1/time")) == 1
        for hour in (1, 2):
            await asyncio.sleep(0)
            clock.advance_to(hour * 3_600_000)
            async with asyncio.timeout(5):
                while len(venue.asked("GET /fapi/v1/time")) <= hour:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)


def test_a_clock_that_moved_between_two_measurements_is_told_apart_from_an_offset():
    clock = WallClock()
    clock.correct(90_000)
    assert (clock.offset_ms, clock.moved_ms) == (90_000, 0)
    clock.correct(-7_000)
    assert (clock.offset_ms, clock.moved_ms) == (83_000, -7_000)
