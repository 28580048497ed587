"""`perpd sim --faults` over a real socket: what the daemon's own client makes of each kind."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest

from service.clock import WallClock
from service.errors import OrderOutcomeUnknown, OrderRejected, VenueThrottled, VenueUnavailable
from service.exchange.binance.adapter import BinanceExchange, open_binance
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.fault_plan import FaultPlan, frequencies
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, Venue, listen, serving
from service.records import OrderPurpose, OrderRequest, OrderType, Side
from service.settings import ExchangeSettings

ASSUMPTIONS = Assumptions(
    maker_fee_fraction=Decimal("0.0002"),
    taker_fee_fraction=Decimal("0.0005"),
    spread_bps=Decimal(2),
    slippage_bps_per_million=Decimal(5),
)


@asynccontextmanager
async def disturbed(**often: float) -> AsyncIterator[tuple[BinanceExchange, Venue]]:
    """A venue whose faults begin once the client has met it."""

    plan = FaultPlan(frequencies(0.0, often), random.Random(1))
    plan.active = False
    options = ServerOptions(
        speed=1.0, keys={"k": "s"}, deposit=Decimal(10_000), assumptions=ASSUMPTIONS, faults=plan
    )
    tape = generate(1, 2, start_ms=time.time_ns() // 1_000_000)
    with listen("127.0.0.1", 0) as listener:
        async with serving(tape, options, listener) as venue:
            settings = ExchangeSettings(
                rest_url=f"http://127.0.0.1:{venue.port}",
                stream_url=f"ws://127.0.0.1:{venue.port}",
                request_limit_s=1.0,
            )
            async with open_binance(settings, WallClock(), api_key="k", api_secret="s") as exchange:
                plan.active = True
                yield exchange, venue


def entry(name: str = "pp-1-e00") -> OrderRequest:
    return OrderRequest(
        client_order_id=name,
        symbol="BTCUSDT",
        side=Side.BUY,
        type=OrderType.MARKET,
        purpose=OrderPurpose.ENTRY,
        position_id="p",
        quantity=Decimal("0.01"),
    )


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("timeout_1007", OrderOutcomeUnknown),
        ("unknown_503", OrderOutcomeUnknown),
        ("unreadable", OrderOutcomeUnknown),
        ("lost_answer", OrderOutcomeUnknown),
        ("lost_request", OrderOutcomeUnknown),
        ("broken_connection", OrderOutcomeUnknown),
        ("protection_1008", VenueUnavailable),
        ("unavailable_503", VenueUnavailable),
        ("throttled_429", VenueThrottled),
        ("banned_418", VenueThrottled),
    ],
)
async def test_each_fault_is_the_error_it_stands_for(kind: str, error: type[Exception]):
    async with disturbed(**{kind: 1.0}) as (exchange, venue):
        with pytest.raises(error):
            await exchange.place(entry())
        assert venue.troubles is not None
        assert venue.troubles.plan.counts[kind] == 1


async def test_an_answer_that_is_lost_had_its_effect_and_a_request_that_is_lost_had_none():
    for kind, held in (("lost_answer", Decimal("0.010")), ("lost_request", Decimal(0))):
        async with disturbed(**{kind: 1.0}) as (exchange, venue):
            with pytest.raises(OrderOutcomeUnknown):
                await exchange.place(entry())
            assert venue.engine.held_quantity("k", "BTCUSDT") == held


async def test_a_stop_is_refused_in_the_venues_words():
    async with disturbed(stop_2021=1.0) as (exchange, _):
        await exchange.place(entry())
        stop = OrderRequest(
            client_order_id="pp-1-s00",
            symbol="BTCUSDT",
            side=Side.SELL,
            type=OrderType.STOP_MARKET,
            purpose=OrderPurpose.STOP,
            position_id="p",
            trigger_price=Decimal(1_000),
            close_position=True,
        )
        with pytest.raises(OrderRejected) as refused:
            await exchange.place(stop)
        assert refused.value.code == -2021


@pytest.mark.parametrize(("kind", "times"), [("event_duplicated", 2), ("event_lost", 0), ("event_late", 1)])
async def test_private_events_come_twice_late_or_never(kind: str, times: int):
    heard: asyncio.Queue[object] = asyncio.Queue()
    async with disturbed(**{kind: 1.0}) as (exchange, _):
        async with exchange.user_stream(heard.put_nowait, lambda: None):
            await exchange.place(entry())
            async with asyncio.timeout(10):
                for _ in range(3 * times):  # an order accepted, its execution, an order filled
                    await heard.get()
            await asyncio.sleep(0.1)  # for what must not come
    assert heard.empty()


async def test_market_orders_fill_in_parts():
    async with disturbed(partial_fill=1.0) as (exchange, venue):
        await exchange.place(entry())
        trades = venue.engine.account_of("k").trades["BTCUSDT"]
        assert 1 <= len(trades) <= 2
        assert sum(trade.quantity for trade in trades) <= Decimal("0.010")
        assert trades[0].quantity < Decimal("0.010")


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("liquidation", "autoclose-"), ("deleveraging", "adl_autoclose"), ("manual_close", "web_")],
)
async def test_the_venue_or_a_person_closes_a_position(kind: str, prefix: str):
    async with disturbed() as (exchange, venue):
        await exchange.place(entry())
        assert venue.troubles is not None
        before = venue.engine.held_quantity("k", "BTCUSDT")
        assert venue.troubles.happen(kind)
        assert venue.engine.held_quantity("k", "BTCUSDT") < before
        last = venue.engine.account_of("k").finished_orders["BTCUSDT"][-1]
        assert last.client_order_id.startswith(prefix)


async def test_a_venue_that_restarts_refuses_for_a_while():
    async with disturbed() as (exchange, venue):
        assert venue.troubles is not None
        assert venue.troubles.happen("exchange_restart")
        with pytest.raises(OrderOutcomeUnknown):
            await exchange.place(entry())


async def test_a_clock_that_jumps_is_measured_and_the_request_signed_again():
    async with disturbed() as (exchange, venue):
        venue.rest.skew_ms = -2_500
        await exchange.place(entry())
        assert venue.engine.held_quantity("k", "BTCUSDT")
