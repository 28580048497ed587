"""Binance USD-M futures behind the Exchange port. Without keys only the public data works."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from service.exchange.binance import codec
from service.exchange.binance.account import AccountCalls
from service.exchange.binance.errors import Kind
from service.exchange.binance.events import UserEvents
from service.exchange.binance.rest import Call, RestClient, first_contact, open_rest, read
from service.exchange.binance.streams import (
    CandleStream,
    Connect,
    ListenKeys,
    UserStream,
    background,
    candle_stream,
    connect,
    user_stream,
)
from service.exchange.gate import OPEN, Gate
from service.ports import CandleRow, Clock, Recorder, UserEvent
from service.records import (
    TIMEFRAME_MS,
    CandleUpdate,
    FundingRate,
    Instrument,
    MarkPrice,
    Order,
    OrderRequest,
    Ticker,
)
from service.settings import ExchangeSettings

MAX_CANDLES = 1_500
TIME = Call("GET", "/fapi/v1/time")
EXCHANGE_INFO = Call("GET", "/fapi/v1/exchangeInfo")
TICKERS = Call("GET", "/fapi/v1/ticker/24hr", weight=40)
FUNDING = Call("GET", "/fapi/v1/fundingRate", weight=0)  # 500 in 5 minutes, a window of its own
MAX_FUNDING_ROWS = 1_000
PREMIUM = Call("GET", "/fapi/v1/premiumIndex", weight=10)
KLINES_PATH = "/fapi/v1/klines"
NEW_KEY = Call("POST", "/fapi/v1/listenKey", kind=Kind.WRITE, key=True, priority=True)
KEEP_KEY = Call("PUT", "/fapi/v1/listenKey", kind=Kind.WRITE, key=True, priority=True)


class BinanceExchange(AccountCalls):
    """See `service.ports.Exchange`; made by `open_binance`."""

    def __init__(
        self,
        rest: RestClient,
        settings: ExchangeSettings,
        clock: Clock,
        stop_working_type: str,
        recorder: Recorder | None = None,
        connect: Connect = connect,
    ) -> None:
        super().__init__(rest, clock, stop_working_type)
        self._connect = connect
        self._recorder = recorder
        self._private: UserStream | None = None
        self._rest = rest
        self._settings = settings

    @property
    def used_weight(self) -> int:
        """Request weight used in the running minute of venue time, by this whole address."""
        return self._rest.budget.used

    async def server_time_ms(self) -> int:
        return (await read(self._rest, TIME, {}, codec.server_time.decode)).server_ms

    async def instruments(self) -> list[Instrument]:
        """All instruments; the venue's request limits are adopted on the way."""
        instruments, limits = await read(self._rest, EXCHANGE_INFO, {}, codec.exchange_info)
        self._rest.budget.set_limits(limits)
        return instruments

    async def tickers(self) -> list[Ticker]:
        return await read(self._rest, TICKERS, {}, codec.tickers)

    async def mark_prices(self) -> list[MarkPrice]:
        return await read(self._rest, PREMIUM, {}, codec.mark_prices)

    async def candles(
        self, symbol: str, timeframe: str, *, limit: int, start_ms: int | None = None
    ) -> list[CandleRow]:
        """The `limit` newest closed candles, or the first `limit` from `start_ms` on.

        More than the venue gives in one answer is fetched in several.
        """
        if start_ms is not None:
            return await self._candles_from(symbol, timeframe, limit, start_ms)
        rows = await self._klines(symbol, timeframe, limit + 1)  # the newest is still open
        while rows and len(rows) < limit:
            wanted = limit - len(rows)
            older = await self._klines(symbol, timeframe, wanted, endTime=rows[0][0] - 1)
            if not older:
                break
            rows = older + rows
        return rows[-limit:]

    async def _candles_from(self, symbol: str, timeframe: str, limit: int, start_ms: int) -> list[CandleRow]:
        rows: list[CandleRow] = []
        step_ms = TIMEFRAME_MS[timeframe]
        while len(rows) < limit and start_ms + step_ms <= self._clock.now_ms():
            wanted = min(limit - len(rows), MAX_CANDLES)
            page = await self._klines(symbol, timeframe, wanted, startTime=start_ms)
            rows += page
            if len(page) < wanted:
                break
            start_ms = page[-1][0] + step_ms
        return rows

    async def _klines(self, symbol: str, timeframe: str, limit: int, **bound: int) -> list[CandleRow]:
        limit = min(limit, MAX_CANDLES)
        params = {"symbol": symbol, "interval": timeframe, "limit": str(limit)}
        params.update((name, str(value)) for name, value in bound.items())
        return await read(
            self._rest,
            Call("GET", KLINES_PATH, weight=klines_weight(limit)),
            params,
            lambda body: codec.closed_candles(body, timeframe, self._clock.now_ms()),
        )

    async def funding_rates(self, start_ms: int, end_ms: int) -> list[FundingRate]:
        """See the port. The venue gives 1,000 at most, the first: a full page is read on from its end."""
        found: dict[tuple[str, int], FundingRate] = {}
        while start_ms <= end_ms:
            params = {"startTime": str(start_ms), "endTime": str(end_ms), "limit": str(MAX_FUNDING_ROWS)}
            page = await read(self._rest, FUNDING, params, codec.funding_rates)
            found.update(((row.symbol, row.at_ms), row) for row in page)
            if len(page) < MAX_FUNDING_ROWS:
                break
            # The last instant may go on behind the page; one that fills a page alone is left behind.
            newest_ms = max(row.at_ms for row in page)
            start_ms = newest_ms if newest_ms > start_ms else newest_ms + 1
        return sorted(found.values(), key=lambda row: (row.at_ms, row.symbol))

    def candle_stream(
        self,
        symbols: Sequence[str],
        timeframe: str,
        on_candle: Callable[[CandleUpdate], None],
        on_gap: Callable[[Sequence[str]], None],
    ) -> AbstractAsyncContextManager[None]:
        stream = CandleStream(
            self._settings, self._clock, timeframe, on_candle, on_gap, self._silent, self._connect
        )
        return candle_stream(stream, symbols, self._settings.request_limit_s)

    @asynccontextmanager
    async def user_stream(
        self, on_event: Callable[[UserEvent], None], on_gap: Callable[[], None]
    ) -> AsyncIterator[None]:
        """See the port. A repeated event, as a renewal brings, is harmless.

        A deposit or withdrawal counts as a gap: the books learn of it from the income history only.
        """
        events = UserEvents(lambda: stream.reconnect(), on_setting=self.setting_changed, on_transfer=on_gap)

        def on_missed() -> None:
            self.settings_unknown()
            on_gap()

        def on_message(body: bytes) -> None:
            for event in events.decode(body):
                on_event(event)

        keys = ListenKeys(create=self._new_key, keep_alive=self._keep_key)
        stream = UserStream(
            self._settings, self._clock, keys, on_message, on_missed, self._silent, self._connect
        )
        async with user_stream(stream, self._settings.request_limit_s):
            self._private = stream
            try:
                yield
            finally:
                self._private = None

    async def place(self, request: OrderRequest) -> Order:
        """See the port. What the venue takes it must tell on the private stream as well."""
        began_s = self._clock.monotonic_s()
        order = await super().place(request)
        if self._private is not None:
            self._private.expect(began_s)
        return order

    def _silent(self) -> None:
        if self._recorder is not None:
            self._recorder.count("exchange.streams_silent")

    def private_problem(self) -> str:
        """Why the private stream that was entered is not open, or ''."""
        if self._private is None:
            return "not asked for"
        supervisor = self._private.supervisor
        return "" if supervisor.open.is_set() else supervisor.problem or "no answer in time"

    async def _new_key(self) -> str:
        return codec.listen_key.decode(await self._rest.send(NEW_KEY, {})).listen_key

    async def _keep_key(self) -> None:
        await self._rest.send(KEEP_KEY, {})


def klines_weight(limit: int) -> int:
    """What a klines request of this many rows costs."""
    if limit < 100:
        return 1
    if limit < 500:
        return 2
    return 5 if limit <= 1000 else 10


@asynccontextmanager
async def open_binance(
    settings: ExchangeSettings,
    clock: Clock,
    *,
    api_key: str = "",
    api_secret: str = "",
    stop_working_type: str = "MARK_PRICE",
    recorder: Recorder | None = None,
    gate: Gate = OPEN,
) -> AsyncIterator[BinanceExchange]:
    """Open the venue; its connections close with the block.

    Raises VenueRestricted when the venue does not serve this place. A venue that cannot be reached
    is not an error here: the first read says so.
    """
    async with open_rest(
        settings, clock, api_key=api_key, api_secret=api_secret, recorder=recorder, gate=gate
    ) as rest:
        await first_contact(rest)
        async with background("venue clock", rest.keep_offset()):
            yield BinanceExchange(rest, settings, clock, stop_working_type, recorder)
