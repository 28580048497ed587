"""Paper trading: a live venue's public data, and the simulated matching engine as the account.

Needs no keys. Orders go through the same calls and the same decoding as on the live venue; only the
transport differs. Assumptions: fills at the last price with the simulation's spread, slippage and fees;
funding at the venue's rates as polled; leverage brackets from a cautious table, since the venue shows
its own to key holders only.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, VenueError
from service.exchange.binance.account import AccountCalls
from service.exchange.binance.errors import Kind, error_for
from service.exchange.binance.events import UserEvents
from service.exchange.binance.rest import Call
from service.exchange.binance.streams import background
from service.exchange.simulated.engine import Assumptions, Engine, VenueFault
from service.ports import CandleRow, Clock, MarketData, UserEvent
from service.records import (
    Bracket,
    CandleUpdate,
    FundingRate,
    Instrument,
    MarkPrice,
    Order,
    OrderRequest,
    Ticker,
)
from service.settings import SimSettings

log = structlog.get_logger("exchange.paper")

ACCOUNT_KEY = "paper"
STATE_FILE = "paper-account.json"
HOUR_MS = 3_600_000
MARK_EVERY_S = 5.0
IDLE_MARK_EVERY_S = 60.0
SAVE_EVERY_S = 5.0
QUIET_AFTER_MS = 30_000
"""Without a candle update for this long, the mark price stands in for the last price."""

_TIERS: tuple[tuple[int, int, str], ...] = (
    (25_000, 20, "0.025"),
    (100_000, 10, "0.05"),
    (500_000, 5, "0.1"),
    (1_000_000, 4, "0.125"),
    (2_000_000, 2, "0.25"),
    (10_000_000, 1, "0.5"),
)
"""(notional cap in quote, greatest leverage, maintenance margin): as strict as a small coin's."""


def cautious_brackets() -> tuple[Bracket, ...]:
    """The built-in brackets, the same for every symbol; maintenance margin is continuous at the caps."""
    rows: list[Bracket] = []
    floor, fraction, amount = Decimal(0), Decimal(0), Decimal(0)
    for cap, leverage, text in _TIERS:
        amount += floor * (Decimal(text) - fraction)
        fraction = Decimal(text)
        rows.append(
            Bracket(
                notional_floor=floor,
                notional_cap=Decimal(cap),
                max_leverage=leverage,
                maintenance_margin_fraction=fraction,
                maintenance_amount=amount,
            )
        )
        floor = Decimal(cap)
    return tuple(rows)


class Funding:
    """The venue's funding, learned from the mark prices as they are polled."""

    def __init__(self) -> None:
        self._rates: dict[str, Decimal] = {}
        self._intervals_ms: dict[str, int] = {}

    def learn(self, marks: Iterable[MarkPrice]) -> None:
        for mark in marks:
            self._rates[mark.symbol] = mark.funding_rate
            if mark.next_funding_ms > 0:
                known = self._intervals_ms.get(mark.symbol, 8 * HOUR_MS)
                self._intervals_ms[mark.symbol] = min(known, _longest_interval_ms(mark.next_funding_ms))

    def rate(self, symbol: str, due_ms: int) -> Decimal:
        return self._rates.get(symbol, Decimal(0))

    def interval_ms(self, symbol: str) -> int:
        return self._intervals_ms.get(symbol, 8 * HOUR_MS)


def _longest_interval_ms(next_funding_ms: int) -> int:
    """The longest of the venue's intervals on whose grid this time lies."""
    hour = (next_funding_ms + HOUR_MS // 2) // HOUR_MS
    return next(hours for hours in (8, 4, 1) if hour % hours == 0) * HOUR_MS


class EngineTransport:
    """Carries the account's calls to the engine instead of the venue."""

    def __init__(self, engine: Engine, clock: Clock, after: Callable[[Call], None]) -> None:
        self._clock = clock
        self._after = after
        self._answers: dict[str, Callable[[str, Mapping[str, object], int], Any]] = {
            "GET /fapi/v3/account": engine.account_v3,
            "GET /fapi/v3/positionRisk": engine.position_risk_v3,
            "GET /fapi/v1/positionSide/dual": engine.position_mode,
            "GET /fapi/v1/multiAssetsMargin": engine.multi_assets,
            "GET /fapi/v1/symbolConfig": engine.symbol_config,
            "POST /fapi/v1/marginType": engine.set_margin_type,
            "POST /fapi/v1/leverage": engine.set_leverage,
            "POST /fapi/v1/order": engine.new_order,
            "POST /fapi/v1/algoOrder": engine.new_algo_order,
            "DELETE /fapi/v1/order": engine.cancel_order,
            "DELETE /fapi/v1/algoOrder": engine.cancel_algo_order,
            "GET /fapi/v1/order": engine.query_order,
            "GET /fapi/v1/algoOrder": engine.query_algo_order,
            "GET /fapi/v1/userTrades": engine.user_trades,
            "GET /fapi/v1/openOrders": engine.open_orders,
            "GET /fapi/v1/openAlgoOrders": engine.open_algo_orders,
            "GET /fapi/v1/income": engine.income,
        }

    async def send(self, call: Call, params: Mapping[str, str]) -> bytes:
        """See `rest.Transport`. A refusal means here what it means on the live venue."""
        now_ms = self._clock.now_ms()
        try:
            body = msgspec.json.encode(self._answers[call.name](ACCOUNT_KEY, params, now_ms))
        except VenueFault as refusal:
            raise error_for(
                refusal.http_status,
                msgspec.json.encode({"code": refusal.code, "msg": refusal.message}),
                {},
                endpoint=call.name,
                kind=call.kind,
                now_ms=now_ms,
            ) from None
        finally:
            self._after(call)
        return body


class PaperExchange(AccountCalls):
    """See `service.ports.Exchange`; made by `open_paper`."""

    def __init__(
        self,
        market: MarketData,
        clock: Clock,
        engine: Engine,
        funding: Funding,
        stop_working_type: str,
        state: Path,
    ) -> None:
        super().__init__(EngineTransport(engine, clock, self._after_call), clock, stop_working_type)
        self._market = market
        self._engine = engine
        self._funding = funding
        self._state = state
        self._unsaved = asyncio.Event()
        self._watched: frozenset[str] = frozenset()
        self._last: dict[str, float] = {}
        self._heard_ms: dict[str, int] = {}
        self._listeners: list[Callable[[UserEvent], None]] = []
        self._events = UserEvents(lambda: None)

    # Public data: the live venue's

    async def server_time_ms(self) -> int:
        return await self._market.server_time_ms()

    async def instruments(self) -> list[Instrument]:
        found = await self._market.instruments()
        for instrument in found:
            self._engine.add_instrument(instrument, cautious_brackets())
        return found

    async def tickers(self) -> list[Ticker]:
        return await self._market.tickers()

    async def mark_prices(self) -> list[MarkPrice]:
        marks = await self._market.mark_prices()
        self._funding.learn(marks)
        self.take_marks(marks)
        return marks

    async def candles(
        self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None
    ) -> list[CandleRow]:
        return await self._market.candles(symbol, timeframe, limit=limit, start_ms=start_ms)

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        return await self._market.funding_rates(start_ms, end_ms)

    def candle_stream(
        self,
        symbols: Sequence[str],
        timeframe: str,
        on_candle: Callable[[CandleUpdate], None],
        on_gap: Callable[[Sequence[str]], None],
    ) -> AbstractAsyncContextManager[None]:
        """The venue's stream; what passes by moves the account's prices too."""

        def take(update: CandleUpdate) -> None:
            self._take_price(update)
            on_candle(update)

        return self._market.candle_stream(symbols, timeframe, take, on_gap)

    # The account

    async def brackets(self) -> dict[str, tuple[Bracket, ...]]:
        rows = cautious_brackets()
        return {instrument.symbol: rows for instrument in await self._market.instruments()}

    async def place(self, request: OrderRequest) -> Order:
        """See the port. The engine learns the price first: it hears of busy symbols only."""
        symbol = request.symbol
        if symbol not in self._last:
            await self.mark_prices()
        if symbol in self._last:
            self._engine.on_prices(self._clock.now_ms(), {symbol: _decimal(self._last[symbol])}, {})
        return await super().place(request)

    @asynccontextmanager
    async def user_stream(
        self, on_event: Callable[[UserEvent], None], on_gap: Callable[[], None]
    ) -> AsyncIterator[None]:
        self._listeners.append(on_event)
        try:
            yield
        finally:
            self._listeners.remove(on_event)

    # Prices in, events out

    def _take_price(self, update: CandleUpdate) -> None:
        symbol = update.symbol
        self._last[symbol] = update.close
        self._heard_ms[symbol] = update.event_ms
        if symbol in self._watched:
            self._engine.on_prices(self._clock.now_ms(), {symbol: _decimal(update.close)}, {})
            self._deliver()

    def take_marks(self, marks: Sequence[MarkPrice]) -> None:
        """Move the account's mark prices; where no candle update came lately, its last prices too."""
        now_ms = self._clock.now_ms()
        quiet = {
            mark.symbol: mark.mark_price
            for mark in marks
            if now_ms - self._heard_ms.get(mark.symbol, 0) > QUIET_AFTER_MS
        }
        self._last.update((symbol, float(price)) for symbol, price in quiet.items())
        self._engine.on_prices(now_ms, quiet, {mark.symbol: mark.mark_price for mark in marks})
        self._deliver()

    def _after_call(self, call: Call) -> None:
        if call.kind is not Kind.READ:
            self._watch()
            self._unsaved.set()
        self._deliver()

    def _watch(self) -> None:
        self._watched = frozenset(self._engine.watched_symbols())

    def _deliver(self) -> None:
        """Hand the engine's events on, after the caller of the moment has had its answer."""
        events = self._engine.take_events()
        if not events:
            return
        self._watch()
        self._unsaved.set()
        loop = asyncio.get_running_loop()
        for key, event in events:
            if key == ACCOUNT_KEY:
                loop.call_soon(self._hand_on, self._events.decode(msgspec.json.encode(event)))

    def _hand_on(self, events: Sequence[UserEvent]) -> None:
        for event in events:
            for listener in tuple(self._listeners):
                listener(event)

    async def follow_marks(self) -> None:
        """Poll mark prices and funding rates, until cancelled."""
        while True:
            await self._clock.sleep_s(MARK_EVERY_S if self._watched else IDLE_MARK_EVERY_S)
            try:
                await self.mark_prices()
            except VenueError as error:
                log.warning("mark prices not read", error=str(error))

    # State

    async def keep_state(self) -> None:
        """Save the account after it changed, until cancelled."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            await self.save()
            await self._clock.sleep_s(SAVE_EVERY_S)

    async def save(self) -> None:
        """Write the account's state, whole or not at all. Raises DataDirectoryUnusable."""
        body = msgspec.json.encode(self._engine.state())
        write = asyncio.ensure_future(asyncio.to_thread(_write_whole, self._state, body))
        try:
            await asyncio.shield(write)
        except asyncio.CancelledError:
            await write  # its thread goes on regardless, and a later save must not meet it
            raise
        except OSError as error:
            raise DataDirectoryUnusable(f"{self._state}: {error.strerror}") from None

    def begin(self, deposit: Decimal) -> None:
        """Take up the saved account, or open one. What came due meanwhile is in its income history."""
        restored = _read_state(self._state)
        if restored is not None:
            self._engine.restore(restored)
        self._engine.open_account(ACCOUNT_KEY, deposit)

    def catch_up(self) -> None:
        """Settle what came due while nobody ran, without events: the first reconciliation finds it."""
        self._engine.account_v3(ACCOUNT_KEY, {}, self._clock.now_ms())
        self._engine.take_events()
        self._watch()


@asynccontextmanager
async def open_paper(
    market: MarketData,
    clock: Clock,
    settings: SimSettings,
    stop_working_type: str,
    directory: Path,
) -> AsyncIterator[PaperExchange]:
    """Open the paper account kept in `directory`; its state is saved when the block ends.

    Raises what the market's reads raise, and DataDirectoryUnusable.
    """
    funding = Funding()
    instruments = await market.instruments()
    rows = cautious_brackets()
    engine = Engine(
        instruments,
        {instrument.symbol: rows for instrument in instruments},
        assumptions_of(settings),
        now_ms=clock.now_ms(),
        funding_interval_ms=funding.interval_ms,
        funding_rate=funding.rate,
    )
    state = directory / STATE_FILE
    paper = PaperExchange(market, clock, engine, funding, stop_working_type, state)
    paper.begin(_decimal(settings.deposit))
    funding.learn(marks := await market.mark_prices())
    paper.catch_up()
    paper.take_marks(marks)
    try:
        async with background("paper account", paper.follow_marks(), paper.keep_state()):
            yield paper
    finally:
        await paper.save()


def assumptions_of(settings: SimSettings) -> Assumptions:
    return Assumptions(
        maker_fee_fraction=_decimal(settings.maker_fee_fraction),
        taker_fee_fraction=_decimal(settings.taker_fee_fraction),
        spread_bps=_decimal(settings.spread_bps),
        slippage_bps_per_million=_decimal(settings.slippage_bps_per_million),
    )


def _decimal(value: float) -> Decimal:
    return Decimal(repr(value))


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataDirectoryUnusable(f"{path}: {error.strerror}") from None
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise DataDirectoryUnusable(
            f"{path}: not a paper account ({error}); move it away to start with a fresh one"
        ) from None


def _write_whole(path: Path, body: bytes) -> None:
    draft = path.with_suffix(".draft")
    try:
        with draft.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
