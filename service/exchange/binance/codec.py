"""The venue's JSON, decoded straight into typed structs and from there into our records.

Unknown fields are ignored and unknown enum values tolerated: the venue adds both without notice. A row
that cannot be decoded is dropped and counted; only an answer with nothing usable in it is malformed.
Field names and meanings: Binance USD-M futures, November 2026.
"""

from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from math import isfinite
from typing import Any, Generic, TypeVar

import msgspec
import structlog
from msgspec import field

from service.errors import VenueMalformed
from service.ports import CandleRow
from service.records import (
    TIMEFRAME_MS,
    Account,
    Adjustment,
    Bracket,
    CandleUpdate,
    Fill,
    FundingRate,
    Instrument,
    MarkPrice,
    Order,
    OrderPurpose,
    OrderStatus,
    OrderType,
    Side,
    Ticker,
    VenuePosition,
)

log = structlog.get_logger("exchange.binance")

T = TypeVar("T")
R = TypeVar("R")
ZERO = Decimal(0)
HOUR_MS = 3_600_000
MINUTE_MS = 60_000
BEGINNING_CHARACTERS = 200


class Answer(Generic[T]):
    """Decoder of one answer's JSON. `strict=False`: the venue writes numbers as strings."""

    def __init__(self, shape: Any, what: str) -> None:
        self._decode: Callable[[bytes], T] = msgspec.json.Decoder(shape, strict=False).decode
        self._what = what

    def decode(self, body: bytes) -> T:
        """Raises VenueMalformed."""
        try:
            return self._decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise VenueMalformed(f"{self._what}: {error}: {beginning(body)}") from None


class Rows(Generic[T]):
    """Decoder of a JSON list whose bad rows are dropped, counted and logged."""

    def __init__(self, row: Any, what: str) -> None:
        self._all: Callable[[bytes], list[T]] = msgspec.json.Decoder(list[row], strict=False).decode
        self._one: Callable[[bytes], T] = msgspec.json.Decoder(row, strict=False).decode
        self._raw = msgspec.json.Decoder(list[msgspec.Raw])
        self._what = what
        self.dropped = 0

    def decode(self, body: bytes) -> list[T]:
        """Raises VenueMalformed when it is no JSON list, or when no row of it is usable."""
        try:
            return self._all(body)
        except (msgspec.ValidationError, UnicodeDecodeError):
            pass  # some row is odd: find out which below
        except msgspec.DecodeError as error:
            raise VenueMalformed(f"{self._what}: {error}: {beginning(body)}") from None
        try:
            raw_rows = self._raw.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise VenueMalformed(f"{self._what}: {error}: {beginning(body)}") from None
        return self.sift(raw_rows)

    def sift(self, raw_rows: Iterable[msgspec.Raw]) -> list[T]:
        """Decode row by row. Raises VenueMalformed when rows came and none is usable."""
        good: list[T] = []
        bad = 0
        reason = ""
        for raw in raw_rows:
            try:
                good.append(self._one(bytes(raw)))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                bad += 1
                reason = reason or f"{error}: {beginning(bytes(raw))}"
        if bad:
            self.report(bad, reason, usable=bool(good))
        return good

    def report(self, bad: int, reason: str, *, usable: bool) -> None:
        """Count and log dropped rows. Raises VenueMalformed when nothing usable is left."""
        self.dropped += bad
        if not usable:
            raise VenueMalformed(f"{self._what}: no usable row: {reason}")
        log.warning("malformed rows dropped", what=self._what, dropped=bad, total=self.dropped, first=reason)


def beginning(body: bytes) -> str:
    """The first characters of a body, for a message."""
    return repr(bytes(body[:BEGINNING_CHARACTERS]).decode("utf-8", "replace"))


def decimal_or_zero(text: str | None) -> Decimal:
    """A number the venue may leave out, empty or null."""
    if not text:
        return ZERO
    try:
        value = Decimal(text)
    except InvalidOperation:
        return ZERO
    return value if value.is_finite() else ZERO


# ---------------------------------------------------------------- public data


class ServerTime(msgspec.Struct, frozen=True):
    server_ms: int = field(name="serverTime")


class RateLimit(msgspec.Struct, frozen=True):
    """One of the venue's limits: `limit` units in `interval_count` intervals."""

    kind: str = field(name="rateLimitType", default="")
    interval: str = ""
    interval_count: int = field(name="intervalNum", default=1)
    limit: int = 0


class _Filter(msgspec.Struct, frozen=True, rename="camel"):
    filter_type: str = ""
    tick_size: Decimal | None = None
    min_price: Decimal | None = None
    max_price: Decimal | None = None
    step_size: Decimal | None = None
    min_qty: Decimal | None = None
    max_qty: Decimal | None = None
    notional: Decimal | None = None
    multiplier_up: Decimal | None = None
    multiplier_down: Decimal | None = None


class _Symbol(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    base_asset: str
    quote_asset: str
    filters: list[_Filter]
    contract_type: str = ""
    status: str = ""
    onboard_date: int = 0
    delivery_date: int = 0


class _ExchangeInfo(msgspec.Struct, frozen=True, rename="camel"):
    symbols: list[msgspec.Raw]
    rate_limits: list[RateLimit] = []


class _Ticker(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    last_price: float
    quote_volume: float


class _Premium(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    mark_price: Decimal
    last_funding_rate: str = ""  # empty for delivery contracts
    next_funding_time: int = 0


class _FundingRate(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    funding_time: int
    funding_rate: float
    mark_price: str = ""


class _Kline(msgspec.Struct, frozen=True, array_like=True, gc=False):
    open_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    close_ms: int


server_time: Answer[ServerTime] = Answer(ServerTime, "time")
_exchange_info: Answer[_ExchangeInfo] = Answer(_ExchangeInfo, "exchangeInfo")
_symbols: Rows[_Symbol] = Rows(_Symbol, "exchangeInfo symbols")
_tickers: Rows[_Ticker] = Rows(_Ticker, "ticker/24hr")
_premiums: Rows[_Premium] = Rows(_Premium, "premiumIndex")
_funding_rates: Rows[_FundingRate] = Rows(_FundingRate, "fundingRate")
_klines: Rows[_Kline] = Rows(_Kline, "klines")


def exchange_info(body: bytes) -> tuple[list[Instrument], list[RateLimit]]:
    """Instruments whose filters are all there, and the venue's limits. Raises VenueMalformed."""
    info = _exchange_info.decode(body)
    symbols = _symbols.sift(info.symbols)
    instruments = [found for symbol in symbols if (found := _instrument(symbol)) is not None]
    if missing := len(symbols) - len(instruments):
        _symbols.report(missing, "a filter is missing or zero", usable=bool(instruments))
    return instruments, info.rate_limits


def _instrument(symbol: _Symbol) -> Instrument | None:
    filters = {each.filter_type: each for each in symbol.filters}
    none = _Filter()
    price = filters.get("PRICE_FILTER", none)
    lot = filters.get("LOT_SIZE", none)
    market = filters.get("MARKET_LOT_SIZE", lot)
    percent = filters.get("PERCENT_PRICE", none)
    if not price.tick_size or not lot.step_size:
        return None
    return Instrument(
        symbol=symbol.symbol,
        base_asset=symbol.base_asset,
        quote_asset=symbol.quote_asset,
        contract_type=symbol.contract_type,
        status=symbol.status,
        onboard_ms=symbol.onboard_date,
        delivery_ms=symbol.delivery_date,
        tick_size=price.tick_size,
        step_size=lot.step_size,
        market_step_size=market.step_size or lot.step_size,
        min_price=price.min_price or ZERO,
        max_price=price.max_price or ZERO,
        min_quantity=lot.min_qty or ZERO,
        max_quantity=lot.max_qty or ZERO,
        market_min_quantity=market.min_qty or ZERO,
        market_max_quantity=market.max_qty or ZERO,
        min_notional=filters.get("MIN_NOTIONAL", none).notional or ZERO,
        multiplier_up=percent.multiplier_up or ZERO,
        multiplier_down=percent.multiplier_down or ZERO,
    )


def tickers(body: bytes) -> list[Ticker]:
    """Tickers with a positive price. Raises VenueMalformed."""
    return [
        Ticker(symbol=row.symbol, last_price=row.last_price, quote_volume=row.quote_volume)
        for row in _tickers.decode(body)
        if isfinite(row.last_price) and row.last_price > 0 and isfinite(row.quote_volume)
    ]


def mark_prices(body: bytes) -> list[MarkPrice]:
    """Mark price and funding of each symbol that has one. Raises VenueMalformed."""
    return [
        MarkPrice(
            symbol=row.symbol,
            mark_price=row.mark_price,
            funding_rate=decimal_or_zero(row.last_funding_rate),
            next_funding_ms=row.next_funding_time,
        )
        for row in _premiums.decode(body)
        if row.mark_price.is_finite() and row.mark_price > 0
    ]


def funding_rates(body: bytes) -> list[FundingRate]:
    """Settled funding rates as they came, times rounded to the minute. Raises VenueMalformed."""
    return [
        FundingRate(
            symbol=row.symbol,
            at_ms=round(row.funding_time / MINUTE_MS) * MINUTE_MS,
            rate=row.funding_rate,
            mark_price=_price_or_zero(row.mark_price),
        )
        for row in _funding_rates.decode(body)
        if isfinite(row.funding_rate)
    ]


def _price_or_zero(text: str) -> float:
    """The venue leaves the price empty for settlements of its early days."""
    try:
        price = float(text)
    except ValueError:
        return 0.0
    return price if isfinite(price) and price > 0 else 0.0


def closed_candles(body: bytes, timeframe: str, now_ms: int) -> list[CandleRow]:
    """The candles that closed before `now_ms`: sorted, without duplicates, each checked.

    Raises VenueMalformed when rows came and none of them is a candle.
    """
    step_ms = TIMEFRAME_MS[timeframe]
    rows = _klines.decode(body)
    sane = [row for row in rows if _sane(row, step_ms)]
    if bad := len(rows) - len(sane):
        _klines.report(bad, "off the grid, or its prices are impossible", usable=bool(sane))
    closed = {row.open_ms: row for row in sane if row.open_ms + step_ms <= now_ms}
    return [
        (row.open_ms, row.open, row.high, row.low, row.close, row.volume)
        for _, row in sorted(closed.items(), key=lambda item: item[0])
    ]


def _sane(row: _Kline, step_ms: int) -> bool:
    return (
        row.open_ms >= 0
        and row.open_ms % step_ms == 0
        and sane_prices(row.open, row.high, row.low, row.close, row.volume)
    )


def sane_prices(open_: float, high: float, low: float, close: float, volume: float) -> bool:
    """Whether these can be one candle: positive, finite, the extremes around open and close.

    Every comparison with NaN is false, so NaN fails the chain; infinity is refused by name.
    """
    return 0.0 < low <= open_ <= high < float("inf") and low <= close <= high and 0.0 <= volume < float("inf")


class _StreamKline(msgspec.Struct, frozen=True, gc=False):
    open_ms: int = field(name="t")
    timeframe: str = field(name="i")
    open: float = field(name="o")
    high: float = field(name="h")
    low: float = field(name="l")
    close: float = field(name="c")
    volume: float = field(name="v")
    closed: bool = field(name="x")


class _StreamEvent(msgspec.Struct, frozen=True):
    event: str = field(name="e", default="")
    event_ms: int = field(name="E", default=0)
    symbol: str = field(name="s", default="")
    kline: _StreamKline | None = field(name="k", default=None)


class StreamError(msgspec.Struct, frozen=True):
    code: int = 0
    msg: str = ""


class MarketMessage(msgspec.Struct, frozen=True):
    """A text frame of a combined /market connection: an event, or the answer to our request `id`."""

    data: _StreamEvent | None = None
    id: int | None = None
    error: StreamError | None = None
    event: str = field(name="e", default="")


_market_message = msgspec.json.Decoder(MarketMessage, strict=False)


def market_message(body: bytes) -> MarketMessage:
    """Raises msgspec.MsgspecError or UnicodeDecodeError."""
    return _market_message.decode(body)


def candle_update(event: _StreamEvent) -> CandleUpdate | None:
    """The candle of a kline event; None for other events and for impossible candles."""
    kline = event.kline
    if kline is None or not sane_prices(kline.open, kline.high, kline.low, kline.close, kline.volume):
        return None
    if kline.open_ms % TIMEFRAME_MS.get(kline.timeframe, 1):
        return None
    return CandleUpdate(
        symbol=event.symbol,
        timeframe=kline.timeframe,
        open_ms=kline.open_ms,
        open=kline.open,
        high=kline.high,
        low=kline.low,
        close=kline.close,
        volume=kline.volume,
        closed=kline.closed,
        event_ms=event.event_ms,
    )


# ---------------------------------------------------------------- orders

_STATUS = {
    "NEW": OrderStatus.OPEN,
    "PARTIALLY_FILLED": OrderStatus.PARTLY_FILLED,
    "FILLED": OrderStatus.FILLED,
    "CANCELED": OrderStatus.CANCELLED,
    "EXPIRED": OrderStatus.EXPIRED,
    "EXPIRED_IN_MATCH": OrderStatus.EXPIRED,
    "REJECTED": OrderStatus.REJECTED,
}
_ALGO_STATUS = {
    "NEW": OrderStatus.OPEN,
    "TRIGGERING": OrderStatus.TRIGGERED,
    "TRIGGERED": OrderStatus.TRIGGERED,
    "CANCELED": OrderStatus.CANCELLED,
    "REJECTED": OrderStatus.REJECTED,
    "EXPIRED": OrderStatus.EXPIRED,
}
_TYPES = {
    "MARKET": OrderType.MARKET,
    "LIQUIDATION": OrderType.MARKET,
    "STOP_MARKET": OrderType.STOP_MARKET,
    "STOP": OrderType.STOP_MARKET,
    "TRAILING_STOP_MARKET": OrderType.STOP_MARKET,
    "TAKE_PROFIT_MARKET": OrderType.TAKE_PROFIT_MARKET,
    "TAKE_PROFIT": OrderType.TAKE_PROFIT_MARKET,
}


def order_type(name: str) -> OrderType:
    """Our type for the venue's; types we never send map to the nearest."""
    return _TYPES.get(name, OrderType.LIMIT)


def order_status(name: str, filled: Decimal, quantity: Decimal) -> OrderStatus:
    """Statuses we do not know (NEW_INSURANCE, NEW_ADL) are judged by what is filled."""
    if known := _STATUS.get(name):
        return known
    if quantity > 0 and filled >= quantity:
        return OrderStatus.FILLED
    return OrderStatus.PARTLY_FILLED if filled > 0 else OrderStatus.OPEN


def algo_status(name: str, filled: Decimal | None) -> OrderStatus:
    """Status of a conditional order; a finished one is filled when the order it became filled.

    Args: filled: executed quantity of that order, None where the venue did not say.
    """
    if known := _ALGO_STATUS.get(name):
        return known
    if name != "FINISHED":
        return OrderStatus.OPEN
    if filled is None:
        return OrderStatus.TRIGGERED
    return OrderStatus.FILLED if filled > 0 else OrderStatus.CANCELLED


def purpose_of(kind: OrderType, *, reducing: bool) -> OrderPurpose:
    """The likely purpose of an order of which only the venue's fields are known."""
    if kind is OrderType.STOP_MARKET:
        return OrderPurpose.STOP
    if kind is OrderType.TAKE_PROFIT_MARKET:
        return OrderPurpose.TARGET
    return OrderPurpose.EXIT if reducing else OrderPurpose.ENTRY


class OrderView(msgspec.Struct, frozen=True, rename="camel"):
    """An order as REST shows it; answers to POST lack `avgPrice` and `time`."""

    order_id: int
    symbol: str
    client_order_id: str
    status: str
    side: Side
    type: str
    orig_qty: Decimal
    executed_qty: Decimal
    avg_price: str | None = None
    stop_price: str | None = None
    reduce_only: bool = False
    close_position: bool = False
    time: int = 0
    update_time: int = 0

    def record(self) -> Order:
        kind = order_type(self.type)
        return Order(
            client_order_id=self.client_order_id,
            venue_order_id=str(self.order_id),
            position_id="",
            symbol=self.symbol,
            side=self.side,
            type=kind,
            purpose=purpose_of(kind, reducing=self.reduce_only or self.close_position),
            status=order_status(self.status, self.executed_qty, self.orig_qty),
            quantity=self.orig_qty,
            filled_quantity=self.executed_qty,
            average_price=decimal_or_zero(self.avg_price),
            trigger_price=decimal_or_zero(self.stop_price),
            reason=self.status if self.status in ("EXPIRED_IN_MATCH", "REJECTED") else "",
            created_ms=self.time or self.update_time,
            updated_ms=self.update_time or self.time,
        )


class AlgoView(msgspec.Struct, frozen=True, rename="camel"):
    """A conditional order as REST shows it. Some answers say `type`, others `orderType`."""

    algo_id: int
    client_algo_id: str
    symbol: str
    side: Side
    algo_status: str = "NEW"
    order_type: str | None = None
    type: str | None = None
    quantity: str | None = None
    trigger_price: str | None = None
    actual_order_id: str | int | None = None
    actual_price: str | None = None
    actual_qty: str | None = None
    close_position: bool = False
    reject_reason: str | None = None
    create_time: int = 0
    update_time: int = 0

    @property
    def became(self) -> str:
        """Venue id of the order it became, "" before the trigger."""
        text = str(self.actual_order_id or "")
        return "" if text == "0" else text

    def record(self) -> Order:
        kind = order_type(self.order_type or self.type or "STOP_MARKET")
        filled = None if self.actual_qty is None else decimal_or_zero(self.actual_qty)
        return Order(
            client_order_id=self.client_algo_id,
            venue_order_id=str(self.algo_id),
            position_id="",
            symbol=self.symbol,
            side=self.side,
            type=kind,
            purpose=purpose_of(kind, reducing=True),
            status=algo_status(self.algo_status, filled),
            quantity=decimal_or_zero(self.quantity),
            filled_quantity=filled or ZERO,
            average_price=decimal_or_zero(self.actual_price),
            trigger_price=decimal_or_zero(self.trigger_price),
            reason=self.reject_reason or "",
            created_ms=self.create_time,
            updated_ms=self.update_time or self.create_time,
            became_order_id=self.became,
        )


class _Trade(msgspec.Struct, frozen=True, rename="camel"):
    id: int
    order_id: int
    symbol: str
    side: Side
    price: Decimal
    qty: Decimal
    commission: Decimal = ZERO
    commission_asset: str = ""
    realized_pnl: Decimal = ZERO
    maker: bool = False
    time: int = 0


order_view: Answer[OrderView] = Answer(OrderView, "order")
algo_view: Answer[AlgoView] = Answer(AlgoView, "algoOrder")
order_views: Rows[OrderView] = Rows(OrderView, "openOrders")
algo_views: Rows[AlgoView] = Rows(AlgoView, "openAlgoOrders")
_trades: Rows[_Trade] = Rows(_Trade, "userTrades")


def fills(body: bytes, client_order_id: str) -> list[Fill]:
    """The executions of one order, oldest first. Raises VenueMalformed."""
    return [
        Fill(
            trade_id=str(row.id),
            client_order_id=client_order_id,
            venue_order_id=str(row.order_id),
            symbol=row.symbol,
            side=row.side,
            price=row.price,
            quantity=row.qty,
            fee=row.commission,
            fee_asset=row.commission_asset,
            realised_pnl=row.realized_pnl,
            maker=row.maker,
            filled_ms=row.time,
        )
        for row in sorted(_trades.decode(body), key=lambda row: (row.time, row.id))
    ]


# ---------------------------------------------------------------- account


class _Asset(msgspec.Struct, frozen=True, rename="camel"):
    asset: str
    wallet_balance: Decimal
    unrealized_profit: Decimal
    margin_balance: Decimal
    available_balance: Decimal


class AccountPosition(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    position_amt: Decimal
    unrealized_profit: Decimal = ZERO
    notional: Decimal = ZERO
    update_time: int = 0


class AccountView(msgspec.Struct, frozen=True, rename="camel"):
    """GET /fapi/v3/account."""

    total_wallet_balance: Decimal
    total_unrealized_profit: Decimal
    total_margin_balance: Decimal
    available_balance: Decimal
    assets: list[_Asset] = []
    positions: list[AccountPosition] = []

    @property
    def held(self) -> list[AccountPosition]:
        return [position for position in self.positions if position.position_amt]


class PositionRisk(msgspec.Struct, frozen=True, rename="camel"):
    """A row of GET /fapi/v3/positionRisk."""

    symbol: str
    position_amt: Decimal
    entry_price: Decimal
    liquidation_price: Decimal = ZERO
    leverage: int = 0  # v2 only


class _BracketRow(msgspec.Struct, frozen=True, rename="camel"):
    initial_leverage: int
    notional_cap: Decimal
    notional_floor: Decimal
    maint_margin_ratio: Decimal
    cum: Decimal = ZERO


class _Brackets(msgspec.Struct, frozen=True):
    symbol: str
    brackets: list[_BracketRow]


class _Income(msgspec.Struct, frozen=True, rename="camel"):
    income_type: str
    income: Decimal
    time: int
    symbol: str | None = None
    asset: str = ""
    info: str | None = None
    tran_id: int | str = ""


account_view: Answer[AccountView] = Answer(AccountView, "account")
position_risks: Rows[PositionRisk] = Rows(PositionRisk, "positionRisk")
_brackets: Rows[_Brackets] = Rows(_Brackets, "leverageBracket")
_incomes: Rows[_Income] = Rows(_Income, "income")


def account(view: AccountView, risks: list[PositionRisk], at_ms: int, quote_asset: str = "USDT") -> Account:
    """One instant of the account: balances, PnL and mark prices all come from `view`.

    `risks` was asked for a moment later and gives entry and liquidation prices only.
    """
    by_symbol = {risk.symbol: risk for risk in risks if risk.position_amt}
    asset = next((each for each in view.assets if each.asset == quote_asset), None)
    return Account(
        wallet_balance=asset.wallet_balance if asset else view.total_wallet_balance,
        unrealised_pnl=asset.unrealized_profit if asset else view.total_unrealized_profit,
        equity=asset.margin_balance if asset else view.total_margin_balance,
        available_balance=asset.available_balance if asset else view.available_balance,
        positions=tuple(_position(held, by_symbol.get(held.symbol)) for held in view.held),
        at_ms=at_ms,
    )


def _position(held: AccountPosition, risk: PositionRisk | None) -> VenuePosition:
    mark = abs(held.notional / held.position_amt)
    entry = risk.entry_price if risk else mark - held.unrealized_profit / held.position_amt
    return VenuePosition(
        symbol=held.symbol,
        quantity=held.position_amt,
        entry_price=entry,
        mark_price=mark,
        unrealised_pnl=held.unrealized_profit,
        liquidation_price=risk.liquidation_price if risk else ZERO,
        leverage=risk.leverage if risk else 0,
        updated_ms=held.update_time,
    )


def brackets(body: bytes) -> dict[str, tuple[Bracket, ...]]:
    """Each symbol's brackets, ordered by notional. Raises VenueMalformed."""
    return {
        row.symbol: tuple(
            Bracket(
                notional_floor=bracket.notional_floor,
                notional_cap=bracket.notional_cap,
                max_leverage=bracket.initial_leverage,
                maintenance_margin_fraction=bracket.maint_margin_ratio,
                maintenance_amount=bracket.cum,
            )
            for bracket in sorted(row.brackets, key=lambda each: each.notional_floor)
        )
        for row in _brackets.decode(body)
    }


_TRADE_INCOME = frozenset({"REALIZED_PNL", "COMMISSION"})
_TRANSFERS = frozenset({"TRANSFER", "INTERNAL_TRANSFER", "CROSS_COLLATERAL_TRANSFER"})


class IncomePage(msgspec.Struct, frozen=True):
    """One page of the income history: how far it reaches, and what of it is no trade."""

    rows: int
    last_ms: int
    adjustments: list[Adjustment]


def income_page(body: bytes, quote_asset: str = "USDT") -> IncomePage:
    """Raises VenueMalformed."""
    rows = _incomes.decode(body)
    return IncomePage(
        rows=len(rows),
        last_ms=max((row.time for row in rows), default=0),
        adjustments=[
            _adjustment(row)
            for row in rows
            if row.income_type not in _TRADE_INCOME and row.asset in ("", quote_asset)
        ],
    )


def _adjustment(row: _Income) -> Adjustment:
    symbol = row.symbol or ""
    if row.income_type == "FUNDING_FEE":
        return funding_adjustment(symbol, row.income, row.time)
    if row.income_type in _TRANSFERS:
        return transfer_adjustment(row)
    return Adjustment(
        adjustment_id=f"{row.income_type.lower()}:{row.tran_id}:{symbol}",
        kind="correction",
        symbol=symbol,
        amount=row.income,
        reason=row.income_type.lower(),
        at_ms=row.time,
    )


def funding_adjustment(symbol: str, amount: Decimal, at_ms: int) -> Adjustment:
    """Funding of one symbol. The stream gives no transaction id and a time some milliseconds off.

    No symbol pays funding more than once an hour, so the hour makes the id that both sources share.
    """
    hour = (at_ms + HOUR_MS // 2) // HOUR_MS
    return Adjustment(
        adjustment_id=f"funding:{symbol}:{hour}",
        kind="funding",
        symbol=symbol,
        amount=amount,
        reason="funding fee",
        at_ms=at_ms,
    )


def transfer_adjustment(row: _Income) -> Adjustment:
    """A deposit, or with a negative amount a withdrawal."""
    return Adjustment(
        adjustment_id=f"transfer:{row.tran_id}",
        kind="deposit",
        symbol="",
        amount=row.income,
        reason=(row.info or row.income_type).lower(),
        at_ms=row.time,
    )


class _Flag(msgspec.Struct, frozen=True, rename="camel"):
    dual_side_position: bool = False
    multi_assets_margin: bool = False


class _ListenKey(msgspec.Struct, frozen=True, rename="camel"):
    listen_key: str


class _SymbolConfig(msgspec.Struct, frozen=True, rename="camel"):
    symbol: str
    margin_type: str
    leverage: int


symbol_configs: Rows[_SymbolConfig] = Rows(_SymbolConfig, "symbolConfig")
account_flag: Answer[_Flag] = Answer(_Flag, "account settings")
listen_key: Answer[_ListenKey] = Answer(_ListenKey, "listenKey")
