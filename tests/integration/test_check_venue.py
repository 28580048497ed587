"""Each failure that `perpd check` can find at the venue, over real sockets.

A proxy stands before the simulated exchange and answers some paths as the venue does when it refuses.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from service.check import venue as venue_checks
from service.check.command import _bans as kept_bans
from service.check.command import _check as check_all
from service.check.result import Check, Verdict, exit_code, failures
from service.check.venue import VenueChecks, clocks_apart, outbound_address
from service.clock import ScaledClock, WallClock
from service.exchange.access import Access
from service.exchange.binance import rest
from service.exchange.gate import Gate
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, serving
from service.settings import ExchangeSettings, MarketSettings, RunSettings, Settings, load
from service.store.opening import STATE_FILE, open_state
from service.store.sqlite import open_sqlite
from tests.market_seeds import MARKET_SEEDS

Override = Callable[[web.Request], Awaitable[web.StreamResponse]] | tuple[int, Any]
MARKET = MarketSettings(symbols=4, min_age_days=0.0)


@asynccontextmanager
async def checking(
    overrides: dict[str, Override] | None = None,
    *,
    settings: Settings | None = None,
    deposit: str = "10000",
    key: str = "k",
    limit_s: float = 5.0,
) -> AsyncIterator[VenueChecks]:
    options = ServerOptions(
        speed=1.0,
        keys={"k": "s"},
        deposit=Decimal(deposit),
        assumptions=Assumptions(Decimal("0.0002"), Decimal("0.0005"), Decimal(2), Decimal(5)),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with (
            serving(generate(1, 4), options, listener) as venue,
            _proxy(venue.port, overrides or {}) as port,
        ):
            clock = ScaledClock(venue.clock.origin_ms, venue.clock.origin_monotonic_s, 1.0)
            address = ExchangeSettings(
                rest_url=f"http://127.0.0.1:{port}",
                stream_url=f"ws://127.0.0.1:{port}",
                wallet_url=f"http://127.0.0.1:{port}",
                request_limit_s=limit_s,
            )
            access = Access(settings=address, clock=clock, api_key=key, api_secret="s" if key else "")
            yield VenueChecks(settings or Settings(market=MARKET), access)


@asynccontextmanager
async def _proxy(behind: int, overrides: dict[str, Override]) -> AsyncIterator[int]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:

        async def answer(request: web.Request) -> web.StreamResponse:
            override = overrides.get(f"{request.method} {request.path}") or overrides.get(request.path)
            if callable(override):
                return await override(request)
            if override is not None:
                status, body = override
                return web.json_response(body, status=status)
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await _pass_stream(request, session, behind)
            url = f"http://127.0.0.1:{behind}{request.raw_path}"
            from yarl import URL

            async with session.request(
                request.method,
                URL(url, encoded=True),
                headers={"X-MBX-APIKEY": request.headers.get("X-MBX-APIKEY", "")},
            ) as got:
                return web.Response(status=got.status, body=await got.read(), content_type="application/json")

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await web.SockSite(runner, listener).start()
            try:
                yield listener.getsockname()[1]
            finally:
                await runner.cleanup()


async def _pass_stream(
    request: web.Request, session: aiohttp.ClientSession, behind: int
) -> web.WebSocketResponse:
    client = web.WebSocketResponse()
    await client.prepare(request)
    async with session.ws_connect(f"http://127.0.0.1:{behind}{request.raw_path}") as venue:

        async def forward() -> None:
            async for message in venue:
                await client.send_str(message.data)

        forwarding = asyncio.create_task(forward())
        async for message in client:
            await venue.send_str(message.data)
        forwarding.cancel()
    return client


async def silent_stream(request: web.Request) -> web.WebSocketResponse:
    """Acknowledges every subscription and sends nothing, as an unrouted address does since April 2026."""
    stream = web.WebSocketResponse()
    await stream.prepare(request)
    async for message in stream:
        await stream.send_str(json.dumps({"result": None, "id": json.loads(message.data)["id"]}))
    return stream


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


async def test_a_sound_venue_passes_every_check():
    async with checking() as checks:
        found = await checks.run()
    assert {check.verdict for check in found} == {Verdict.PASS}
    assert len(found) == 13
    assert "fresh" not in named(found, "venue reachable").found  # it runs apart


async def test_without_a_key_only_public_data_is_looked_at():
    async with checking(key="") as checks:
        found = await checks.run()
    assert "api key" not in {check.name for check in found}
    assert {check.verdict for check in found} == {Verdict.PASS}


PERMISSIONS = {"enableWithdrawals": False, "enableFutures": True, "ipRestrict": True}
MAY_PASS = {"HTTP 500", "stream refused with HTTP 500", "sent nothing", "502"}
BAD_KEY = {"code": -2015, "msg": "Invalid API-key, IP, or permissions for action, request ip: 203.0.113.7"}


@pytest.mark.parametrize(
    ("path", "answer", "name", "verdict", "words"),
    [
        ("/fapi/v1/time", (451, {"msg": "restricted location"}), "venue reachable", "fail", "HTTP 451"),
        ("/fapi/v1/time", (403, {}), "venue reachable", "fail", "HTTP 403"),
        ("/fapi/v3/account", (401, BAD_KEY), "api key", "fail", "the venue sees the address 203.0.113.7"),
        ("/fapi/v1/leverageBracket", (200, []), "leverage brackets", "fail", "names none"),
        (
            "/fapi/v1/order/test",
            (400, {"code": -4120, "msg": "Order type not supported"}),
            "order route",
            "fail",
            "-4120",
        ),
        (
            "/fapi/v1/openAlgoOrders",
            (404, {"code": -5000, "msg": "no such path"}),
            "order route",
            "fail",
            "-5000",
        ),
        ("/fapi/v1/listenKey", (401, BAD_KEY), "private stream", "fail", "-2015"),
        ("/fapi/v1/listenKey", (500, {}), "private stream", "fail", "HTTP 500"),
        ("/private/ws", (500, {}), "private stream", "fail", "stream refused with HTTP 500"),
        ("/market/stream", silent_stream, "market stream", "fail", "sent nothing"),
        (
            "/fapi/v1/positionSide/dual",
            (200, {"dualSidePosition": True}),
            "account modes",
            "fail",
            "hedge mode",
        ),
        (
            "/fapi/v1/multiAssetsMargin",
            (200, {"multiAssetsMargin": True}),
            "account modes",
            "fail",
            "multi-assets mode",
        ),
        (
            "/sapi/v1/account/apiRestrictions",
            (200, PERMISSIONS | {"enableWithdrawals": True}),
            "key permissions",
            "fail",
            "may withdraw",
        ),
        (
            "/sapi/v1/account/apiRestrictions",
            (200, PERMISSIONS | {"enableFutures": False}),
            "key permissions",
            "fail",
            "may not trade futures",
        ),
        ("/sapi/v1/account/apiRestrictions", (200, {}), "key permissions", "fail", "may withdraw"),
        ("/sapi/v1/account/apiRestrictions", (502, {}), "key permissions", "fail", "502"),
        (
            "/sapi/v1/account/apiRestrictions",
            (200, PERMISSIONS | {"permitsUniversalTransfer": True}),
            "key permissions",
            "warn",
            "may move money",
        ),
        (
            "/sapi/v1/account/apiRestrictions",
            (200, PERMISSIONS | {"ipRestrict": False}),
            "key permissions",
            "warn",
            "bound to no address",
        ),
    ],
)
async def test_each_failure_is_named_with_what_to_do(
    monkeypatch, path: str, answer: Override, name: str, verdict: str, words: str
):
    monkeypatch.setattr(venue_checks, "DELIVERY_LIMIT_S", 0.5)
    limit_s = 1.5 if name == "private stream" else 5.0  # it is waited for to the end
    async with checking({path: answer}, limit_s=limit_s) as checks:
        found = await checks.run()
    check = named(found, name)
    assert check.verdict == verdict
    assert words in check.found
    assert check.advice
    assert check.transient is (words in MAY_PASS)
    assert exit_code(found) == (0 if verdict == "warn" else 69 if check.transient else 1)
    if name == "venue reachable":
        others = [c for c in found if c.name not in (name, "outbound address")]
        assert {c.verdict for c in others} == {Verdict.SKIP}


@pytest.mark.parametrize(
    ("mode", "accepted", "verdict"),
    [("live", False, Verdict.SKIP), ("live", True, Verdict.WARN), ("sim", False, Verdict.WARN)],
)
async def test_live_needs_to_know_or_an_explicit_word_that_the_key_cannot_withdraw(mode, accepted, verdict):
    settings = Settings(market=MARKET, run=RunSettings(mode=mode))
    async with checking(settings=settings) as checks:
        without = msgspec.structs.replace(
            checks._access.settings, wallet_url="", wallet_unknown_accepted=accepted
        )
        checks._access = msgspec.structs.replace(checks._access, settings=without)
        found = await checks.run()
    check = named(found, "key permissions")
    assert check.verdict is verdict
    assert "cannot withdraw" in check.advice
    assert [bad.name for bad in failures(found)] == (["key permissions"] if verdict is Verdict.SKIP else [])
    assert exit_code(found) == (1 if verdict is Verdict.SKIP else 0)


@pytest.mark.parametrize(
    ("address", "verdict"),
    [
        ("10.1.2.3", "warn"),
        ("192.168.0.4", "warn"),
        ("100.64.0.9", "warn"),
        ("fd12::1", "warn"),
        ("fe80::1%eth0", "warn"),
        ("8.8.8.8", "pass"),
        ("2606:4700::1", "pass"),
        ("127.0.0.1", "pass"),
    ],
)
def test_a_private_address_is_a_warning_that_the_venue_sees_another(address: str, verdict: str):
    check = outbound_address(address)
    assert check.verdict == verdict
    assert ("the venue sees another" in check.found) == (verdict == "warn")


async def test_a_venue_that_is_away_fails():
    async with checking() as checks:
        nowhere = msgspec.structs.replace(checks._access.settings, rest_url="http://127.0.0.1:9")
        checks._access = msgspec.structs.replace(checks._access, settings=nowhere)
        found = await checks.run()
    assert named(found, "venue reachable").verdict is Verdict.FAIL
    assert named(found, "outbound address").verdict is Verdict.FAIL
    assert exit_code(found) == 69


@pytest.mark.parametrize("status", [500, 503])
async def test_an_outage_may_pass_by_itself(status: int, monkeypatch):
    monkeypatch.setattr(rest, "FIRST_PAUSE_S", 0.01)
    async with checking({"/fapi/v1/time": (status, {})}) as checks:
        found = await checks.run()
    assert named(found, "venue reachable").verdict is Verdict.FAIL
    assert exit_code(found) == 69


@pytest.mark.parametrize(("ahead_ms", "verdict"), [(5_000, "fail"), (-5_000, "fail"), (800, "warn")])
async def test_a_clock_that_is_off_is_told(ahead_ms: int, verdict: str):
    async def time(request: web.Request) -> web.Response:
        return web.json_response({"serverTime": checks._access.clock.now_ms() + ahead_ms})

    async with checking({"/fapi/v1/time": time}) as checks:
        found = await checks.run()
    assert named(found, "clock").verdict == verdict


@pytest.mark.parametrize("corrected", [False, True])
async def test_the_clock_is_this_machines_also_once_a_start_has_corrected_ours(corrected: bool):
    machine, ours = WallClock(), WallClock()

    async def time(request: web.Request) -> web.Response:
        return web.json_response({"serverTime": machine.now_ms() - 104_800})

    if corrected:
        ours.correct(-104_800)
    async with checking({"/fapi/v1/time": time}) as checks:
        checks._access = msgspec.structs.replace(checks._access, clock=ours)
        found = await checks.run()
    clock = named(found, "clock")
    assert (clock.verdict, clock.transient) == (Verdict.FAIL, True)
    assert clock.found.startswith("the venue's clock is 104.8 s behind this machine's, known to ")


@pytest.mark.parametrize(
    ("ahead_ms", "words"),
    [(12, "12 ms ahead of"), (-999, "999 ms behind"), (61_040, "61.0 s ahead of"), (0, "0 ms ahead of")],
)
def test_two_clocks_are_said_to_be_apart_in_words(ahead_ms: int, words: str):
    assert clocks_apart(ahead_ms) == f"the venue's clock is {words} this machine's"


async def test_a_universe_without_symbols_fails_and_what_needs_one_is_not_looked_at():
    market = MarketSettings(symbols=4, min_age_days=1e6)
    async with checking(settings=Settings(market=market)) as checks:
        found = await checks.run()
    assert named(found, "universe").verdict is Verdict.FAIL
    assert named(found, "market stream").verdict is Verdict.SKIP
    assert exit_code(found) == 1


async def test_an_excluded_name_that_the_venue_does_not_list_fails():
    market = MarketSettings(symbols=4, exclude=("BTCUSD",))
    async with checking(settings=Settings(market=market)) as checks:
        found = await checks.run()
    check = named(found, "universe")
    assert check.verdict is Verdict.FAIL
    assert "BTCUSDT" in check.found


async def test_fewer_symbols_than_asked_for_are_a_warning():
    async with checking(settings=Settings(market=MarketSettings(symbols=200))) as checks:
        found = await checks.run()
    assert named(found, "universe").verdict is Verdict.WARN


@pytest.mark.parametrize(("deposit", "verdict"), [("0.01", "fail"), ("3", "warn")])
async def test_an_equity_below_the_venues_minimum_is_told(deposit: str, verdict: str):
    async with checking(deposit=deposit) as checks:
        found = await checks.run()
    assert named(found, "minimum notionals").verdict == verdict


async def test_orders_that_rest_already_are_a_warning():
    resting = {
        "orderId": 1,
        "clientOrderId": "by-hand",
        "symbol": "BTCUSDT",
        "side": "BUY",
        "type": "LIMIT",
        "status": "NEW",
        "origQty": "1",
        "executedQty": "0",
        "avgPrice": "0",
        "price": "1",
        "time": 1,
        "updateTime": 1,
    }
    async with checking({"/fapi/v1/openOrders": (200, [resting])}) as checks:
        found = await checks.run()
    check = named(found, "open orders")
    assert (check.verdict, check.found) == (Verdict.WARN, "1 orders rest, 0 positions are open")


async def test_during_a_ban_nothing_is_asked_and_the_end_is_named():
    asked: list[str] = []

    async def count(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({}, status=418)

    async with checking({"/fapi/v1/time": count}) as checks:
        until_ms = checks._access.clock.now_ms() + 60_000
        checks._gate = Gate(silent_until_ms=lambda host: until_ms)
        found = await checks.run()
    assert asked == []
    assert len(found) == 13
    assert found[0].verdict is Verdict.FAIL
    assert f"{datetime.fromtimestamp(until_ms // 1000, UTC):%H:%M:%S} UTC" in found[0].found
    assert {check.verdict for check in found[1:]} == {Verdict.SKIP}
    assert exit_code(found) == 69


async def test_a_ban_that_a_check_meets_is_told_to_the_gate():
    told: dict[str, int] = {}
    banned = {"code": -1003, "msg": "banned until 4102444800000"}
    async with checking({"/fapi/v1/time": (418, banned)}) as checks:
        checks._gate = Gate(silenced=told.__setitem__)
        found = await checks.run()
    assert named(found, "venue reachable").verdict is Verdict.FAIL
    assert list(told.values()) == [4102444800000]
    assert exit_code(found) == 69


async def test_the_wallet_has_bans_of_its_own():
    async with checking() as checks:
        wallet = checks._access.settings.wallet_url.replace("127.0.0.1", "localhost")
        settings = msgspec.structs.replace(checks._access.settings, wallet_url=wallet)
        checks._access = msgspec.structs.replace(checks._access, settings=settings)
        until_ms = checks._access.clock.now_ms() + 60_000
        checks._gate = Gate(silent_until_ms=lambda host: until_ms if "localhost" in host else 0)
        found = await checks.run()
    [bad] = failures(found)
    assert (bad.name, "localhost" in bad.found) == ("key permissions", True)


async def test_the_command_knows_the_bans_of_the_state(tmp_path: Path):
    async with open_sqlite(tmp_path / STATE_FILE) as store:
        await store.save_ban("fapi.example", 4102444800000)
    assert await kept_bans(load(None, {}), tmp_path) == {"fapi.example": 4102444800000}
    assert await kept_bans(load(None, {}), tmp_path / "nothing here") == {}


async def test_the_command_knows_the_bans_of_a_state_in_a_database(postgres, tmp_path: Path):
    loaded = load(None, {"DATABASE_URL": postgres.url, "PERPD_SIM__SEED": str(next(MARKET_SEEDS))})
    assert await kept_bans(loaded, tmp_path) == {}
    async with open_state(loaded, tmp_path) as state:
        await state.store.save_ban("fapi.example", 4102444800000)
        assert await kept_bans(loaded, tmp_path) == {"fapi.example": 4102444800000}


async def test_the_command_asks_nothing_of_a_venue_that_banned_this_address(tmp_path: Path):
    flags = {"run.mode": "paper", "run.data_dir": str(tmp_path), "exchange.rest_url": "http://127.0.0.1:9"}
    async with open_sqlite(tmp_path / STATE_FILE) as store:
        await store.save_ban("127.0.0.1:9", 4102444800000)
    found = await check_all(load(None, {}, flags), {})
    assert "silence until 2100-01-01 00:00:00 UTC" in named(found, "venue reachable").found
