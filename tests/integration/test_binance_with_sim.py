"""The adapter, and the paper account on top of it, against the simulated exchange over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from service.clock import ScaledClock
from service.errors import OrderRejected, VenueCredentials
from service.exchange.binance.adapter import BinanceExchange, open_binance
from service.exchange.paper import STATE_FILE, PaperExchange, open_paper
from service.exchange.simulated.engine import Assumptions
from service.exchange.simulated.generator import generate
from service.exchange.simulated.server import ServerOptions, Venue, serving
from service.ports import Exchange, UserEvent
from service.records import (
    CandleUpdate,
    Fill,
    Instrument,
    Order,
    OrderPurpose,
    OrderRequest,
    OrderStatus,
    OrderType,
    Side,
)
from service.settings import ExchangeSettings, SimSettings

LIMIT_S = 30.0
SPEED = 60.0
SYMBOLS = 4
SIM = SimSettings()


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    options = ServerOptions(
        speed=SPEED,
        keys={"k": "s"},
        deposit=Decimal(10_000),
        assumptions=Assumptions(Decimal("0.0002"), Decimal("0.0005"), Decimal(2), Decimal(5)),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(generate(1, SYMBOLS), options, listener) as served:
            yield served


@asynccontextmanager
async def opened(venue: Venue, key: str = "k", secret: str = "s") -> AsyncIterator[BinanceExchange]:
    clock = ScaledClock(venue.clock.origin_ms, venue.clock.origin_monotonic_s, SPEED)
    settings = ExchangeSettings(
        rest_url=f"http://127.0.0.1:{venue.port}", stream_url=f"ws://127.0.0.1:{venue.port}"
    )
    async with open_binance(settings, clock, api_key=key, api_secret=secret) as exchange:
        yield exchange


@asynccontextmanager
async def on_paper(venue: Venue, directory: Path) -> AsyncIterator[PaperExchange]:
    async with opened(venue, "", "") as market:
        async with open_paper(market, market._clock, SIM, "MARK_PRICE", directory) as paper:
            yield paper


@pytest.fixture(params=["live", "paper"])
async def exchange(request: pytest.FixtureRequest, venue: Venue, tmp_path: Path) -> AsyncIterator[Exchange]:
    """The same contract, kept by both."""
    opening = opened(venue) if request.param == "live" else on_paper(venue, tmp_path)
    async with opening as found:
        yield found


class Events:
    """The private stream's events, awaitable by what they say."""

    def __init__(self) -> None:
        self.seen: list[UserEvent] = []
        self._new = asyncio.Event()

    def put(self, event: UserEvent) -> None:
        self.seen.append(event)
        self._new.set()

    def orders(self, client_order_id: str) -> list[Order]:
        return [o for o in self.seen if isinstance(o, Order) and o.client_order_id == client_order_id]

    async def order(self, client_order_id: str, status: OrderStatus) -> Order:
        async with asyncio.timeout(LIMIT_S):
            while not (found := [o for o in self.orders(client_order_id) if o.status is status]):
                self._new.clear()
                await self._new.wait()
        return found[0]

    def fills(self, client_order_id: str) -> list[Fill]:
        return [
            each for each in self.seen if isinstance(each, Fill) and each.client_order_id == client_order_id
        ]


async def subject(exchange: Exchange) -> tuple[Instrument, Decimal, Decimal]:
    """An instrument, its mark price, and a quantity worth about 500."""
    instrument = (await exchange.instruments())[0]
    mark = next(m.mark_price for m in await exchange.mark_prices() if m.symbol == instrument.symbol)
    step = instrument.market_step_size
    return instrument, mark, (Decimal(500) / mark // step) * step


def entry(instrument: Instrument, quantity: Decimal, client_order_id: str = "entry-1") -> OrderRequest:
    return OrderRequest(
        client_order_id=client_order_id,
        symbol=instrument.symbol,
        side=Side.BUY,
        type=OrderType.MARKET,
        purpose=OrderPurpose.ENTRY,
        position_id="p-1",
        quantity=quantity,
    )


def stop(instrument: Instrument, price: Decimal, client_order_id: str = "stop-1") -> OrderRequest:
    return OrderRequest(
        client_order_id=client_order_id,
        symbol=instrument.symbol,
        side=Side.SELL,
        type=OrderType.STOP_MARKET,
        purpose=OrderPurpose.STOP,
        position_id="p-1",
        trigger_price=(price // instrument.tick_size) * instrument.tick_size,
        close_position=True,
    )


async def test_public_data_is_complete(exchange: Exchange):
    instruments = await exchange.instruments()
    symbols = {each.symbol for each in instruments}
    assert len(symbols) == SYMBOLS
    assert {each.symbol for each in await exchange.tickers()} == symbols
    assert {each.symbol for each in await exchange.mark_prices()} == symbols
    assert set(await exchange.brackets()) == symbols
    assert await exchange.server_time_ms() > 0


async def test_candles_are_closed_contiguous_and_as_many_as_asked(exchange: Exchange):
    symbol = (await exchange.instruments())[0].symbol
    newest = await exchange.candles(symbol, "5m", limit=1_500)
    times = [row[0] for row in newest]
    assert times == list(range(times[0], times[0] + 1_500 * 300_000, 300_000))
    from_then = await exchange.candles(symbol, "5m", limit=10, start_ms=times[100])
    assert from_then == newest[100:110]


async def test_a_position_is_opened_protected_and_seen_the_same_everywhere(exchange: Exchange):
    instrument, mark, quantity = await subject(exchange)
    await exchange.prepare([instrument.symbol], "ISOLATED")
    await exchange.set_leverage(instrument.symbol, 5, "ISOLATED")
    events = Events()
    async with exchange.user_stream(events.put, lambda: None):
        placed = await exchange.place(entry(instrument, quantity))
        filled = await events.order("entry-1", OrderStatus.FILLED)
        resting = await exchange.place(stop(instrument, mark * Decimal("0.8")))
        await events.order("stop-1", OrderStatus.OPEN)
    asked = await exchange.order(placed)
    assert asked is not None
    order, fills = asked
    assert (order.position_id, order.status, order.filled_quantity) == ("p-1", OrderStatus.FILLED, quantity)
    assert order.average_price == filled.average_price == fills[0].price
    assert fills == events.fills("entry-1")
    assert [each.client_order_id for each in await exchange.open_orders()] == ["stop-1"]
    account = await exchange.account()
    (position,) = account.positions
    assert (position.quantity, position.entry_price) == (quantity, fills[0].price)
    assert account.wallet_balance == 10_000 - fills[0].fee
    assert account.equity == account.wallet_balance + account.unrealised_pnl
    assert await exchange.cancel(resting)
    assert not await exchange.cancel(resting)
    assert await exchange.open_orders() == []
    cancelled = await exchange.order(resting)
    assert cancelled is not None
    assert cancelled[0].status is OrderStatus.CANCELLED


async def test_executions_are_told_under_the_client_ids_of_their_orders(exchange: Exchange):
    instrument, _, quantity = await subject(exchange)
    began_ms = await exchange.server_time_ms()
    first = await exchange.place(entry(instrument, quantity))
    second = msgspec.structs.replace(
        entry(instrument, quantity, "web_1"), side=Side.SELL, reduce_only=True, purpose=OrderPurpose.EXIT
    )
    await exchange.place(second)
    fills = await exchange.executions(instrument.symbol, began_ms - 60_000)
    assert {fill.client_order_id for fill in fills} == {"entry-1", "web_1"}
    asked = await exchange.order(first)
    assert asked is not None
    assert [fill for fill in fills if fill.client_order_id == "entry-1"] == asked[1]
    assert await exchange.executions(instrument.symbol, fills[-1].filled_ms + 1) == []


async def test_a_stop_that_triggers_keeps_its_id_and_brings_its_fill(exchange: Exchange):
    instrument, _, quantity = await subject(exchange)
    events = Events()

    def ignore(update: CandleUpdate) -> None:
        """On paper the stream's prices move the account."""

    async with (
        exchange.user_stream(events.put, lambda: None),
        exchange.candle_stream([instrument.symbol], "5m", ignore, lambda symbols: None),
    ):
        await exchange.place(entry(instrument, quantity))
        await events.order("entry-1", OrderStatus.FILLED)
        mark = next(m.mark_price for m in await exchange.mark_prices() if m.symbol == instrument.symbol)
        placed = await place_close_below(exchange, instrument, mark)
        await events.order(placed.client_order_id, OrderStatus.FILLED)
    asked = await exchange.order(placed)
    assert asked is not None
    order, fills = asked
    assert (order.status, order.type) == (OrderStatus.FILLED, OrderType.STOP_MARKET)
    assert [fill.trade_id for fill in fills] == [
        fill.trade_id for fill in events.fills(order.client_order_id)
    ]
    assert sum(fill.quantity for fill in fills) == quantity
    assert (await exchange.account()).positions == ()


async def place_close_below(exchange: Exchange, instrument: Instrument, mark: Decimal) -> Order:
    """A stop so near that the market reaches it soon; a little lower while the venue refuses it."""
    for number, share in enumerate(("0.9999", "0.9997", "0.999", "0.997")):
        try:
            return await exchange.place(stop(instrument, mark * Decimal(share), f"stop-{number}"))
        except OrderRejected as error:
            if error.code != -2021:
                raise
    raise AssertionError("every stop would trigger at once")


async def test_an_order_off_the_grid_is_rejected_with_the_venues_reason(exchange: Exchange):
    instrument, _, _ = await subject(exchange)
    with pytest.raises(OrderRejected, match="-1111"):
        await exchange.place(entry(instrument, instrument.market_step_size / 3))
    assert await exchange.open_orders() == []


async def test_the_deposit_is_an_adjustment_and_trades_are_not(exchange: Exchange):
    instrument, _, quantity = await subject(exchange)
    await exchange.place(entry(instrument, quantity))
    (deposit,) = await exchange.adjustments(0)
    assert (deposit.kind, deposit.amount) == ("deposit", 10_000)


async def test_candle_updates_arrive_and_belong_to_the_symbols_asked(exchange: Exchange):
    symbols = [each.symbol for each in (await exchange.instruments())[:2]]
    updates: asyncio.Queue[CandleUpdate] = asyncio.Queue()
    async with exchange.candle_stream(symbols, "5m", updates.put_nowait, lambda lost: None):
        async with asyncio.timeout(LIMIT_S):
            seen = {(await updates.get()).symbol for _ in range(20)}
    assert seen <= set(symbols)


async def test_a_wrong_key_is_told_apart_from_a_wrong_order(venue: Venue):
    async with opened(venue, secret="wrong") as exchange:
        with pytest.raises(VenueCredentials, match="-1022"):
            await exchange.account()


async def test_a_paper_account_survives_a_restart(venue: Venue, tmp_path: Path):
    async with on_paper(venue, tmp_path) as exchange:
        instrument, mark, quantity = await subject(exchange)
        placed = await exchange.place(entry(instrument, quantity))
        await exchange.place(stop(instrument, mark * Decimal("0.8")))
        before = await exchange.account()
    async with on_paper(venue, tmp_path) as exchange:
        after = await exchange.account()
        asked = await exchange.order(placed)
        resting = await exchange.open_orders()
    assert after.wallet_balance == before.wallet_balance
    assert [each.quantity for each in after.positions] == [quantity]
    assert asked is not None
    assert asked[0].status is OrderStatus.FILLED
    assert [each.client_order_id for each in resting] == ["stop-1"]


async def test_a_paper_account_that_cannot_be_read_is_not_overwritten(venue: Venue, tmp_path: Path):
    path = tmp_path / STATE_FILE
    path.write_text("{ not an account")
    with pytest.raises(Exception, match=STATE_FILE):
        async with on_paper(venue, tmp_path):
            pytest.fail("opened")
    assert path.read_text() == "{ not an account"


async def test_settled_funding_of_all_symbols_comes_once_and_oldest_first(exchange: Exchange) -> None:
    now_ms = await exchange.server_time_ms()
    rates = await exchange.funding_rates(now_ms - 48 * 3_600_000, now_ms)
    keys = [(rate.at_ms, rate.symbol) for rate in rates]
    assert keys == sorted(set(keys))
    assert {symbol for _, symbol in keys} == {i.symbol for i in await exchange.instruments()}
    assert all(now_ms - 48 * 3_600_000 <= rate.at_ms <= now_ms for rate in rates)
    assert all(rate.at_ms % 3_600_000 == 0 and rate.mark_price > 0 for rate in rates)
